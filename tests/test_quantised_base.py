"""A run over a quantised base resumes, evaluates, samples, merges and is swept as one over a stored base."""

import functools
import importlib.util
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.commands import adapter
from alignjax.commands.sweep import expand, sweep
from alignjax.errors import InputError
from alignjax.evaluation.held_out import evaluate
from alignjax.model import lora, quantised
from alignjax.runs.run import load, sample
from alignjax.system.fingerprint import digest, fingerprint, table
from alignjax.train import fit
from alignjax.training import metrics
from tests import smoke

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("qwix"), reason="needs qwix: pip install -e '.[quant]'")
_SESSION = tempfile.TemporaryDirectory(prefix="alignjax-quantised-")


def sft():
  return smoke.finished("sft")[0]


def config(**overrides):
  values = {"run__init": str(sft()), "optimizer__learning_rate": 0.01, "lora__base": "nf4"}
  return smoke.config("dpo_lora", **values | overrides)


@functools.cache
def trained():
  """DPO of factors over an SFT run in nf4: its directory, and the run."""
  workdir = Path(_SESSION.name) / "dpo"
  return workdir, fit(config(), workdir)


def codes(run):
  return jax.device_get(run.model.split(run.params)[1])


@pytest.mark.long
def test_it_starts_at_log_2_and_its_checkpoint_holds_factors_alone():
  workdir, run = trained()
  assert metrics.read(workdir / "metrics.jsonl")[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
  assert run.params["layers"]["q"].qvalue.dtype == jnp.uint4
  saved = smoke.arrays(workdir)
  assert all(name.startswith("params/lora/") for name in saved if name.startswith("params/"))
  assert not (workdir / "reference").exists()


@pytest.mark.long
def test_killed_run_continues_to_the_same_end(tmp_path):
  smoke.interrupt(config(), tmp_path, 5)
  run = fit(config(), tmp_path)
  workdir, whole = trained()
  assert smoke.arrays(tmp_path) == smoke.arrays(workdir)
  assert smoke.lines(tmp_path) == smoke.lines(workdir)
  assert run.metrics == whole.metrics
  jax.tree.map(np.testing.assert_array_equal, codes(run), codes(whole))
  with pytest.raises(InputError, match=r"lora\.base='nf4' there, 'int8' here"):
    fit(config(lora__base="int8"), tmp_path)


@pytest.mark.long
def test_loaded_evaluated_and_sampled():
  workdir, run = trained()
  loaded = load(workdir)
  jax.tree.map(np.testing.assert_array_equal, codes(loaded), codes(run))
  numbers = evaluate(workdir)
  for name, value in run.metrics.items():
    if name.startswith("eval/"):
      assert numbers[name.removeprefix("eval/")] == pytest.approx(value, rel=1e-5, abs=1e-6)
  draw = lambda run: list(sample(run, ["What is 12 + 5?"], max_new_tokens=4)[0][0].tokens)
  assert draw(loaded) == draw(run)


def test_the_digest_is_of_the_stored_base_and_its_form():
  _, stored = smoke.finished("sft")
  record = trained()[1].metadata["base"]
  arrays = table({"params": stored.params})
  assert record == {"init": str(sft()), "step": smoke.STEPS, "digest": digest({"form": "nf4", "arrays": arrays})}
  assert trained()[1].metadata["reference"] == record["digest"]  # another form's cached log-probs are not found


@pytest.mark.long
def test_merged_run_is_the_same_policy_over_the_base_as_it_was_held(tmp_path):
  workdir, run = trained()
  adapter.merge(workdir, tmp_path / "merged")
  merged = load(tmp_path / "merged")
  own, held = run.model.split(run.params)
  assert (merged.config.lora.rank, merged.config.lora.base) == (0, "")
  expected = lora.merge(quantised.release(held, "float32") | own, run.config.lora)
  assert fingerprint(merged.params) == fingerprint(expected)
  numbers = evaluate(tmp_path / "merged")
  assert numbers["loss"] == pytest.approx(run.metrics["eval/loss"], abs=1e-5)
  assert numbers["rewards/margins"] == pytest.approx(run.metrics["eval/rewards/margins"], abs=1e-4)


@pytest.mark.long
def test_members_of_a_sweep_share_the_quantised_base(tmp_path):
  flags = [flag.removeprefix("--config.") for flag in smoke.FLAGS]
  overrides = [*flags, f"run.init={sft()}", "lora.base=nf4", "optimizer.learning_rate=0.01"]
  found = expand(f"{smoke.CONFIGS / 'dpo_lora'}.py:smoke", ("beta=0.1,0.5",), overrides)
  with smoke.devices(1):
    result = sweep(found, tmp_path / "sweep")
    alone = fit(found[1].config, tmp_path / "alone")
  assert result["programs"] == 1
  member = load(tmp_path / "sweep" / result["members"][1]["directory"])
  jax.tree.map(np.testing.assert_array_equal, codes(member), codes(alone))
  for a, b in zip(*(jax.tree.leaves(jax.device_get(run.params["lora"])) for run in (member, alone)), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-4)
