"""A checkpoint gives back every bit on any mesh, or says which file is damaged and why."""

import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax.errors import InputError
from alignjax.runs import checkpoint
from alignjax.runs.checkpoint import Checkpointer, load_params
from alignjax.runs.frozen_params import load_reference, save_reference
from alignjax.system.fingerprint import digest, fingerprint
from alignjax.types import TrainState
from tests import smoke

# After a failed read Orbax leaves coroutines behind that nobody awaits.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SPECS = {"embed": P("fsdp"), "layers": {"q": P(None, "fsdp"), "norm": P()}, "bias": P("fsdp")}
HPARAMS = {"learning_rate": jnp.float32(1e-3), "beta": jnp.float32(0.1)}


def mesh(devices):
  return jax.make_mesh((devices,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:devices])


def shardings(devices, tree):
  """Params and their moments alike are laid out by the last part of their path that SPECS names."""
  m = mesh(devices)

  def place(path, _):
    spec = SPECS
    for key in path:
      name = getattr(key, "key", getattr(key, "name", None))
      spec = spec.get(name, spec) if isinstance(spec, dict) else spec
    return NamedSharding(m, spec if isinstance(spec, P) else P())

  return jax.tree_util.tree_map_with_path(place, tree)


def create(seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {
    "embed": jax.random.normal(keys[0], (512, 16)),
    "layers": {"q": jax.random.normal(keys[1], (2, 16, 24)), "norm": jnp.ones((2, 16))},
    "bias": jax.random.normal(keys[2], (40,), jnp.bfloat16),
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  zero = jnp.int32(0)
  return TrainState(
    step=jnp.int32(seed),
    params=params,
    opt_state=optimizer.init(params),
    key=jax.random.key(seed),
    skipped=zero,
    skipped_in_a_row=zero,
  )


def make_state(devices=8, seed=0):
  return jax.jit(create, static_argnums=0, out_shardings=shardings(devices, abstract()))(seed)


def abstract(devices=None):
  tree = jax.eval_shape(create)
  if devices is None:
    return tree
  place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  return jax.tree.map(place, tree, shardings(devices, tree))


def checkpointer(path, **options):
  return Checkpointer(path, **{"save_every": 10, "keep_latest": 3} | options)


def saved(path, *steps, **options):
  """A folder of checkpoints whose state at step s was made from seed s."""
  writer = checkpointer(path, **options)
  for step in steps:
    assert writer.save(step, make_state(seed=step), HPARAMS, metadata={"step": step})
  writer.close()
  return path


def largest_file(path):
  return max((p for p in path.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bit(path, params):
  """Flips the lowest bit of an element of `embed`, on whose first shard of 8 its bytes lie in a row."""
  array = params["embed"][:8]
  needle = np.ascontiguousarray(array).tobytes()
  hits = 0
  for file in (p for p in path.rglob("d/*") if p.is_file()):
    data = bytearray(file.read_bytes())
    if (at := data.find(needle)) >= 0:
      data[at] ^= 1
      file.write_bytes(data)
      hits += 1
  assert hits, "the array's bytes were not found"


def assert_same_bits(left, right):
  assert fingerprint(left) == fingerprint(right)
  bits = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()
  assert jax.tree.map(bits, left) == jax.tree.map(bits, right)


@pytest.mark.slow
def test_state_survives_8_4_1_8_devices_bit_for_bit(tmp_path):
  state = make_state(8, seed=7)
  for step, (before, after) in zip((10, 20, 30), ((8, 4), (4, 1), (1, 8)), strict=True):
    writer = checkpointer(tmp_path)
    writer.save(step, jax.device_put(state, shardings(before, state)), HPARAMS, metadata={})
    writer.close()
    reader = checkpointer(tmp_path)
    restored = reader.restore(abstract(after), HPARAMS)
    reader.close()
    assert restored.step == step
    assert_same_bits(restored.state, state)
    assert_same_bits(restored.hparams, HPARAMS)
    assert restored.state.params["embed"].sharding == NamedSharding(mesh(after), P("fsdp"))
    # Scalars without a sharding follow the mesh: one jitted step takes them all.
    jax.jit(lambda s, h: s.params["embed"] * h["beta"] + s.step)(restored.state, restored.hparams)
    state = restored.state


def test_nothing_saved_is_none(tmp_path):
  reader = checkpointer(tmp_path / "new")
  assert reader.restore(abstract(8), HPARAMS) is None
  assert reader.latest_step is None
  reader.close()


def test_metadata_comes_back_as_json(tmp_path):
  metadata = {"config": {"beta": 0.1, "layers": [1, 2]}, "reference": {"digest": "ab"}, "kl": 1e-7}
  writer = checkpointer(tmp_path)
  with pytest.raises(TypeError, match="not JSON serializable"):
    writer.save(10, make_state(), HPARAMS, metadata={"kl": jnp.float32(0)})
  writer.save(10, make_state(), HPARAMS, metadata=metadata)
  assert writer.restore(abstract(8), HPARAMS).metadata == metadata
  writer.close()


def test_saves_when_due_or_forced_and_never_twice(tmp_path):
  writer, state = checkpointer(tmp_path), make_state()
  took = [writer.save(s, state, HPARAMS, metadata={}) for s in (9, 10, 11, 20)]
  assert took == [False, True, False, True]
  assert writer.save(23, state, HPARAMS, metadata={}, force=True)
  assert not writer.save(23, state, HPARAMS, metadata={}, force=True)
  assert (writer.due(29), writer.due(30)) == (False, True)
  writer.close()
  assert writer.steps == [10, 20, 23]


def test_keeps_latest_every_and_best(tmp_path):
  writer = checkpointer(tmp_path, keep_latest=1, keep_every=30, keep_best=("accuracy", "max", 1))
  values = {10: 0.5, 20: 0.9, 30: 0.6, 40: float("nan"), 50: 0.7, 60: None, 70: 0.1}
  for step, value in values.items():
    metrics = None if value is None else {"accuracy": value}
    writer.save(step, make_state(), HPARAMS, metadata={}, metrics=metrics)
  writer.close()
  assert writer.steps == [20, 30, 60, 70]
  reader = checkpointer(tmp_path)  # the metrics are on disk, not in the writer
  assert (reader.best_step("accuracy"), reader.best_step("accuracy", "min")) == (20, 70)
  assert reader.best_step("loss") is None
  reader.close()


def test_keep_best_can_mean_lowest(tmp_path):
  writer = checkpointer(tmp_path, keep_latest=1, keep_best=("loss", "min", 1))
  for step, value in {10: 0.5, 20: 0.2, 30: 0.6, 40: 0.9}.items():
    writer.save(step, make_state(), HPARAMS, metadata={}, metrics={"loss": value})
  writer.close()
  assert writer.steps == [20, 40]


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "half deleted", "record cut", "record edited"])
def test_damaged_newest_step_is_skipped_named_and_saved_again(tmp_path, damage):
  saved(tmp_path, 10, 20)
  newest = tmp_path / "20"
  if damage == "flipped bit":
    flip_bit(newest / "params", make_state(seed=20).params)
  elif damage == "truncated":
    for file in (newest / "opt_state").rglob("d/*"):
      file.write_bytes(file.read_bytes()[:100])
  elif damage == "half deleted":
    for file in [*(newest / "params").rglob("*")]:
      if file.is_file():
        file.unlink()
  else:
    record = newest / "record" / "data.json"
    text = record.read_text()
    cut, edited = text[:-20], text.replace('{"step": 20}', '{"step": 28}')
    record.write_text(cut if damage == "record cut" else edited)

  run = checkpointer(tmp_path)
  with pytest.warns(UserWarning, match=rf"{newest} is skipped: .+") as record:
    restored = run.restore(abstract(8), HPARAMS)
  assert "incompatible handler" not in str(record[0].message)
  if damage == "flipped bit":
    assert "params/embed: changed since it was saved" in str(record[0].message)
  assert restored.step == 10
  assert_same_bits(restored.state, make_state(seed=10))
  assert (tmp_path / "20.unreadable").exists()

  # The run goes on: a forced step between the two, and the damaged one again.
  assert run.save(15, make_state(seed=15), HPARAMS, metadata={}, force=True)
  assert run.save(20, make_state(seed=20), HPARAMS, metadata={})
  run.close()
  again = checkpointer(tmp_path)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert again.restore(abstract(8), HPARAMS).step == 20
  again.close()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """Two steps that were saved with metrics."""
  path = tmp_path_factory.mktemp("measured")
  writer = checkpointer(path)
  for step, loss in {10: 0.5, 20: 0.25}.items():
    writer.save(step, make_state(seed=step), HPARAMS, metadata={"step": step}, metrics={"loss": loss})
  writer.close()
  return path


DAMAGES = {
  "emptied": lambda text: "",
  "cut": lambda text: text[: len(text) // 2],
  "a digit flipped": lambda text: text.replace("0.25", "0.35"),
  "a list": lambda text: "[1]",
  "words": lambda text: '{"loss": "low"}',
  "deep": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metrics_are_those_of_the_step_s_record(measured, tmp_path, damage):
  path = Path(shutil.copytree(measured, tmp_path / "run"))
  file = path / "20" / "metrics" / "metrics"
  file.write_text(DAMAGES[damage](file.read_text()))
  with pytest.warns(UserWarning, match=r"20: its metrics are damaged; taken from its record"):
    checkpoint._mend(epath.Path(path))
  assert smoke.files(path) == smoke.files(measured)


def test_damaged_metrics_do_not_keep_a_run_from_its_newest_step(measured, tmp_path):
  path = Path(shutil.copytree(measured, tmp_path / "run"))
  for step, text in {"20": '{"lo', "10": '{"loss": 0.125}'}.items():
    (path / step / "metrics" / "metrics").write_text(text)
  with pytest.warns(UserWarning, match="its metrics are damaged"):
    run = checkpointer(path)
  assert run.restore(abstract(8), HPARAMS).step == 20
  assert [run.metrics(step) for step in (10, 20)] == [{"loss": 0.5}, {"loss": 0.25}]
  assert run.best_step("loss", "min") == 20
  run.close()


@pytest.mark.parametrize("text", ["[1]", '{"commit_timestamp_nsecs": 1e300}', f'{{"init_timestamp_nsecs": {10**30}}}'])
def test_a_step_whose_description_is_damaged_is_skipped(measured, tmp_path, text):
  path = Path(shutil.copytree(measured, tmp_path / "run"))
  (path / "20" / "_CHECKPOINT_METADATA").write_text(text)
  with pytest.raises(InputError, match=r"20: cannot be read"):  # to evaluate it: nothing there is touched
    checkpoint.load_metadata(path)
  run = checkpointer(path)
  with pytest.warns(UserWarning, match="20 is skipped"):
    assert run.restore(abstract(8), HPARAMS).step == 10
  run.close()


def test_metrics_of_a_step_without_a_record_are_left_out_where_they_are_no_numbers(measured, tmp_path):
  path = Path(shutil.copytree(measured, tmp_path / "run"))
  for step, text in {"10": '{"loss": 0.5}', "20": "{"}.items():  # as an earlier version wrote it, and damaged
    record = json.loads((path / step / "record" / "data.json").read_text())
    body = {name: record[name] for name in ("metadata", "arrays")}
    (path / step / "record" / "data.json").write_text(json.dumps(body | {"sha256": digest(body)}))
    (path / step / "metrics" / "metrics").write_text(text)
  with pytest.warns(UserWarning, match="20: its metrics are damaged; left out"):
    checkpoint._mend(epath.Path(path))
  assert (path / "10" / "metrics" / "metrics").read_text() == '{"loss": 0.5}'
  assert not (path / "20" / "metrics").exists()


def test_half_deleted_old_step_does_not_matter(tmp_path):
  saved(tmp_path, 10, 20)
  (tmp_path / "10" / "params" / "_METADATA").unlink()
  (tmp_path / "10" / "record" / "data.json").unlink()
  run = checkpointer(tmp_path)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert run.restore(abstract(8), HPARAMS).step == 20
  run.close()


def test_never_starts_over_when_no_step_can_be_read(tmp_path):
  saved(tmp_path, 10, 20)
  for step in ("10", "20"):
    largest_file(tmp_path / step / "params").write_bytes(b"")
  run = checkpointer(tmp_path)
  with (
    pytest.warns(UserWarning, match="skipped"),
    pytest.raises(InputError, match=r"no checkpoint can be read \(20: .+; 10: .+\)"),
  ):
    run.restore(abstract(8), HPARAMS)
  run.close()
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["10", "20"]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
  saved(tmp_path, 10)
  leftover = tmp_path / "20.orbax-checkpoint-tmp" / "params"
  leftover.mkdir(parents=True)
  run = checkpointer(tmp_path)
  assert run.restore(abstract(8), HPARAMS).step == 10
  assert run.save(20, make_state(seed=20), HPARAMS, metadata={})
  run.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20"]


def test_failed_write_is_an_error(tmp_path):
  run = checkpointer(tmp_path / "run")
  run.save(10, make_state(), HPARAMS, metadata={})
  run.wait()
  for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  (tmp_path / "run").rmdir()
  (tmp_path / "run").write_text("a file where the folder was")
  with pytest.raises(InputError, match="no checkpoint written: NotADirectoryError"):
    run.save(20, make_state(), HPARAMS, metadata={})


def test_state_of_another_model_is_an_error_not_a_damaged_step(tmp_path):
  saved(tmp_path, 10)
  run = checkpointer(tmp_path)
  other = abstract(8)
  wide = dict(other.params, embed=jax.ShapeDtypeStruct((512, 32), jnp.float32))
  with pytest.raises(InputError, match=r"its params/embed is float32\[512, 16\] and not float32\[512, 32\]"):
    run.restore(other.replace(params=wide), HPARAMS)
  with pytest.raises(InputError, match="it lacks run/hparams/gamma"):
    run.restore(other, HPARAMS | {"gamma": jnp.float32(1)})
  with pytest.raises(InputError, match="nothing here takes its run/hparams/beta"):
    run.restore(other, {"learning_rate": jnp.float32(1)})
  run.close()


def test_params_alone_are_strict_but_for_fresh_leaves_and_cast(tmp_path):
  saved(tmp_path, 10, 20)
  for item in ("opt_state", "run"):  # not needed
    largest_file(tmp_path / "20" / item).write_bytes(b"")
  wanted, expected = abstract(4).params, make_state(seed=20).params
  params, metadata = load_params(tmp_path, wanted)
  assert_same_bits(params, expected)
  assert metadata == {"step": 20}
  assert_same_bits(load_params(tmp_path, wanted, step=10)[0], make_state(seed=10).params)

  half = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=a.sharding), wanted)
  cast, _ = load_params(tmp_path, half)
  assert_same_bits(cast, jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected))
  assert cast["embed"].sharding == wanted["embed"].sharding

  headed = wanted | {"score": jax.ShapeDtypeStruct((16, 1), jnp.float32)}
  with pytest.raises(InputError, match="it lacks params/score"):
    load_params(tmp_path, headed)
  assert_same_bits(load_params(tmp_path, headed, fresh=("score",))[0], expected)
  assert_same_bits(load_params(tmp_path, wanted, fresh=("bias",))[0], expected)  # it is there
  with pytest.raises(InputError, match="nothing here takes its params/bias"):
    load_params(tmp_path, {k: v for k, v in wanted.items() if k != "bias"})


def test_params_of_no_step_or_a_damaged_one_are_an_error(tmp_path):
  with pytest.raises(InputError, match="has no checkpoint; is it"):
    load_params(tmp_path / "typo", abstract(8).params)
  assert not (tmp_path / "typo").exists()
  saved(tmp_path, 10)
  with pytest.raises(InputError, match=r"has no checkpoint 20; it has \[10\]"):
    load_params(tmp_path, abstract(8).params, step=20)
  flip_bit(tmp_path / "10" / "params", make_state(seed=10).params)
  with pytest.raises(InputError, match="10: cannot be read: params/embed: changed"):
    load_params(tmp_path, abstract(8).params)


def test_reference_is_written_once_and_verified(tmp_path):
  path, params = tmp_path / "reference", make_state(seed=3).params
  (tmp_path / "reference.orbax-checkpoint-tmp").mkdir()  # of a killed run
  first = save_reference(path, params)
  written = largest_file(path).stat().st_mtime_ns
  assert save_reference(path, jax.device_put(params, shardings(1, params))) == first
  assert largest_file(path).stat().st_mtime_ns == written
  assert_same_bits(load_reference(path, abstract(4).params, first), params)

  with pytest.raises(InputError, match="reference of another run"):
    save_reference(path, make_state(seed=4).params)
  with pytest.raises(InputError, match="not the reference that this run began with"):
    load_reference(path, abstract(8).params, "0" * 64)
  with pytest.raises(InputError, match="cannot be read: its record: FileNotFoundError"):
    load_reference(tmp_path / "gone", abstract(8).params, first)
  flip_bit(path, params)
  with pytest.raises(InputError, match="params/embed: changed since it was saved"):
    load_reference(path, abstract(8).params, first)


@pytest.mark.parametrize("damage", ["gone", "record cut", "record edited", "array cut", "array flipped", "description"])
def test_a_damaged_reference_is_one_line(tmp_path, damage):
  path, params = tmp_path / "reference", {"embed": jnp.arange(64, dtype=jnp.float32)}
  expected = save_reference(path, params)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  record, array = path / "record" / "data.json", largest_file(path / "params")
  if damage == "gone":
    shutil.rmtree(path)
  elif damage.startswith("record"):
    text = record.read_text()
    record.write_text(text[:-9] if damage == "record cut" else text.replace('"float32"', '"float16"'))
  elif damage == "array cut":
    array.write_bytes(array.read_bytes()[:-9])
  elif damage == "array flipped":
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
  else:
    (path / "_CHECKPOINT_METADATA").write_text("[1]")
  with pytest.raises(InputError, match=r"reference: (cannot be read|is not the reference)") as caught:
    load_reference(path, abstract, expected)
  assert "\n" not in str(caught.value)


def test_steps_are_plain_json_beside_the_arrays(tmp_path):
  saved(tmp_path, 10)
  record = json.loads((tmp_path / "10" / "record" / "data.json").read_text())
  assert record["metadata"] == {"step": 10}
  embed = record["arrays"]["params/embed"]
  assert (embed["shape"], embed["dtype"], len(embed["fingerprint"])) == ([512, 16], "float32", 16)
