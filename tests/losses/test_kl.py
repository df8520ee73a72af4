"""Estimators of the KL: their bias, exactly, by summing over a small vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.kl import KL_ESTIMATORS, MAX_LOG_RATIO, ratio

LOGITS, REFERENCE, SAMPLER = (jnp.asarray(np.random.default_rng(seed).normal(size=7), jnp.float32) for seed in range(3))


def kl(logits, other):
  logps, others = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
  return jnp.sum(jnp.exp(logps) * (logps - others))


def expected(estimator, sampler, corrected):
  """The mean over tokens of `sampler` as a function of the policy's logits, sampler held fixed."""

  def mean(logits):
    logps = jax.nn.log_softmax(logits)
    estimate = KL_ESTIMATORS[estimator](logps - jax.nn.log_softmax(REFERENCE))
    weight = ratio(logps - jax.nn.log_softmax(sampler)) if corrected else 1.0
    return jnp.sum(jax.nn.softmax(sampler) * estimate * weight)

  return mean


def same(one, other):
  np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_values_of_k1_and_k3_are_unbiased(estimator):
  same(expected(estimator, LOGITS, False)(LOGITS), kl(LOGITS, REFERENCE))


def test_the_gradients_are_those_that_the_table_says():
  gradient = lambda name: jax.grad(expected(name, LOGITS, False))(LOGITS)
  same(gradient("k1"), jnp.zeros(7))
  same(gradient("k2"), jax.grad(kl)(LOGITS, REFERENCE))
  same(gradient("k3"), jax.grad(lambda logits: kl(REFERENCE, logits))(LOGITS))


@pytest.mark.parametrize("sampler", [LOGITS, SAMPLER])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_corrected_by_the_ratio_value_and_gradient_are_unbiased_whoever_sampled(estimator, sampler):
  mean = expected(estimator, sampler, True)
  same(mean(LOGITS), kl(LOGITS, REFERENCE))
  same(jax.grad(mean)(LOGITS), jax.grad(kl)(LOGITS, REFERENCE))


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_estimates_are_finite_and_pull_towards_the_reference_at_extreme_ratios(estimator):
  value, slope = jax.vmap(jax.value_and_grad(KL_ESTIMATORS[estimator]))(jnp.array([-1e4, 0.0, 1e4]))
  assert np.isfinite([value, slope]).all()
  assert value[1] == 0
  if estimator != "k1":
    assert slope[0] < 0 < slope[2]
    assert slope[1] == 0


def test_the_ratio_is_the_exponential_up_to_its_bound_and_smooth_there():
  np.testing.assert_allclose(ratio(jnp.array([-3.0, 0.0, 3.0])), np.exp([-3.0, 0, 3]), rtol=1e-6)
  slope = jax.grad(ratio)
  assert float(slope(MAX_LOG_RATIO + 1e-3)) == pytest.approx(float(slope(MAX_LOG_RATIO - 1e-3)), rel=2e-3)
  assert float(slope(1e4)) == pytest.approx(np.exp(MAX_LOG_RATIO), rel=1e-5)
