"""The one optimizer step: on a linear model where that tells all, on the decoder where it does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms.algorithm import First, Passes, Sync
from alignjax.system import sharding
from alignjax.system.microbatch import map_over_microbatches, sum_over_microbatches
from alignjax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from alignjax.training.rounding import round_stochastically
from alignjax.training.step import create_state, make_passes, make_train_step
from alignjax.types import Batch, Trees
from tests import short_run

ROWS, WIDTH = 16, 5
CONFIG = OptimizerConfig(weight_decay=0.1, warmup_steps=2)
TX = make_optimizer(CONFIG)
SCHEDULE = make_schedule(CONFIG, steps=10)


def squared_error(params, batch, hparams):
  """A weighted mean over the rows of the whole step, as every loss of the package is one."""
  rows, count = batch.rows, batch.totals["count"]
  error = rows["x"] @ params["w"] - rows["y"]
  loss = jnp.sum(rows["weights"] * (error**2 + hparams["ridge"])) / count
  return loss, {"mean_error": jnp.sum(rows["weights"] * error) / count}


def linear(microbatches=1, loss=squared_error):
  """A jitted step, its state, batch and hparams; most of the weight lies in the first rows."""
  rng = np.random.default_rng(0)
  weights = np.linspace(3, 0, ROWS).astype(np.float32)
  rows = {
    "x": jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32),
    "y": jnp.asarray(rng.normal(size=ROWS), jnp.float32),
    "weights": jnp.asarray(weights),
  }
  batch = Batch(rows, {"count": jnp.float32(weights.sum())})
  state = create_state({"w": jnp.ones(WIDTH)}, TX, jax.random.key(0))
  hparams = {"learning_rate": jnp.float32(0.1), "ridge": jnp.float32(0.5)}
  step = jax.jit(make_train_step(loss, TX, SCHEDULE, microbatches), donate_argnums=0)
  return step, state, batch, hparams


def assert_equal_trees(one, other, **tolerance):
  raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  compare = lambda a, b: np.testing.assert_allclose(raw(a), raw(b), **tolerance or {"rtol": 0})
  jax.tree.map(compare, one, other)


def test_a_step_is_minus_rate_times_the_optimizers_update():
  step, state, batch, hparams = linear()
  grads = jax.grad(lambda p: squared_error(p, batch, hparams)[0])(state.params)
  updates, _ = TX.update(grads, state.opt_state, state.params)
  rate = 0.1 / 3  # the first of two warm-up steps
  expected = state.params["w"] - rate * updates["w"]
  state, metrics = step(state, batch, hparams)
  np.testing.assert_allclose(state.params["w"], expected, rtol=1e-5)
  assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-6)
  assert float(metrics["grad_norm"]) == pytest.approx(float(jnp.linalg.norm(grads["w"])), rel=1e-5)
  assert int(state.step) == 1


def test_the_key_stays_and_the_step_counts():
  step, state, batch, hparams = linear()
  key = np.array(jax.random.key_data(state.key))
  for number in range(3):
    assert int(state.step) == number
    state, _ = step(state, batch, hparams)
  np.testing.assert_array_equal(jax.random.key_data(state.key), key)


def test_what_is_held_is_read_and_never_changed():
  def shifted(params, batch, hparams):
    return squared_error({"w": params["w"] + params["shift"]}, batch, hparams)

  _, state, batch, hparams = linear()
  step = jax.jit(make_train_step(shifted, TX, SCHEDULE), donate_argnums=0)
  held = {"shift": jnp.full(WIDTH, 0.5)}
  expected = squared_error({"w": state.params["w"] + 0.5}, batch, hparams)[0]
  state, metrics = step(state, batch, hparams, held)
  assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-6)
  assert state.params.keys() == {"w"}
  np.testing.assert_array_equal(held["shift"], 0.5)


@pytest.mark.parametrize("microbatches", [2, 4, 16])
def test_microbatches_of_unequal_weight_add_up_to_the_step(microbatches):
  one, many = linear(), linear(microbatches)
  for _ in range(3):
    (state, metrics), (split_state, split_metrics) = (
      step(state, batch, hparams) for step, state, batch, hparams in (one, many)
    )
    one, many = (one[0], state, *one[2:]), (many[0], split_state, *many[2:])
    assert_equal_trees(split_metrics, metrics, rtol=1e-5, atol=1e-6)
  assert_equal_trees(many[1], one[1], rtol=1e-5, atol=1e-6)


def test_microbatches_sum_and_map_over_every_row_once():
  batch = Batch({"x": jnp.arange(12.0).reshape(12, 1)}, {"count": jnp.float32(3)})
  np.testing.assert_array_equal(map_over_microbatches(lambda rows: 3 * rows["x"], batch.rows, 4), 3 * batch.rows["x"])
  total = sum_over_microbatches(lambda part: part.rows["x"].sum() / part.totals["count"], batch, 4)
  assert float(total) == 66 / 3


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize(
  "poison",
  [
    {"x": jnp.nan},  # neither loss nor gradient is a number
    {"y": jnp.inf},
    {"x": 1e30},  # the loss overflows
    {"x": 1e18, "y": 1e-30},  # the loss is a number, the gradient's norm is not
  ],
)
def test_a_step_that_is_not_finite_changes_the_counters_alone(poison, microbatches):
  step, state, batch, hparams = linear(microbatches)
  state, _ = step(state, batch, hparams)  # so that the moments are not zero
  before = jax.tree.map(jnp.copy, state)
  bad = batch.updated({name: batch.rows[name].at[3].set(value) for name, value in poison.items()})
  for row in range(1, 3):
    state, metrics = step(state, bad, hparams)
    assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == row
  assert_equal_trees((state.params, state.opt_state), (before.params, before.opt_state))
  assert int(state.step) == int(before.step) + 2
  state, metrics = step(state, batch, hparams)
  assert int(state.skipped) == 2
  assert int(state.skipped_in_a_row) == 0
  assert (state.params["w"] != before.params["w"]).all()


def test_running_statistics_are_the_batchs_and_survive_a_skipped_step():
  step, state, batch, hparams = linear(microbatches=4)
  state = create_state(state.params, TX, jax.random.key(0), running={"mean": 3.0})
  state, _ = step(state, batch.updated(running={"mean": jnp.float32(5)}), hparams)
  assert float(state.running["mean"]) == 5
  state, _ = step(state, batch.updated({"y": batch.rows["y"] * jnp.nan}, running={"mean": jnp.float32(7)}), hparams)
  assert float(state.running["mean"]) == 5


def test_a_synced_tree_moves_at_its_steps_alone():
  synced = {"reference": Sync(every=3, mix=0.25)}
  _, state, batch, hparams = linear()
  state = create_state(state.params, TX, jax.random.key(0), synced=synced)
  step = jax.jit(make_train_step(squared_error, TX, SCHEDULE, synced=synced), donate_argnums=0)
  expected = np.array(state.params["w"])
  for number in range(1, 7):
    state, _ = step(state, batch, hparams)
    if number % 3 == 0:
      expected = 0.25 * np.array(state.params["w"]) + 0.75 * expected
    np.testing.assert_allclose(state.synced["reference"]["w"], expected, rtol=1e-6)
  assert (state.params["w"] != state.synced["reference"]["w"]).all()


def test_changing_a_hyper_parameter_recompiles_nothing():
  traces = []

  def loss(params, batch, hparams):
    traces.append(hparams)
    return squared_error(params, batch, hparams)

  step, state, batch, hparams = linear(loss=loss)
  losses = []
  for ridge in (0.5, 0.75, 0.0):
    changed = {"ridge": jnp.float32(ridge), "learning_rate": jnp.float32(0)}
    state, metrics = step(state, batch, hparams | changed)
    losses.append(float(metrics["loss"]))
  assert len(traces) == 1
  np.testing.assert_allclose(np.diff(losses), [0.25, -0.75], rtol=1e-5)


def test_a_sweep_of_hyper_parameters_is_a_vmap():
  _, state, batch, hparams = linear()
  step = make_train_step(squared_error, TX, SCHEDULE)
  rates = jnp.array([0.0, 0.1, 0.2])
  sweep = jax.jit(jax.vmap(lambda rate: step(state, batch, hparams | {"learning_rate": rate})[0].params["w"]))
  moved = sweep(rates) - state.params["w"]
  np.testing.assert_array_equal(moved[0], 0)
  np.testing.assert_allclose(moved[2], 2 * moved[1], rtol=1e-4)


def test_parameters_in_bfloat16_stay_so():
  step, state, batch, hparams = linear()
  params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), state.params)
  state, _ = step(create_state(params, TX, jax.random.key(0)), batch, hparams)
  assert state.params["w"].dtype == jnp.bfloat16


def constant_gradient(params, batch, hparams):
  """A loss whose gradient is the batch's `grad`, whatever the params are."""
  del hparams
  return sum(jnp.sum(w.astype(jnp.float32) * batch.rows["grad"].sum(axis=0)) for w in params.values()), {}


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_weights_in_bfloat16_move_as_far_on_average_as_in_float32(name):
  config = OptimizerConfig(name=name, schedule="constant", clip_norm=0.0, b1=0.0 if name == "sgd" else 0.9)
  tx, steps, rate, size = make_optimizer(config), 100, 1e-6, 4096
  step = make_train_step(constant_gradient, tx, lambda step: 1.0)
  w = (0.02 * jax.random.normal(jax.random.key(0), (size,))).astype(jnp.bfloat16)

  @jax.jit
  def moved(w):
    batch, hparams = Batch({"grad": jnp.ones((1, size))}), {"learning_rate": jnp.float32(rate)}
    one = lambda state, _: (step(state, batch, hparams)[0], None)
    state = jax.lax.scan(one, create_state({"w": w}, tx, jax.random.key(1)), length=steps)[0]
    return w.astype(jnp.float32) - state.params["w"].astype(jnp.float32)

  narrow, wide = moved(w), moved(w.astype(jnp.float32))
  assert float(wide.mean()) == pytest.approx(steps * rate, rel=1e-2)
  error = float(narrow.std()) / size**0.5
  assert float(narrow.mean()) == pytest.approx(float(wide.mean()), abs=4 * error)
  assert 4 * error < 0.2 * steps * rate  # or it says nothing


