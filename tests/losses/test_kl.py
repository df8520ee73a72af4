"""Estimators of the KL: their bias, exactly, by summing over a small vocabulary."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.kl import CORRECTED, KL_ESTIMATORS, MAX_LOG_RATIO, PLACES, loss_kl, ratio, sampled_kl

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


@pytest.mark.parametrize("sampler", [LOGITS, SAMPLER])
@pytest.mark.parametrize("name", CORRECTED)
def test_corrected_estimators_have_the_value_and_gradient_of_the_kl_whoever_sampled(name, sampler):
  of_sampler, reference = jax.nn.log_softmax(sampler), jax.nn.log_softmax(REFERENCE)

  def mean(logits):
    return jnp.sum(jnp.exp(of_sampler) * loss_kl(name, jax.nn.log_softmax(logits), reference, of_sampler))

  same(mean(LOGITS), kl(LOGITS, REFERENCE))
  same(jax.grad(mean)(LOGITS), jax.grad(kl)(LOGITS, REFERENCE))


def test_the_corrected_k3_is_the_ratio_times_the_gradient_of_k2_without_cancellation():
  """exp(20) - exp(20) + 20 would leave a rounding error of 32 in float32."""
  log_ratio = jnp.array([-20.0, -1e-3, 0.5, 20.0])
  slope = jax.grad(lambda logps: jnp.sum(loss_kl("rho_k3", logps, logps * 0, jnp.array([-20.0, -1e-3, 0.0, 20.0]))))
  same(slope(log_ratio), log_ratio * jnp.array([1, 1, np.exp(0.5), 1]))
  twice = jax.grad(lambda logps: jnp.sum(loss_kl("rho_k3", logps, logps * 0, logps * 0 + log_ratio, correction=2.0)))
  same(twice(log_ratio), 2 * log_ratio)


def test_an_estimate_of_what_was_just_sampled_is_that_of_the_loss():
  logps, reference = LOGITS, REFERENCE
  for name in PLACES["loss"]:
    same(loss_kl(name, logps, reference, logps), sampled_kl(name, logps - reference))


# --- whole completions -----------------------------------------------------------------------------------------------

LETTERS = LENGTH = 3
CONTEXTS = {c: i for i, c in enumerate(c for n in range(LENGTH) for c in itertools.product(range(LETTERS), repeat=n))}
TEXTS = np.array(list(itertools.product(range(LETTERS), repeat=LENGTH)))
STATES = np.array([[CONTEXTS[tuple(text[:t])] for t in range(LENGTH)] for text in TEXTS])
OF_KL = {"k2": 0.300, "rho_k1": 0.300, "rho_k3": 0.300, "k3": 0.616}  # docs/online.md


def of_gradient(estimate):
  """|gradient - that of the KL of completions| / |that|, over all texts of three letters; a policy for each context."""
  rng = np.random.default_rng(0)
  policy, reference = (jnp.asarray(rng.normal(size=(len(CONTEXTS), LETTERS)), jnp.float32) for _ in range(2))
  logps = lambda logits: jax.nn.log_softmax(logits)[STATES, TEXTS]  # [texts, LENGTH]
  chance = lambda logits: jnp.exp(logps(logits).sum(axis=1))
  of_texts = lambda logits: jnp.sum(chance(logits) * (logps(logits) - logps(reference)).sum(axis=1))
  true, sampled = jax.grad(of_texts)(policy), chance(policy)
  found = jax.grad(lambda logits: sampled @ estimate(logps(logits), logps(reference), logps(policy)).sum(axis=1))(
    policy
  )
  return float(jnp.linalg.norm(found - true) / jnp.linalg.norm(true))


@pytest.mark.parametrize("name", PLACES["loss"])
def test_in_a_loss_the_gradient_is_off_that_of_whole_completions_by_what_the_docs_say(name):
  assert of_gradient(lambda logps, reference, old: loss_kl(name, logps, reference, old)) == pytest.approx(
    OF_KL[name], abs=1e-3
  )


def test_k1_in_the_reward_has_the_gradient_of_whole_completions_and_the_others_have_not():
  def paid(name):
    constant = jax.lax.stop_gradient
    cost = lambda logps, reference: constant(sampled_kl(name, logps - reference).sum(axis=1, keepdims=True))
    return of_gradient(lambda logps, reference, old: cost(logps, reference) * logps)

  assert PLACES["reward"] == ("k1",)
  assert paid("k1") < 1e-5
  assert paid("k2") == pytest.approx(0.387, abs=1e-3)
  assert paid("k3") == pytest.approx(0.570, abs=1e-3)
  assert of_gradient(lambda logps, reference, old: KL_ESTIMATORS["k1"](logps - reference)) == pytest.approx(1, abs=1e-4)
