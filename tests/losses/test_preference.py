"""Preference losses: outside values, gradients, extremes. A loss without them, or without a source, fails here."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses import preference
from alignjax.losses.preference import LOSSES, Pair, dpo
from tests import golden

TRL_NAMES = {"sigmoid": dpo}  # TRL's loss_type -> ours


def is_plain(config):
  """Whether a golden case is one of our losses without TRL's modifiers of it (f-divergences, weights, ...)."""
  return (
    config["loss_type"] in list(TRL_NAMES)  # a list of several types is none of them
    and config["f_divergence_type"] == "reverse_kl"
    and config.get("ld_alpha") is None
    and not config.get("use_weighting")
    and not config.get("reference_free")
  )


SIDES = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def losses_and_gradient(config, numbers, **keywords):
  """Per-pair losses [P] and the gradient of their mean to [chosen, rejected] log-probabilities [2P], in float64."""
  with jax.enable_x64(True):
    pair = Pair(*(jnp.array(numbers[name], jnp.float64) for name in SIDES))
    per_pair = lambda pair: TRL_NAMES[config["loss_type"]](pair, beta=config["beta"], **keywords)
    gradient = jax.grad(lambda pair: per_pair(pair).mean())(pair)
    return np.asarray(per_pair(pair)), np.concatenate([gradient.chosen, gradient.rejected])


def tolerance(section, case):
  """Absolute and relative: 1e-6, or what float32 holds where the case is in float32."""
  value = 1e-5 if case.get("dtype", section["dtype"]) == "float32" else 1e-6
  return {"atol": value, "rtol": value}


@pytest.mark.parametrize("case", golden.cases("dpo", is_plain))
def test_golden_loss_and_gradient(case):
  section = golden.section("dpo")
  case = section["cases"][case]
  # TRL 1.x ignores label_smoothing for this loss; the legacy section has it.
  losses, gradient = losses_and_gradient(case["config"], case)
  # TRL masks before it sums: its gradient at a masked token is that of the sum, and ours is none.
  mask = np.array(section["inputs"]["completion_mask"])[:, 1:]
  per_token = case["grad_policy_per_token_logps"] * mask
  near = tolerance(section, case)
  np.testing.assert_allclose(losses, case["per_sequence_loss"], **near)
  np.testing.assert_allclose(losses.mean(), case["loss"], **near)
  np.testing.assert_allclose(gradient[:, None] * mask, per_token, **near)


@pytest.mark.parametrize("case", golden.cases("dpo_legacy_v0_23", is_plain))
def test_golden_loss_and_gradient_with_label_smoothing(case):
  section = golden.section("dpo_legacy_v0_23")
  case = section["cases"][case]
  smoothing = case["config"]["label_smoothing"]
  losses, gradient = losses_and_gradient(case["config"], section["inputs"], label_smoothing=smoothing)
  near = tolerance(section, case)
  np.testing.assert_allclose(losses, case["losses"], **near)
  np.testing.assert_allclose(gradient, case["grad_of_mean_chosen_then_rejected"], **near)


def random_pair(scale=3.0, shape=(4, 2)):
  rng = np.random.default_rng(0)
  return Pair(*(jnp.asarray(-scale * rng.uniform(size=shape)) for _ in range(4)))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
  with jax.enable_x64(True):
    pair, step = random_pair(), 1e-6
    total = lambda pair: LOSSES[name](pair, beta=0.3, label_smoothing=0.1).sum()
    gradient = jax.grad(total)(pair)
    rng = np.random.default_rng(1)
    along = Pair(*(rng.normal(size=x.shape) for x in pair))
    at = lambda t: float(total(jax.tree.map(lambda x, d: x + t * d, pair, along)))
    slope = sum(np.vdot(g, d) for g, d in zip(gradient, along, strict=True))
    assert (at(step) - at(-step)) / (2 * step) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ratio", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_finite_at_extreme_ratios(name, ratio, label_smoothing):
  zero = jnp.zeros(3)
  pair = Pair(zero + ratio, zero, zero, zero)
  total = lambda pair: LOSSES[name](pair, beta=1.0, label_smoothing=label_smoothing).sum()
  value, gradient = jax.value_and_grad(total)(pair)
  assert all(np.isfinite(x).all() for x in (value, *gradient))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_one_value_per_pair_and_its_name_is_its_functions(name):
  pair = random_pair(shape=(5, 3))
  assert LOSSES[name](pair, beta=0.1).shape == (5, 3)
  assert getattr(preference, name) is LOSSES[name]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_where_it_comes_from(name):
  last = inspect.getdoc(LOSSES[name]).splitlines()[-1]
  assert re.match(r"Source: \S.*\d{4}", last), f"{name}: the docstring's last line is no source"


def test_dpo_is_log2_when_policy_is_reference():
  logps = jnp.array([-3.0, -700.0, 0.0])
  pair = Pair(logps, 2 * logps, logps, 2 * logps)
  np.testing.assert_allclose(dpo(pair, beta=0.5), np.log(2), rtol=1e-7)
  np.testing.assert_allclose(dpo(pair, beta=0.5, label_smoothing=0.2), np.log(2), rtol=1e-6)


def test_dpo_with_half_of_the_labels_flipped_prefers_neither():
  pair = random_pair()
  swapped = Pair(pair.rejected, pair.chosen, pair.reference_rejected, pair.reference_chosen)
  one, other = (dpo(p, beta=0.3, label_smoothing=0.5) for p in (pair, swapped))
  np.testing.assert_allclose(one, other, rtol=1e-6)


def test_smoothed_dpo_is_least_where_the_model_believes_in_the_noise():
  # With a share e of flipped labels the minimum lies at sigmoid(beta * margin) = 1 - e.
  margin = jnp.log(0.9 / 0.1)
  slope = jax.grad(lambda m: dpo(Pair(m, 0.0, 0.0, 0.0), beta=1.0, label_smoothing=0.1))(margin)
  assert float(slope) == pytest.approx(0, abs=1e-6)