@pytest.mark.parametrize("value", [1.0, 1.0 + 2**-9, -(1.0 + 2**-9), 3e-5, 0.0, jnp.inf, -jnp.inf, jnp.nan])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(value):
  found = np.asarray(round_stochastically(jnp.full(4096, value, jnp.float32), jax.random.key(0)), np.float32)
  value = np.float32(value)
  if not np.isfinite(value) or value == np.asarray(value.astype(jnp.bfloat16), np.float32):
    np.testing.assert_array_equal(found, value)
  else:
    assert len(set(found.tolist())) == 2
    assert (found.min() < value) & (value < found.max())
    assert abs(found.mean() - value) < 5 * found.std() / 4096**0.5


def test_the_noise_of_rounding_belongs_to_the_runs_key_the_step_and_the_pass():
  tx = make_optimizer(OptimizerConfig(name="sgd", b1=0.0, clip_norm=0.0))
  step = make_train_step(constant_gradient, tx, lambda step: 1.0)
  batch, hparams = Batch({"grad": jnp.ones((1, 512))}), {"learning_rate": jnp.float32(1e-4)}
  fresh = lambda seed: create_state({"w": jnp.ones(512, jnp.bfloat16)}, tx, jax.random.key(seed))
  after = lambda state: np.asarray(step(state, batch, hparams)[0].params["w"], np.float32)
  one = after(fresh(0))
  np.testing.assert_array_equal(after(fresh(0)), one)
  assert (after(fresh(1)) != one).any()
  assert (after(fresh(0).replace(step=jnp.int32(1))) != one).any()
  batch = Batch({"grad": jnp.zeros((2, 512))})

  def seen(state, batch, hparams, held):
    noise = jax.random.key_data(state.key).astype(jnp.float32).sum()
    return state, {"loss": noise, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}

  state, found = make_passes(seen, Passes(1, 2, first=("loss",)), lambda batch: {})(fresh(0), batch, hparams)
  assert (jax.random.key_data(state.key) == jax.random.key_data(jax.random.key(0))).all()
  assert found["loss"] > 0  # the key of the first pass is its own


