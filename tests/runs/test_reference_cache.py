"""The reference cache: what is kept is what would be computed, what changes it misses, and nothing is loaded twice."""

import dataclasses
import json
import os
import socket
import sqlite3
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import distillation, preference, sft, unpaired
from alignjax.data.loader import DataConfig, Dataset
from alignjax.data.stream import Examples
from alignjax.data.tokenizer import load_tokenizer
from alignjax.errors import InputError
from alignjax.model import ModelConfig, decoder
from alignjax.runs import frozen_params, reference_cache
from alignjax.system.fingerprint import digest, table
from alignjax.system.preemption import Preemption
from alignjax.train import fit
from alignjax.types import Batch, Trees
from tests import made, short_run, smoke
from tests.conftest import make_mesh

# Log-probabilities of completions, in nats: the rows of the pass and those of the step are packed otherwise, and so
# their sums are rounded otherwise. 3e-5 was measured in float32, and 0.17 in bfloat16, on sums around -400.
TOLERANCE = 2e-4
HALF_TOLERANCE = 1e-3  # in bfloat16, of a sum


def dataset(path=smoke.DATA / "preference.jsonl", seed=0, kind="preference", **fields):
  tokenizer = load_tokenizer(str(smoke.DATA / "tokenizer.model"))
  shape = {"rows": 16, "row_length": 256, "max_examples": 4, "holdout": 0.0} | fields
  return Dataset.open(DataConfig(train=str(path), **shape), tokenizer, kind, seed=seed)


SMALL = {"vocab": 512, "layers": 2, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}


@pytest.fixture(scope="module")
def small():
  """A model of the smoke data's vocabulary, and its parameters."""
  model = decoder.make(ModelConfig(**SMALL))
  return model, jax.jit(model.init)(jax.random.key(0))


class Opened:
  """A set of columns, and how many examples had to be scored for it."""

  def __init__(self, folder, model, params, data, mesh="8 devices", module=preference, **options):
    mesh, algorithm = make_mesh(mesh), made.make(module, model, **options)
    with jax.set_mesh(mesh), mock.patch.object(reference_cache, "_fill", side_effect=reference_cache._fill) as fill:
      digests = {"reference": digest(table({"params": params}))}
      load = mock.Mock(return_value=params)
      (self.columns,) = reference_cache.open_columns(folder, algorithm, model, [data], mesh, digests, load)
    self.scored = sum(int(np.isnan(call.args[1]).any(axis=1).sum()) for call in fill.call_args_list)
    self.loads, self.table = load.call_count, self.columns.tables["reference_logps"]


@pytest.fixture(scope="module")
def filled_once(small, tmp_path_factory):
  """A folder with the log-probabilities of all pairs of the smoke data, and what was found when it was filled."""
  folder = tmp_path_factory.mktemp("filled")
  opened = Opened(folder, *small, dataset())
  assert (opened.scored, opened.loads) == (len(dataset()), 1)
  return folder, opened


@pytest.fixture
def filled(filled_once, tmp_path):
  """The same, a copy that a test may change."""
  folder, opened = filled_once
  return smoke.copy(folder, tmp_path / "cache"), opened


def test_cached_columns_are_what_prepare_computes(small, filled):
  model, params = small
  batch = next(iter(dataset(seed=5).batches(3)))  # packed and shuffled otherwise than the pass
  prepare = jax.jit(made.make(preference.RECIPE, model).prepare)
  expected = prepare(Trees({"reference": params}), Batch(batch), None).rows["reference_logps"]
  cached = filled[1].columns(batch)["reference_logps"]
  assert (cached[batch["example_mask"] > 0] < 0).all()
  assert not cached[batch["example_mask"] == 0].any()
  np.testing.assert_allclose(cached, expected, rtol=0, atol=TOLERANCE)


def test_in_bfloat16_they_are_as_near_as_its_rounding(tmp_path):
  model = decoder.make(ModelConfig(**SMALL, dtype="bfloat16"))
  params = jax.jit(model.init)(jax.random.key(0))
  params |= {"embed": 10 * params["embed"]}  # a fresh model's scores are too small to be rounded much
  columns = Opened(tmp_path, model, params, dataset()).columns
  batch = next(iter(dataset(seed=5).batches(3)))
  prepare = jax.jit(made.make(preference.RECIPE, model).prepare)
  expected = prepare(Trees({"reference": params}), Batch(batch), None).rows["reference_logps"]
  cached = columns(batch)["reference_logps"]
  np.testing.assert_allclose(cached, expected, rtol=HALF_TOLERANCE)
  assert np.abs(cached - expected).max() > 0


def test_order_packing_mesh_and_loss_find_the_same_numbers(small, filled):
  folder, first = filled
  for data, more in [
    (dataset(seed=3, rows=8, max_examples=1), {}),
    (dataset(row_length=384), {"mesh": "1 device"}),
    (dataset(), {"loss": "ipo", "divergence": "js", "microbatches": 2}),
  ]:
    again = Opened(folder, *small, data, **more)
    assert (again.scored, again.loads) == (0, 0)
    np.testing.assert_array_equal(again.table, first.table)


