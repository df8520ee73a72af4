"""Preference losses as functions of arrays: gradients, extremes, sources. Outside values: test_golden_preference.py."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses import preference, reference_free
from alignjax.losses.divergence import DIVERGENCES
from alignjax.losses.pair import make_pair
from alignjax.losses.preference import dpo, ipo
from alignjax.losses.rank import of_equal_rank

OBJECTIVES = preference.LOSSES | reference_free.LOSSES
LOSSES = {name: objective.loss for name, objective in OBJECTIVES.items()}
COUPLED = {name: objective.match for name, objective in OBJECTIVES.items() if objective.match}
DIVERGENT = [name for name, objective in OBJECTIVES.items() if objective.divergence]
# Defaults are the papers', for sums over hundreds of tokens; these suit the numbers here.
KEYWORDS = {"beta": 0.3, "label_smoothing": 0.1}


def keywords(name, **values):
  """Those of `values` that the loss takes."""
  known = inspect.signature(LOSSES[name]).parameters
  return {key: value for key, value in (KEYWORDS | values).items() if key in known}


def whole(name, logps, score=lambda ratio: ratio, exists=None, **values):
  """Per-pair losses of (chosen, rejected, reference_chosen, reference_rejected), all of one shape: a whole batch."""
  lengths = 1.0 + jnp.arange(logps[0].size, dtype=logps[0].dtype).reshape(logps[0].shape)
  if exists is not None:
    lengths *= exists
  pair = make_pair(*logps, chosen_length=lengths, rejected_length=lengths[::-1], score=score)
  if name in COUPLED:
    pair = pair._replace(**COUPLED[name](pair, jnp.ones_like(lengths) if exists is None else exists))
  return LOSSES[name](pair, **keywords(name, **values))


def random_logps(scale=3.0, shape=(4, 2)):
  """Policy and reference log-probabilities, the reference near the policy."""
  rng = np.random.default_rng(0)
  logps = -scale * (1 + rng.uniform(size=(4, *shape)))
  return tuple(jnp.asarray(x) for x in logps)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name, divergence):
  if divergence != "reverse_kl" and name not in DIVERGENT:
    pytest.skip("a loss of ratios, which no divergence changes")
  with jax.enable_x64(True):
    logps, step = random_logps(), 1e-6
    total = lambda logps: whole(name, logps, DIVERGENCES[divergence]).sum()
    gradient = jax.grad(total)(logps)
    rng = np.random.default_rng(1)
    along = [rng.normal(size=x.shape) for x in logps[:2]] + [np.zeros_like(x) for x in logps[2:]]
    at = lambda t: float(total(tuple(x + t * d for x, d in zip(logps, along, strict=True))))
    slope = sum(np.vdot(g, d) for g, d in zip(gradient, along, strict=True))
    assert (at(step) - at(-step)) / (2 * step) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [1e-3, 0.1])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_finite_at_extreme_ratios(name, beta, label_smoothing):
  extreme = jnp.array([-1e4, -1.0, 0.0, 1.0, 1e4])
  chosen, rejected = (x.ravel() for x in jnp.meshgrid(extreme, extreme))
  for reference in (0.0, -1e4):
    logps = (chosen + reference, rejected + reference, reference + 0 * chosen, reference + 0 * rejected)
    if name in reference_free.LOSSES:
      logps = tuple(jnp.minimum(x, 0.0) for x in logps)  # they are log-probabilities, whatever the reference
    total = lambda logps: whole(name, logps, beta=beta, label_smoothing=label_smoothing).sum()
    value, gradient = jax.value_and_grad(total)(logps)
    assert all(np.isfinite(x).all() for x in (value, *gradient))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", DIVERGENT)
def test_divergences_are_finite_at_extreme_ratios(name, divergence):
  if name == "ipo" and divergence in ("forward_kl", "alpha"):
    pytest.skip("the square of an exponential leaves float32; train_step skips such a step")
  extreme = jnp.array([-1e4, 0.0, 1e4])
  chosen, rejected = (x.ravel() for x in jnp.meshgrid(extreme, extreme))
  logps = (chosen, rejected, 0 * chosen, 0 * rejected)
  value, gradient = jax.value_and_grad(lambda x: whole(name, x, DIVERGENCES[divergence]).sum())(logps)
  assert all(np.isfinite(x).all() for x in (value, *gradient))


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_that_is_not_there_changes_no_other_and_is_finite(name):
  logps, exists = random_logps(shape=(4,)), jnp.array([1.0, 0, 1, 1])
  there = [0, 2, 3]
  without = tuple(x * exists for x in logps)
  pair_losses = lambda logps: whole(name, logps, exists=exists)
  losses, gradient = jax.value_and_grad(lambda x: (exists * pair_losses(x)).sum())(without)
  assert np.isfinite(pair_losses(without)).all()
  assert all(np.isfinite(x).all() for x in (losses, *gradient))
  assert not any(g[1] for g in gradient)
  if name in COUPLED:
    alone = whole(name, tuple(x[jnp.array(there)] for x in logps))
    np.testing.assert_allclose(pair_losses(without)[jnp.array(there)], alone, rtol=1e-6)


@pytest.mark.parametrize("logp", [0.0, -1e-9, -1e-4, -30.0, -1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_completions_of_one_token_are_finite_however_certain(name, logp):
  total = lambda chosen: whole(name, (chosen, *(jnp.full(1, -2.0) for _ in range(3)))).sum()
  value, gradient = jax.value_and_grad(total)(jnp.full(1, logp))
  assert np.isfinite([value, *gradient]).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_one_value_per_pair_in_its_dtype_and_its_name_is_its_functions(name):
  with jax.enable_x64(True):
    assert whole(name, random_logps(shape=(5, 3))).shape == (5, 3)
    assert whole(name, random_logps()).dtype == jnp.float64
    assert whole(name, tuple(x.astype(jnp.float32) for x in random_logps())).dtype == jnp.float32
  module = preference if name in preference.LOSSES else reference_free
  assert getattr(module, name) is LOSSES[name]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_where_it_comes_from_and_every_keyword_has_a_default(name):
  last = inspect.getdoc(LOSSES[name]).splitlines()[-1]
  assert re.match(r"Source: \S.*\d{4}", last), f"{name}: the docstring's last line is no source"
  _, *rest = inspect.signature(LOSSES[name]).parameters.values()
  assert all(p.kind is p.KEYWORD_ONLY and isinstance(p.default, float) for p in rest)


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_of_the_whole_batch_states_its_scope(name):
  assert re.search(r"[Ss]cope", inspect.getdoc(LOSSES[name]))


@pytest.mark.parametrize("name", COUPLED)
def test_the_order_of_the_pairs_does_not_matter_to_the_batch(name):
  logps = random_logps(shape=(7,))
  shuffled = tuple(x[jnp.array([3, 1, 6, 0, 2, 5, 4])] for x in logps)
  np.testing.assert_allclose(whole(name, logps).mean(), whole(name, shuffled).mean(), rtol=1e-6)


def test_of_equal_rank():
  values, others = jnp.array([[3.0, 1.0], [9.0, 2.0]]), jnp.array([[10.0, 40.0], [0.0, 20.0]])
  exists = jnp.array([[1, 1], [0, 1]])
  np.testing.assert_array_equal(of_equal_rank(values, others, exists), [[40, 10], [0, 20]])
  ties = of_equal_rank(jnp.zeros(4), jnp.arange(4.0), jnp.ones(4))
  np.testing.assert_array_equal(np.sort(ties), np.arange(4.0))


def test_dpo_is_log2_when_policy_is_reference():
  logps = jnp.array([-3.0, -700.0, 0.0])
  pair = make_pair(logps, 2 * logps, logps, 2 * logps)
  np.testing.assert_allclose(dpo(pair, beta=0.5), np.log(2), rtol=1e-7)
  np.testing.assert_allclose(dpo(pair, beta=0.5, label_smoothing=0.2), np.log(2), rtol=1e-6)


def test_dpo_with_half_of_the_labels_flipped_prefers_neither():
  chosen, rejected, reference_chosen, reference_rejected = random_logps()
  one = dpo(make_pair(chosen, rejected, reference_chosen, reference_rejected), beta=0.3, label_smoothing=0.5)
  other = dpo(make_pair(rejected, chosen, reference_rejected, reference_chosen), beta=0.3, label_smoothing=0.5)
  np.testing.assert_allclose(one, other, rtol=1e-6)


def test_smoothed_dpo_is_least_where_the_model_believes_in_the_noise():
  # With a share e of flipped labels the minimum lies at sigmoid(beta * margin) = 1 - e.
  margin = jnp.log(0.9 / 0.1)
  slope = jax.grad(lambda m: dpo(make_pair(m, 0 * m), beta=1.0, label_smoothing=0.1))(margin)
  assert float(slope) == pytest.approx(0, abs=1e-6)


def test_robust_is_on_average_over_flipped_labels_dpo():
  chosen, rejected, *reference = random_logps()
  loss = lambda name, *logps: whole(name, logps, label_smoothing=0.2 if name == "robust" else 0.0)
  right, flipped = loss("robust", chosen, rejected, *reference), loss("robust", rejected, chosen, *reference[::-1])
  np.testing.assert_allclose(0.8 * right + 0.2 * flipped, loss("dpo", chosen, rejected, *reference), rtol=1e-5)


def test_length_power_0_makes_ipo_one_of_sums():
  chosen, rejected = jnp.array([-6.0]), jnp.array([-8.0])
  pair = make_pair(chosen, rejected, chosen_length=jnp.array([3.0]), rejected_length=jnp.array([2.0]))
  assert float(ipo(pair, beta=0.5)[0]) == pytest.approx((-2 + 4 - 1) ** 2)
  assert float(ipo(pair, beta=0.5, length_power=0.0)[0]) == pytest.approx((-6 + 8 - 1) ** 2)


@pytest.mark.parametrize(("a", "limit"), [(0.0, "forward_kl"), (1.0, "reverse_kl"), (1 + 1e-4, "reverse_kl")])
def test_alpha_divergence_has_forward_and_reverse_kl_as_its_ends(a, limit):
  ratios = jnp.array([-2.0, -0.1, 0.0, 0.3, 3.0])
  got = DIVERGENCES["alpha"](ratios, divergence_alpha=a)
  np.testing.assert_allclose(got, DIVERGENCES[limit](ratios), rtol=1e-3, atol=1e-6)


def test_alphapo_at_alpha_0_is_simpo():
  logps = random_logps()
  near_zero = whole("alphapo", logps, alpha=1e-8, gamma=0.5)
  np.testing.assert_allclose(near_zero, whole("simpo", logps, gamma=0.5), rtol=1e-6)