def test_gradients_of_weights_in_bfloat16_add_up_in_float32():
  tx = make_optimizer(OptimizerConfig(name="sgd", b1=0.0, clip_norm=0.0))
  state = create_state({"w": jnp.ones(4, jnp.bfloat16)}, tx, jax.random.key(0))
  step = make_train_step(constant_gradient, tx, lambda step: 1.0, microbatches=512)
  _, metrics = step(state, Batch({"grad": jnp.ones((512, 4))}), {"learning_rate": jnp.float32(0)})
  assert float(metrics["grad_norm"]) == 512 * 2  # in bfloat16, 256 + 1 is 256


def test_a_synced_tree_in_bfloat16_follows_by_small_shares_too():
  synced = {"reference": Sync(every=1, mix=1e-3)}
  tx = make_optimizer(OptimizerConfig(name="sgd", b1=0.0, clip_norm=0.0))
  state = create_state({"w": jnp.full(4096, 0.5, jnp.bfloat16)}, tx, jax.random.key(0), synced=synced)
  state = state.replace(params={"w": jnp.ones(4096, jnp.bfloat16)})
  step = jax.jit(make_train_step(constant_gradient, tx, lambda step: 1.0, synced=synced))
  for _ in range(20):
    state, _ = step(state, Batch({"grad": jnp.zeros((1, 4096))}), {"learning_rate": jnp.float32(0)})
  assert float(state.synced["reference"]["w"].astype(jnp.float32).mean()) == pytest.approx(0.51, abs=1e-3)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
  "config",
  [
    OptimizerConfig(weight_decay=0.1),
    OptimizerConfig(name="adafactor", weight_decay=0.1),
    OptimizerConfig(name="lion", weight_decay=0.1),
    OptimizerConfig(weight_decay=0.1, offload=True),
  ],
  ids=lambda c: f"{c.name}{'-offload' * c.offload}",
)
def test_what_waits_does_not_move_and_then_begins_as_if_new(config, microbatches):
  config = dataclasses.replace(config, schedule="constant", clip_norm=0.5)
  first, warm = First(("value",), lambda running: running["warm"] > 0), 5

  def loss(params, batch, hparams):
    tree = jax.tree.map(lambda w: jnp.sum(w**2) * batch.rows["x"].sum(), params)
    return sum(jax.tree.leaves(tree)), {}

  trunk = lambda: {"layers": {"q": jnp.ones((2, 3, 4)), "norm": jnp.ones((2, 3))}, "embed": jnp.ones((5, 3))}
  params = trunk() | {"value": {"score": jnp.ones((3, 1))}}
  hparams = {"learning_rate": jnp.float32(1e-2)}
  batch = Batch({"x": jnp.ones(4)})
  tx = make_optimizer(config, first.names)
  step = jax.jit(make_train_step(loss, tx, lambda step: 1.0, microbatches, first=first))
  state = begun = create_state(params, tx, jax.random.key(0), {"warm": 0.0})
  for _ in range(warm):
    norm = 8 * float(jnp.linalg.norm(state.params["value"]["score"]))  # the gradient of 4 w^2 is 8 w
    state, metrics = step(state, batch.updated(running={"warm": jnp.float32(0)}), hparams)
  policy = lambda tree: {name: node for name, node in tree.items() if name != "value"}
  assert_equal_trees(policy(state.params), policy(begun.params))
  assert_equal_trees(state.opt_state[1].rest, begun.opt_state[1].rest)
  assert (state.params["value"]["score"] != 1).all()
  assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
  state, _ = step(state, batch.updated(running={"warm": jnp.float32(1)}), hparams)
  fresh_tx = make_optimizer(config)
  fresh = create_state(begun.params, fresh_tx, jax.random.key(0))
  fresh, _ = jax.jit(make_train_step(loss, fresh_tx, lambda step: 1.0, microbatches))(fresh, batch, hparams)
  assert_equal_trees(policy(state.params), policy(fresh.params), rtol=1e-5)


