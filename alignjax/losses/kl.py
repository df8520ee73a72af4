"""Estimates of KL(policy || reference) from the tokens that the policy sampled, in nats per token.

Each takes log_ratio = log p_policy - log p_reference of the sampled token. What it estimates as a number, and what its
gradient does in a loss, differ:

  name  value            gradient in expectation, tokens sampled by this very policy
  k1    unbiased, noisy  0: as a loss it does nothing; put it into the reward, where it is right
  k2    biased           that of KL(policy || reference): unbiased
  k3    unbiased, >= 0   that of KL(reference || policy), the other direction: biased

Times the ratio policy / sampler of the token, gradient included, k1 and k3 are unbiased in both, also off-policy
(DeepSeek-AI 2025, section 3.1, arXiv:2512.02556): on the first update that changes the gradient, not the value.
"""

import jax
import jax.numpy as jnp

MAX_LOG_RATIO = 20.0  # nats; beyond, a ratio of probabilities is a straight line


def ratio(log_ratio: jax.Array) -> jax.Array:
  """exp(log_ratio), continued by its tangent from MAX_LOG_RATIO on.

  So value and gradient stay finite, and the gradient keeps its direction, where a clamp would have none.
  """
  return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO)) * (1 + jnp.maximum(log_ratio - MAX_LOG_RATIO, 0.0))


def k1(log_ratio: jax.Array) -> jax.Array:
  """log_ratio: unbiased, may be negative; in a loss its gradient is noise around 0.

  Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html)
  """
  return log_ratio


def k2(log_ratio: jax.Array) -> jax.Array:
  """log_ratio^2 / 2: biased upwards far from the reference; in a loss its gradient is that of the KL.

  Source: Schulman 2020, "Approximating KL divergence"; gradient: Tang and Munos 2025 (arXiv:2506.09477)
  """
  return jnp.square(log_ratio) / 2


def k3(log_ratio: jax.Array) -> jax.Array:
  """exp(-log_ratio) - 1 + log_ratio: unbiased, never negative; in a loss its gradient is the other direction's.

  Source: Schulman 2020, "Approximating KL divergence"; gradient: Tang and Munos 2025 (arXiv:2506.09477)
  """
  return ratio(-log_ratio) - 1 + log_ratio


KL_ESTIMATORS = {f.__name__: f for f in (k1, k2, k3)}
