"""The Bradley-Terry loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.reward import bradley_terry
from tests import golden


@pytest.mark.parametrize("case", golden.cases("reward_bt", lambda config: True))
def test_golden_loss_and_gradient(case):
  section = golden.section("reward_bt")
  given, case = section["inputs"], section["cases"][case]
  config = case["config"]
  with jax.enable_x64(True):
    sides = jnp.array([given["rewards_chosen"], given["rewards_rejected"]]) * config["scale"]
    loss = lambda sides: bradley_terry(
      *sides,
      margin=jnp.array(given["margin"]) if config["margin"] else 0.0,
      center_coefficient=config["center_rewards_coefficient"] or 0.0,
    ).mean()
    value, gradient = jax.value_and_grad(loss)(sides)
  expected = case["grad_rewards_chosen_then_rejected"]
  np.testing.assert_allclose(value, case["loss"], rtol=1e-6)
  np.testing.assert_allclose(gradient.ravel(), expected, atol=1e-6, rtol=1e-6)


def test_golden_loss_of_a_real_model():
  section = golden.section("reward_bt_end_to_end")
  chosen, rejected = np.split(np.array(section["outputs"]["pooled_rewards"]), 2)
  loss = bradley_terry(chosen, rejected).mean()
  assert float(loss) == pytest.approx(section["outputs"]["loss"], rel=1e-6)


def test_equal_rewards_cost_log2():
  np.testing.assert_allclose(bradley_terry(jnp.ones(3), jnp.ones(3)), np.log(2), rtol=1e-7)


def test_a_margin_shifts_the_difference():
  shifted = bradley_terry(jnp.float32(2.0), jnp.float32(1.0), margin=3.0)
  assert float(shifted) == pytest.approx(float(bradley_terry(jnp.float32(-2.0), jnp.float32(0.0))))


def test_only_centring_fixes_the_level_of_the_rewards():
  chosen, rejected = jnp.array([2.0]), jnp.array([1.0])
  level = lambda c: jax.grad(lambda shift: bradley_terry(chosen + shift, rejected + shift, center_coefficient=c).sum())(
    0.0
  )
  assert float(level(0.0)) == pytest.approx(0, abs=1e-7)
  assert float(level(0.01)) == pytest.approx(0.01 * 2 * 3 * 2, rel=1e-5)


@pytest.mark.parametrize("difference", [-1e4, 0.0, 1e4])
def test_loss_and_gradient_are_finite_at_extreme_rewards(difference):
  loss = lambda chosen: bradley_terry(chosen, 0.0, center_coefficient=0.01)
  value, gradient = jax.value_and_grad(loss)(jnp.float32(difference))
  assert np.isfinite(value)
  assert np.isfinite(gradient)


def test_gradients_equal_finite_differences():
  with jax.enable_x64(True):
    x, step = jnp.array([0.7, -1.3, 0.2]), 1e-6
    loss = lambda x: bradley_terry(x[0], x[1], margin=x[2], center_coefficient=0.1)
    gradient = jax.grad(loss)(x)
    for i, unit in enumerate(np.eye(3)):
      slope = (loss(x + step * unit) - loss(x - step * unit)) / (2 * step)
      assert float(slope) == pytest.approx(float(gradient[i]), rel=1e-7)
