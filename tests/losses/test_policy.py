"""Losses of sampled completions: gradients, extremes, masks, bounds. Outside values: test_golden_policy.py."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.aggregation import AGGREGATIONS, aggregate, count
from alignjax.losses.policy import LOSSES, make_tokens
from alignjax.losses.value import ppo_value_loss

BOUNDED = [name for name in LOSSES if name not in ("cispo", "sapo", "vespo")]  # a clipped token has no gradient
WEIGHTED = ("cispo", "vespo")  # gradients are not those of the value: the weight is a constant
# Three completions, a row without one, one of a single token.
MASK = np.array([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0] * 6, [0, 0, 0, 1, 0, 0]], np.float32)


def arrays(dtype=jnp.float32, drift=0.3):
  """(logps, old_logps, advantages, mask): the advantages of a row are equal."""
  rng = np.random.default_rng(0)
  logps = -rng.uniform(0.1, 3, MASK.shape) * MASK
  old = logps + drift * rng.normal(size=MASK.shape) * MASK
  advantages = np.array([1.5, -0.7, 0.4, 0.0, -1.0])[:, None] * MASK
  return tuple(jnp.asarray(x, dtype) for x in (logps, old, advantages, MASK))


def evaluate(name, logps, old, advantages, mask, correction=1.0, **hparams):
  spec = LOSSES[name]
  tokens = make_tokens(logps, old, advantages, mask, ratio=spec.ratio, correction=correction)
  return spec.loss(tokens, **hparams)


def whole(name, logps, old, advantages, mask, **hparams):
  """One number of all rows, as the loss aggregates."""
  counts = count(mask, mask.any(1), max_length=mask.shape[1])
  losses = evaluate(name, logps, old, advantages, mask, **hparams).losses
  return aggregate(losses, mask, LOSSES[name].aggregation, counts)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in (*WEIGHTED, "gspo_token")])
def test_gradients_equal_finite_differences(name):
  with jax.enable_x64(True):
    logps, *rest = arrays(jnp.float64)
    wide = {"epsilon": 0.2, "epsilon_high": 0.25} if "epsilon" in keywords(name) else {}
    total = lambda logps: whole(name, logps, *rest, **wide)
    along, step = np.random.default_rng(1).normal(size=MASK.shape), 1e-6
    slope = np.vdot(jax.grad(total)(logps), along)
    ahead, behind = total(logps + step * along), total(logps - step * along)
    assert (ahead - behind) / (2 * step) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_at_the_first_update_the_gradient_is_that_of_the_policy_gradient(name):
  logps, _, advantages, mask = arrays()
  total = lambda x: evaluate(name, x, jax.lax.stop_gradient(x), advantages, mask).losses.sum()
  # Of a completion's whole probability every token of it makes a loss.
  times = mask.sum(1, keepdims=True) if LOSSES[name].ratio == "product" else 1.0
  np.testing.assert_allclose(jax.grad(total)(logps), -advantages * times, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(evaluate(name, logps, logps, advantages, mask).clipped, 0)


@pytest.mark.parametrize("drift", [-1e4, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_finite_at_extreme_ratios(name, drift):
  logps, _, advantages, mask = arrays()
  value, gradient = jax.value_and_grad(lambda x: whole(name, x, logps, advantages, mask))(logps + drift * mask)
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()
  certain = lambda x: whole(name, x, 0 * logps, advantages, mask)
  assert np.isfinite(jax.grad(certain)(0 * logps)).all()


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_off_the_mask_and_empty_rows_change_nothing(name):
  logps, old, advantages, mask = arrays()
  spoilt = [jnp.where(mask > 0, x, np.nan) for x in (logps, old, advantages)]
  run = jax.value_and_grad(lambda x, *rest: whole(name, x, *rest, mask))
  (value, gradient), (other, of_other) = run(logps, old, advantages), run(*spoilt)
  np.testing.assert_array_equal(value, other)
  np.testing.assert_array_equal(gradient, of_other)
  assert not np.any(np.asarray(gradient)[MASK == 0])
  there = jnp.array([0, 1, 2, 4])
  np.testing.assert_allclose(value, whole(name, *(x[there] for x in (logps, old, advantages, mask))), rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_microbatches_add_up_to_the_minibatch(name):
  batch = arrays()
  counts = count(batch[-1], batch[-1].any(1), max_length=9)
  part = lambda rows: aggregate(
    evaluate(name, *(x[rows] for x in batch)).losses, batch[-1][rows], LOSSES[name].aggregation, counts
  )
  np.testing.assert_allclose(part(slice(None)), part(slice(0, 2)) + part(slice(2, None)), rtol=1e-6)


@pytest.mark.parametrize("name", BOUNDED)
def test_a_token_that_is_clipped_has_no_gradient_and_every_other_has(name):
  logps, old, advantages, mask = arrays(drift=1.0)
  bounds = {"epsilon": 0.2, "epsilon_high": 0.2}
  clipped = evaluate(name, logps, old, advantages, mask, **bounds).clipped
  gradient = jax.grad(lambda x: evaluate(name, x, old, advantages, mask, **bounds).losses.sum())(logps)
  assert 0 < clipped.sum() < mask.sum()
  np.testing.assert_array_equal(gradient == 0, (clipped == 1) | (mask == 0))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "vespo"])
def test_the_correction_for_the_sampler_is_a_factor(name):
  batch = arrays()
  weights = jnp.asarray(np.random.default_rng(2).uniform(0, 2, MASK.shape), jnp.float32)
  plain = evaluate(name, *batch).losses
  np.testing.assert_allclose(evaluate(name, *batch, correction=weights).losses, plain * weights, rtol=1e-6)


def test_the_correction_of_vespo_is_a_factor_of_the_ratio():
  logps, old, advantages, mask = arrays()
  weights = jnp.exp(logps - old)
  of_correction = evaluate("vespo", logps, logps, advantages, mask, correction=weights).losses
  np.testing.assert_allclose(of_correction, evaluate("vespo", logps, old, advantages, mask).losses, rtol=1e-5)


def test_dual_clip_bounds_the_loss_of_negative_advantages():
  logps = jnp.array([[0.0, 0.0]])
  old, advantages, mask = logps - 3.0, jnp.array([[-1.0, 1.0]]), jnp.ones((1, 2))
  losses = evaluate("ppo", logps, old, advantages, mask, delta=3.0).losses
  np.testing.assert_allclose(losses, [[3.0, -1.2]], rtol=1e-6)
  slope = jax.grad(lambda x: evaluate("ppo", x, old, advantages, mask, delta=3.0).losses.sum())(logps)
  np.testing.assert_array_equal(slope, 0)


def test_gspo_token_is_gspo_where_the_advantages_of_a_completion_are_equal():
  logps, *rest = arrays()
  bounds = {"epsilon": 0.2, "epsilon_high": 0.2}
  run = lambda name: jax.value_and_grad(lambda x: whole(name, x, *rest, **bounds))(logps)
  for one, other in zip(run("gspo"), run("gspo_token"), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_luspo_is_gspo_times_the_length():
  logps, old, advantages, mask = (x[:1] for x in arrays())
  bounds = {"epsilon": 0.2, "epsilon_high": 0.2}
  length = float(mask.sum())
  luspo, gspo = (whole(name, logps, old, advantages, mask, **bounds) for name in ("luspo", "gspo"))
  assert float(luspo) == pytest.approx(length * float(gspo), rel=1e-6)


def test_aggregations_by_hand():
  losses, mask = jnp.array([[1.0, 3, 9], [5, 9, 9], [9, 9, 9]]), jnp.array([[1.0, 1, 0], [1, 0, 0], [0, 0, 0]])
  counts = count(mask, jnp.array([1, 1, 1]), max_length=4)
  expected = {"token_mean": 9 / 3, "sequence_mean": (2 + 5 + 0) / 3, "sequence_sum": 9 / 3, "constant": 9 / 12}
  assert expected.keys() == AGGREGATIONS.keys()
  for how, value in expected.items():
    assert float(aggregate(losses, mask, how, counts)) == pytest.approx(value)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_a_minibatch_without_tokens_is_0(how):
  nothing = jnp.zeros((2, 3))
  counts = count(nothing, jnp.zeros(2), max_length=3)
  assert float(aggregate(jnp.full((2, 3), np.nan), nothing, how, counts)) == 0


def test_the_value_loss_has_no_gradient_beyond_its_bound_on_the_way_to_the_target():
  old, returns, mask = jnp.zeros((1, 4)), jnp.array([[1.0, 1, -1, 1]]), jnp.array([[1.0, 1, 1, 0]])
  values = jnp.array([[0.1, 0.5, 0.5, 0.5]])
  found = ppo_value_loss(values, old, returns, mask, epsilon=0.2)
  np.testing.assert_allclose(found.losses, [[0.405, 0.32, 1.125, 0]], rtol=1e-6)
  np.testing.assert_array_equal(found.clipped, [[0, 1, 0, 0]])
  slope = jax.grad(lambda v: ppo_value_loss(v, old, returns, mask, epsilon=0.2).losses.sum())(values)
  np.testing.assert_allclose(slope, [[-0.9, 0, 1.5, 0]], rtol=1e-6)
  free = ppo_value_loss(values, old, returns, mask, epsilon=np.inf)
  np.testing.assert_allclose(free.losses, jnp.square(values - returns) * mask / 2, rtol=1e-6)


def keywords(name):
  return [p.name for p in inspect.signature(LOSSES[name].loss).parameters.values() if p.kind is p.KEYWORD_ONLY]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_where_it_comes_from_and_every_keyword_has_a_default(name):
  loss = LOSSES[name].loss
  assert loss.__name__ == name
  assert re.search(r"^Source: \S.*\d{4}", inspect.getdoc(loss), re.MULTILINE), f"{name}: the docstring names no source"
  _, *rest = inspect.signature(loss).parameters.values()
  assert all(p.kind is p.KEYWORD_ONLY and isinstance(p.default, float) for p in rest)


@pytest.mark.parametrize("name", LOSSES)
def test_hyper_parameters_are_traced(name):
  batch, defaults = arrays(), inspect.signature(LOSSES[name].loss).parameters
  run = jax.jit(lambda hparams: whole(name, *batch, **hparams))
  values = {key: defaults[key].default for key in keywords(name)}
  np.testing.assert_allclose(run(values), whole(name, *batch), rtol=1e-5)
