"""Moments in the host's memory change where they lie, and nothing else.

A CPU's devices have memory of the kind that other devices take from the host: with it, all but the gain is tested here.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.data.tokenizer import load_tokenizer
from alignjax.errors import InputError
from alignjax.runs.build import make_model
from alignjax.runs.checkpoint import Checkpointer
from alignjax.system import sharding
from alignjax.system.fingerprint import fingerprint
from alignjax.train import fit
from alignjax.training import offload
from alignjax.training.optim import OptimizerConfig, make_optimizer
from tests import short_run, smoke

NAMES = ("adamw", "lion", "sgd")
# A compiler rounds products and quotients otherwise where it fuses them otherwise.
ROUNDING = {"float32": {"rtol": 1e-5, "atol": 1e-7}, "bfloat16": {"rtol": 1e-2, "atol": 1e-3}}


@pytest.fixture
def on_host(monkeypatch):
  """CPU devices count as devices with memory of their own."""
  monkeypatch.setattr(offload, "has_own_memory", lambda mesh: True)


def tree(key, dtype):
  shapes = {"q": (3, 8, 2, 4), "attention_norm": (3, 8), "q_bias": (3, 2, 4), "down": (3, 16, 8)}
  draw = lambda shape: jax.random.normal(key, shape, dtype)
  return {"embed": draw((12, 8)), "layers": {n: draw(s) for n, s in shapes.items()}, "norm": draw((8,))}


def updates(config, dtype, finite=True, steps=3):
  """The last updates, the state before and that after."""
  tx, params = make_optimizer(config), tree(jax.random.key(0), dtype)
  state, update = tx.init(params), jax.jit(tx.update)
  for number in range(1, steps + 1):
    before, last = state, jnp.array(finite or number < steps)
    step, state = update(tree(jax.random.key(number), dtype), state, params, finite=last)
  return step, before, state


def test_what_moves_is_the_matrices_of_the_layers(params):
  moved = jax.tree_util.tree_leaves_with_path(offload.stacked(params))
  names = {jax.tree_util.keystr(path, simple=True, separator=".") for path, moves in moved if moves}
  assert names == {f"layers.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", NAMES)
def test_layer_by_layer_the_update_is_the_same(name, dtype):
  config = OptimizerConfig(name=name, weight_decay=0.1, clip_norm=0.5)
  whole, streamed = (updates(dataclasses.replace(config, offload=on), dtype) for on in (False, True))
  assert jax.tree.structure(whole) == jax.tree.structure(streamed)  # checkpoints are the same
  types = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
  assert types(whole) == types(streamed)
  as_float = lambda x: np.asarray(x, np.float32)
  close = lambda a, b: np.testing.assert_allclose(as_float(a), as_float(b), **ROUNDING[dtype])
  jax.tree.map(close, whole, streamed)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_leaves_the_state(name):
  _, before, after = updates(OptimizerConfig(name=name, offload=True), jnp.float32, finite=False)
  jax.tree.map(np.testing.assert_array_equal, before, after)


def trained(run, batch, steps=3):
  """The state after some steps, each in the place of the last."""
  with jax.set_mesh(run.mesh):
    state, batch = run.fresh(), sharding.to_mesh(batch, run.mesh)
    trees = run.algorithm.trees({"reference": jax.tree.map(jnp.copy, state.params)}, state.params)
    prepared = run.prepare(trees, batch, state.key)
    for _ in range(steps):
      last = state
      state, _ = run.step(state, prepared, run.hparams, {})
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves((last.params, last.opt_state)))
  return state


def kinds(opt_state):
  """Paths of what lies on the host."""
  leaves = jax.tree_util.tree_leaves_with_path(opt_state)
  return {path[-1].key for path, leaf in leaves if leaf.sharding.memory_kind == offload.HOST}


@pytest.mark.parametrize(
  ("name", "where", "microbatches"),
  [
    ("adamw", "eight_devices", 2),
    pytest.param("adamw", "one_device", 1, marks=pytest.mark.long),
    pytest.param("lion", "eight_devices", 1, marks=pytest.mark.long),
  ],
)
def test_training_is_the_same_with_moments_on_the_host(
  request, config, preference_batch, on_host, name, where, microbatches
):
  optimizer = dataclasses.replace(short_run.OPTIMIZER, name=name)
  wired = "preference", config, request.getfixturevalue(where)
  plain = trained(short_run.make(*wired, optimizer, microbatches), preference_batch)
  # Not the cached one: elsewhere, these devices have no memory of their own.
  run = short_run.make.__wrapped__(*wired, dataclasses.replace(optimizer, offload=True), microbatches)
  streamed = trained(run, preference_batch)
  assert kinds(plain.opt_state) == set()
  assert kinds(streamed.opt_state) == {"q", "k", "v", "o", "gate", "up", "down"}
  assert jax.tree.map(lambda x: x.sharding, streamed) == run.shardings
  both = [(state.params, state.opt_state) for state in (plain, streamed)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING["float32"]), *both)


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def test_a_checkpoint_goes_from_host_to_device_and_back(config, eight_devices, on_host, tmp_path):
  optimizer = short_run.OPTIMIZER
  wired = "sft", config, eight_devices
  make = lambda on: short_run.make.__wrapped__(*wired, dataclasses.replace(optimizer, offload=on)).fresh
  with jax.set_mesh(eight_devices):
    states = [make(on)() for on in (False, True)]
  filled = lambda state: state.replace(opt_state=jax.tree.map(filled_like, state.opt_state))
  states = [filled(state) for state in states]
  bits = [fingerprint(state) for state in states]
  assert bits[0] == bits[1]
  for number, (saved, wanted) in enumerate([states, states[::-1], states[1:] * 2]):
    with contextlib.closing(Checkpointer(tmp_path / str(number), save_every=1)) as checkpoints:
      checkpoints.save(1, saved, {"beta": jnp.float32(1)}, metadata={})
      found = checkpoints.restore(abstract(wanted), {"beta": jnp.float32(0)}).state
    assert kinds(found.opt_state) == kinds(wanted.opt_state)
    assert fingerprint(found) == bits[0]


def filled_like(x):
  """Other numbers, laid out as `x`."""
  values = np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype)
  return jax.device_put(values, x.sharding)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.long
def test_a_run_goes_on_where_its_moments_lie_elsewhere(first, on_host, tmp_path):
  smoke.interrupt(smoke.config("dpo", optimizer__offload=first), tmp_path, step=5)
  run = fit(smoke.config("dpo", optimizer__offload=not first), tmp_path)
  assert run.step == smoke.STEPS
  expected = smoke.finished("dpo")[0]
  np.testing.assert_allclose(smoke.losses(tmp_path), smoke.losses(expected), rtol=0, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["ppo", "dpo_lora"])  # several passes, as a loop with a condition; factors
def test_a_run_is_the_same_with_moments_on_the_host(name, on_host, tmp_path):
  fit(smoke.config(name, optimizer__offload=True), tmp_path)
  expected = smoke.finished(name)[0]
  np.testing.assert_allclose(smoke.losses(tmp_path), smoke.losses(expected), rtol=0, atol=1e-5)


@pytest.mark.long
def test_a_killed_run_with_moments_on_the_host_continues_to_the_same_end(on_host, tmp_path):
  config = smoke.config("dpo", optimizer__offload=True)
  fit(config, tmp_path / "whole")
  smoke.interrupt(config, tmp_path / "killed", step=5)
  fit(config, tmp_path / "killed")
  assert smoke.arrays(tmp_path / "killed") == smoke.arrays(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{"name": "adafactor"}, {"name": "sgd", "b1": 0.0}])
def test_without_moments_there_is_nothing_to_offload(changes):
  with pytest.raises(InputError, match=r"optimizer\.offload: .* keeps no moments"):
    make_optimizer(OptimizerConfig(offload=True, **changes))


def test_a_module_of_ones_own_need_not_stack_its_layers():
  settings = smoke.config("sft", optimizer__offload=True, model__module="mine:build")
  with pytest.raises(InputError, match=r"optimizer\.offload: a model of model\.module"):
    make_model(settings, load_tokenizer(settings.data.tokenizer))