def num_bytes(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_the_donated_state_is_updated_in_place(config, one_device, preference_batch):
  run = short_run.make("preference", config, one_device)
  with jax.set_mesh(one_device):
    state = run.fresh()
    batch = sharding.to_mesh(preference_batch, one_device)
    prepared = run.prepare(Trees({"reference": state.params}), batch, state.key)
    memory = run.step.lower(state, prepared, run.hparams).compile().memory_analysis()
  assert memory.alias_size_in_bytes >= num_bytes((state.params, state.opt_state))


@pytest.mark.parametrize(
  ("algorithm", "devices", "microbatches"),
  [("preference", 1, 4), pytest.param("sft", 1, 2, marks=pytest.mark.slow), ("sft", 8, 2)],
)
def test_microbatches_do_not_change_the_training_of_a_decoder(
  request, config, one_device, eight_devices, algorithm, devices, microbatches
):
  # Rows differ in their number of completion tokens, so parts averaged by themselves would be wrong.
  batch = request.getfixturevalue(f"{short_run.data_kind(algorithm)}_batch")
  whole = short_run.make(algorithm, config, one_device).losses(batch, steps=4)
  mesh = {1: one_device, 8: eight_devices}[devices]
  split = short_run.make(algorithm, config, mesh, microbatches=microbatches).losses(batch, steps=4)
  np.testing.assert_allclose(split, whole, rtol=1e-5)
