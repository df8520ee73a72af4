"""Clipping, moments, weight decay and the schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax.errors import InputError
from alignjax.training.optim import OptimizerConfig, decayed, make_optimizer, make_schedule, scale_by_adam

NAMES = ("adamw", "adafactor", "lion", "sgd")


def update(config, grads, params):
  tx = make_optimizer(config)
  return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.parametrize("config", [OptimizerConfig(), OptimizerConfig(b1=0.0, b2=0.95, eps=1e-6, weight_decay=0.1)])
def test_adamw_in_float32_equals_its_definition_in_float64(config):
  rng = np.random.default_rng(0)
  params = {"w": jnp.arange(1.0, 5.0)}
  tx, m, v = make_optimizer(dataclasses.replace(config, clip_norm=0.0)), 0.0, 0.0
  state = tx.init(params)
  for n in range(1, 41):
    grad = rng.normal(size=4).astype(np.float32)
    updates, state = tx.update({"w": jnp.asarray(grad)}, state, params)
    m = config.b1 * m + (1 - config.b1) * grad.astype(np.float64)
    v = config.b2 * v + (1 - config.b2) * grad.astype(np.float64) ** 2
    unbiased = m / (1 - config.b1**n), v / (1 - config.b2**n)
    expected = unbiased[0] / (np.sqrt(unbiased[1]) + config.eps) + config.weight_decay * np.arange(1.0, 5.0)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-6, atol=1e-6)


def test_adamws_state_is_optaxs():
  params = {"w": jnp.ones(3, jnp.bfloat16)}
  grads = jax.tree.map(jnp.ones_like, params)
  ours, theirs = scale_by_adam(0.9, 0.999, 1e-8), optax.scale_by_adam(0.9, 0.999, 1e-8)
  after = [tx.update(grads, tx.init(params))[1] for tx in (ours, theirs)]
  jax.tree.map(np.testing.assert_array_equal, *after)
  assert after[0].nu["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("clip_norm", "norm"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_clipping_is_of_the_whole_gradient_and_zero_does_not_clip(clip_norm, norm):
  config = OptimizerConfig(name="sgd", b1=0.0, clip_norm=clip_norm)
  grads = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
  clipped = update(config, grads, grads)
  assert float(optax.tree.norm(clipped)) == pytest.approx(norm, rel=1e-6)
  assert float(clipped["b"][0, 0] / clipped["a"][0]) == pytest.approx(4 / 3, rel=1e-6)


@pytest.mark.slow
def test_all_weights_but_the_norms_decay(params):
  mask = decayed(params)
  left_out = [path for path, decays in jax.tree_util.tree_leaves_with_path(mask) if not decays]
  names = {jax.tree_util.keystr(path, simple=True, separator=".") for path in left_out}
  assert names == {"norm", "layers.attention_norm", "layers.mlp_norm"}
  zeros = jax.tree.map(jnp.zeros_like, params)
  config = OptimizerConfig(weight_decay=0.1)
  step = update(config, zeros, params)
  jax.tree.map(lambda s, p, d: np.testing.assert_allclose(s, 0.1 * p if d else 0 * p, rtol=1e-6), step, params, mask)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_descends(name):
  config = OptimizerConfig(name=name)
  tx, params = make_optimizer(config), {"w": jnp.array([[3.0, -2.0]])}
  opt_state = tx.init(params)
  for _ in range(20):
    updates, opt_state = tx.update(params, opt_state, params)  # the gradient of |w|^2 / 2 is w
    params = jax.tree.map(lambda p, u: p - 0.05 * u, params, updates)
  assert float(optax.tree.norm(params)) < 3.0


def test_adafactor_is_optaxs_with_an_absolute_rate():
  key = jax.random.key(0)
  heavy = jax.random.normal(key, (130, 140)) * jnp.exp(2 * jax.random.normal(jax.random.key(1), (130, 140)))
  grads = {"w": heavy.at[:, :4].multiply(100.0), "b": heavy[0]}
  params = jax.tree.map(jnp.ones_like, grads)
  theirs = optax.adafactor(1.0, multiply_by_parameter_scale=False)  # which already points down
  ours = make_optimizer(OptimizerConfig(name="adafactor", clip_norm=0.0))
  states = [tx.init(params) for tx in (ours, theirs)]
  assert jax.tree.structure(states[0][1]) == jax.tree.structure(states[1][0])  # of runs that there are
  for _ in range(3):
    one, states[0] = ours.update(grads, states[0], params)
    other, states[1] = theirs.update(grads, states[1], params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-6), one, other)
    assert max(float(jnp.sqrt(jnp.mean(x**2))) for x in one.values()) <= 1 + 1e-6


def test_decays_that_are_not_given_are_those_of_the_optimizers_paper():
  assert [getattr(OptimizerConfig(), key) for key in ("b1", "b2", "eps")] == [0.9, 0.999, 1e-8]
  assert OptimizerConfig(name="lion").b2 == 0.99
  assert OptimizerConfig(name="lion", b2=0.999).b2 == 0.999
  tx, own = make_optimizer(OptimizerConfig(name="lion", clip_norm=0.0)), optax.scale_by_lion()
  params = {"w": jnp.zeros(16)}
  states = [tx.init(params), own.init(params)]
  for number in range(4):
    grads = {"w": jax.random.normal(jax.random.key(number), (16,)) * (10.0 if number == 1 else 1.0)}
    one, states[0] = tx.update(grads, states[0], params)
    other, states[1] = own.update(grads, states[1], params)
    np.testing.assert_array_equal(one["w"], other["w"])


@pytest.mark.parametrize("name", NAMES)
def test_moments_of_weights_in_bfloat16_are_float32(name):
  params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
  tx = make_optimizer(OptimizerConfig(name=name, weight_decay=0.1))
  updates, state = tx.update(params, tx.init(params), params)
  assert {leaf.dtype.name for leaf in jax.tree.leaves((updates, state))} <= {"float32", "int32"}


def test_an_unknown_optimizer_names_the_known_ones():
  with pytest.raises(InputError, match=r"optimizer\.name='adam': use one of adamw, adafactor, lion, sgd"):
    make_optimizer(OptimizerConfig(name="adam"))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
  share = make_schedule(OptimizerConfig(schedule=schedule, warmup_steps=4), steps=10)
  np.testing.assert_allclose([share(step) for step in range(5)], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
  ("schedule", "half", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_the_rate_falls_to_its_final_scale(schedule, half, end):
  share = make_schedule(OptimizerConfig(schedule=schedule, warmup_steps=2, final_scale=0.1), steps=10)
  assert float(share(6)) == pytest.approx(half, rel=1e-6)
  assert float(share(10)) == pytest.approx(end, rel=1e-6)
  assert float(share(1000)) == pytest.approx(end, rel=1e-6)
  shares = np.array([share(step) for step in range(2, 11)])
  assert (np.diff(shares) <= 0).all()


def test_every_step_of_a_run_takes_a_share_of_the_rate():
  share = make_schedule(OptimizerConfig(warmup_steps=3), steps=7)
  assert all(0 < float(share(step)) <= 1 for step in range(7))


def test_the_schedule_can_be_traced():
  share = make_schedule(OptimizerConfig(warmup_steps=3), steps=7)
  assert float(jax.jit(share)(jnp.int32(5))) == pytest.approx(float(share(5)), rel=1e-6)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (OptimizerConfig(schedule="step"), r"optimizer\.schedule='step': use one of"),
    (OptimizerConfig(warmup_steps=10), r"optimizer\.warmup_steps=10 .* run\.steps=10"),
  ],
)
def test_a_schedule_that_can_not_be_is_an_input_error(config, message):
  with pytest.raises(InputError, match=message):
    make_schedule(config, steps=10)