@pytest.mark.parametrize("loss", ["bco", "apo_zero_unpaired"])
def test_both_examples_of_a_record_have_numbers_of_their_own(small, tmp_path, loss):
  model, params = small
  data = dataset(kind="unpaired", seed=5)
  opened = Opened(tmp_path, model, params, dataset(kind="unpaired"), module=unpaired, loss=loss)
  assert opened.table.shape == (2 * len(dataset()),) == (opened.scored,)
  batch = next(iter(data.batches(3)))
  both = Trees({"reference": params}, params)
  prepare = jax.jit(made.make(unpaired.RECIPE, model, loss).prepare)
  expected = prepare(both, Batch(batch, running=unpaired.RUNNING), None).rows["reference_logps"]
  cached = opened.columns(batch)["reference_logps"]
  assert (cached[batch["example_mask"] > 0] < 0).all()
  np.testing.assert_allclose(cached, expected, rtol=0, atol=TOLERANCE)
  # A pair's sides together are another example than each alone.
  assert Opened(tmp_path, model, params, dataset()).scored == len(dataset())


def changed(tmp_path, change):
  """The smoke data with one record changed."""
  rows = [json.loads(line) for line in (smoke.DATA / "preference.jsonl").read_text().splitlines()]
  change(rows[7])
  path = tmp_path / "changed.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return dataset(path)


def test_a_changed_token_misses_and_only_that_example_is_new(small, filled, tmp_path):
  def change(row):
    row["chosen"] = [{**row["chosen"][0], "content": "Yes."}] if isinstance(row["chosen"], list) else "Yes."

  again = Opened(filled[0], *small, changed(tmp_path, change))
  assert (again.scored, again.loads) == (1, 1)
  moved = np.abs(again.table - filled[1].table).max(axis=1) > TOLERANCE
  assert moved.sum() == 1


@pytest.mark.long
def test_weights_dtype_and_settings_miss(small, filled):
  model, params = small
  nudged = params | {"norm": params["norm"].at[3].add(1e-6)}
  half = decoder.make(dataclasses.replace(model.config, dtype="bfloat16"))
  for changed_model, changed_params, options in [
    (model, nudged, {}),
    (half, params, {}),
    (model, params, {"ld_alpha": 0.5}),
  ]:
    assert Opened(filled[0], changed_model, changed_params, dataset(), **options).scored == len(dataset())


def test_a_changed_template_misses(small, filled):
  data = dataset()
  template = data.tokenizer.template
  longer = dataclasses.replace(template, closing=template.closing | {"user": (*template.closing["user"], 9)})
  # Under its old name: what was measured for that is stale, what is kept of the content must not be.
  tokenizer = dataclasses.replace(data.tokenizer, template=longer)
  examples = Examples(
    data.source,
    tokenizer,
    data.kind,
    data.config.format,
    data.examples.records,
    data.examples.parts,
    data.examples.lengths + 1,
  )
  other = dataclasses.replace(data, tokenizer=tokenizer)
  other.__dict__["examples"] = examples
  assert not (other.content == data.content).all(axis=1).any()
  assert Opened(filled[0], *small, other).scored == len(data)


def test_a_pass_that_was_killed_goes_on_to_the_same_numbers(small, filled, tmp_path):
  folder, written = tmp_path / "killed", 0

  def die(self, examples, numbers):
    nonlocal written
    if written == 3:
      raise smoke.Killed
    written += 1
    return write(self, examples, numbers)

  write = reference_cache.ScoreStore.write
  with mock.patch.object(reference_cache.ScoreStore, "write", die), pytest.raises(smoke.Killed):
    Opened(folder, *small, dataset())
  again = Opened(folder, *small, dataset())
  assert 0 < again.scored < len(dataset())
  np.testing.assert_array_equal(again.table, filled[1].table)


def test_a_missing_number_is_an_error_and_never_zero(small, filled):
  with mock.patch.object(reference_cache.ScoreStore, "write"), pytest.raises(InputError, match="are not there"):
    Opened(filled[0], *small, dataset(), ld_alpha=0.25)
  with sqlite3.connect(filled[0] / "scores.sqlite") as connection:
    rows = connection.execute("SELECT numbers FROM scores").fetchall()
  assert all((np.frombuffer(row, "<f4") < 0).all() for (row,) in rows)


def test_a_reference_that_is_not_finite_names_the_record(small, tmp_path):
  model, params = small
  broken = params | {"norm": params["norm"].at[0].set(jnp.nan)}
  with pytest.raises(InputError, match=r"preference.jsonl:1: the reference gives it no finite log-probability"):
    Opened(tmp_path / "cache", model, broken, dataset())


@pytest.mark.parametrize(
  ("algorithm", "said"),
  [
    (lambda model: made.make(preference.RECIPE, model, "simpo"), "it scores nothing with a constant reference"),
    (lambda model: made.make(preference.RECIPE, model, reference="sync"), "its reference moves"),
    (sft.RECIPE.build, "it scores nothing with a constant reference"),
    (unpaired.RECIPE.build, "it takes more from its reference than one number for each completion of a record"),
    (
      lambda model: made.make(distillation.RECIPE, model, teacher=model),
      "it takes more from its teacher than one number",
    ),
  ],
)
def test_where_nothing_stays_the_same_a_cache_is_refused(algorithm, said, model):
  reference_cache.check("", algorithm(model))
  with pytest.raises(InputError, match=f"run.reference_cache=there: nothing to keep for this loss, {said}"):
    reference_cache.check("there", algorithm(model))


def test_with_the_column_there_prepare_takes_no_reference_into_memory(config, one_device, preference_batch):
  run = short_run.make("preference", config, one_device)
  column = {"reference_logps": np.zeros((*preference_batch["weights"].shape, 2), np.float32)}
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(run.fresh).params))
  with jax.set_mesh(one_device):
    analysis = lambda trees, batch: run.prepare.lower(trees, batch, jax.random.key(0)).compile().memory_analysis()
    live = analysis(Trees({"reference": run.fresh().params}), Batch(preference_batch))
    cached = analysis(Trees(), Batch(preference_batch | column))
  assert live.argument_size_in_bytes - cached.argument_size_in_bytes == size - column["reference_logps"].nbytes
  assert cached.temp_size_in_bytes < live.temp_size_in_bytes / 10


HOST = """
import sys
from pathlib import Path
import jax
import numpy as np
port, number, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number, cluster_detection_method="deactivate",
  coordinator_bind_address=f"127.0.0.1:{port}" if number == 0 else None)
from alignjax.runs import reference_cache
from alignjax.system import sharding
from alignjax.algorithms import preference
from tests.runs import test_reference_cache as here
model = here.decoder.make(here.ModelConfig(**here.SMALL))
mesh = sharding.make_mesh()
with jax.set_mesh(mesh):
  shardings = jax.tree.map(lambda x: x.sharding, model.abstract(mesh))
  params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
  for loads in (1, 0):
    load = here.mock.Mock(return_value=params)
    (columns,) = reference_cache.open_columns(
      folder / f"host{number}", preference.RECIPE.build(model), model, [here.dataset()], mesh, {"reference": "w"}, load)
    assert load.call_count == loads
np.save(folder / f"{number}.npy", columns.tables["reference_logps"])
"""


@pytest.mark.long
def test_two_hosts_share_the_pass_and_need_no_common_disk(small, filled, tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(smoke.ROOT)}
  command = lambda number: [sys.executable, "-c", HOST, port, str(number), str(tmp_path)]
  hosts = [subprocess.Popen(command(number), env=environment) for number in range(2)]
  assert [host.wait(600) for host in hosts] == [0, 0]
  tables = [np.load(tmp_path / f"{number}.npy") for number in range(2)]
  np.testing.assert_array_equal(*tables)
  np.testing.assert_allclose(tables[0], filled[1].table, rtol=0, atol=TOLERANCE)
  assert (tmp_path / "host0" / "scores.sqlite").exists()
  assert not (tmp_path / "host1").exists()


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_cached_run_on_labelled_completions_equals_the_live_one(tmp_path):
  config = smoke.config("kto", algorithm__loss="bco", run__steps=3)
  live = fit(config, tmp_path / "live")
  cached = fit(config.replace({"run.reference_cache": str(tmp_path / "cache")}), tmp_path / "cached")
  np.testing.assert_allclose(smoke.losses(tmp_path / "cached"), smoke.losses(tmp_path / "live"), rtol=0, atol=1e-5)
  assert cached.metrics["eval/loss"] == pytest.approx(live.metrics["eval/loss"], abs=1e-5)


def test_a_cached_run_equals_the_live_one_and_never_holds_the_reference(tmp_path):
  config, alive = smoke.config("dpo", run__reference_cache=str(tmp_path / "cache")), []

  def look(_, step):
    alive.append(sum(x.nbytes for x in jax.live_arrays()))
    return False

  smoke.interrupt(config, tmp_path / "killed", 3)  # this run fills the cache
  with mock.patch.object(reference_cache, "_fill") as fill, mock.patch.object(frozen_params, "load_reference") as load:
    fit(config, tmp_path / "killed")
    before = sum(x.nbytes for x in jax.live_arrays())
    with mock.patch.object(Preemption, "requested", look):
      run = fit(config, tmp_path / "cached")
    fill.assert_not_called()
    load.assert_not_called()
  # Between two steps there are parameters, two moments and scalars, and no fourth tree.
  assert alive[0] - before < 3.1 * sum(x.nbytes for x in jax.tree.leaves(run.params))
  # Filled or found, resumed or not, a run reads the same numbers.
  assert smoke.arrays(tmp_path / "killed") == smoke.arrays(tmp_path / "cached")
  assert smoke.lines(tmp_path / "killed") == smoke.lines(tmp_path / "cached")
  workdir, live = smoke.finished("dpo")
  np.testing.assert_allclose(smoke.losses(tmp_path / "cached"), smoke.losses(workdir), rtol=0, atol=1e-5)
  assert run.metrics["eval/loss"] == pytest.approx(live.metrics["eval/loss"], abs=1e-5)
