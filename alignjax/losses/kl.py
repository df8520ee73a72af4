"""Estimates of KL(policy || reference) from the tokens that were sampled, in nats per token.

`KL_ESTIMATORS` take log_ratio = log p_policy - log p_reference of the sampled token. The value that an estimator has
and the gradient that it gives in a loss differ. So the right estimator depends on whether the KL is part of the reward
or of the loss (`PLACES`):

  name    value            gradient in a loss, in expectation, of the token's KL given the tokens before it
  k1      unbiased, noisy  0: it has no effect in a loss; it is right in the reward
  k2      biased           that of KL(policy || reference), if this very policy sampled the token
  k3      unbiased, >= 0   that of KL(reference || policy), the other direction: biased (as in GRPO's paper)
  rho_k1  unbiased, noisy  that of KL(policy || reference), whoever sampled the token
  rho_k3  unbiased, >= 0   the same, with less noise: for each token, rho times the gradient of k2

rho is the ratio policy / sampler of the token, and has a gradient. In a reward all of this is constant, and the
gradient is the policy gradient: only k1 then gives the gradient of the KL.

The gradient of a token's KL is not that of the completion's KL: a token also determines the states after it, and their
KL. In a loss no estimator here includes that. k1 in the reward does, if returns include the rewards of later tokens.
docs/online.md has the size of the difference in an example.

Source: Tang and Munos 2025 (arXiv:2506.09477); rho: DeepSeek-AI 2025, section 3.1 (arXiv:2512.02556)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_LOG_RATIO = 20.0  # nats; beyond, a ratio of probabilities is a straight line


def ratio(log_ratio: jax.Array) -> jax.Array:
  """Computes exp(log_ratio), continued by its tangent from MAX_LOG_RATIO on; any shape.

  Value and gradient stay finite, and the gradient keeps its direction; a clamp would have none.
  """
  return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO)) * (1 + jnp.maximum(log_ratio - MAX_LOG_RATIO, 0.0))


def k1(log_ratio: jax.Array) -> jax.Array:
  """Returns log_ratio: unbiased, can be negative; in a loss its gradient is noise around 0.

  Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html)
  """
  return log_ratio


def k2(log_ratio: jax.Array) -> jax.Array:
  """Computes log_ratio^2 / 2: biased upwards far from the reference; in a loss its gradient is that of the KL.

  Source: Schulman 2020, "Approximating KL divergence"; gradient: Tang and Munos 2025 (arXiv:2506.09477)
  """
  return jnp.square(log_ratio) / 2


def k3(log_ratio: jax.Array) -> jax.Array:
  """Computes exp(-log_ratio) - 1 + log_ratio: unbiased, never negative.

  Used as a loss, its gradient is that of KL(reference || policy), not of KL(policy || reference).

  Source: Schulman 2020, "Approximating KL divergence"; gradient: Tang and Munos 2025 (arXiv:2506.09477)
  """
  return ratio(-log_ratio) - 1 + log_ratio


KL_ESTIMATORS = {f.__name__: f for f in (k1, k2, k3)}


class Corrected(NamedTuple):
  """An estimator times rho, the ratio policy / sampler of the token, gradient included.

  Attributes:
    estimate: log-ratio -> the estimator.
    slope: log-ratio -> the derivative of rho * estimate with respect to the policy's log-probability, over rho.
  """

  estimate: Callable[[jax.Array], jax.Array]
  slope: Callable[[jax.Array], jax.Array]


# (rho k1)' = rho (k1 + 1), and (rho k3)' = rho (k3 + 1 - exp(-log_ratio)) = rho log_ratio. They are written out because
# the terms that cancel can be as large as exp(-log_ratio).
CORRECTED = {
  "rho_k1": Corrected(k1, lambda log_ratio: log_ratio + 1),
  "rho_k3": Corrected(k3, lambda log_ratio: log_ratio),
}

# The estimators that are meaningful in the reward and in the loss, the default first.
PLACES = {"reward": ("k1",), "loss": ("rho_k3", "k2", "rho_k1", "k3")}


def loss_kl(
  name: str,
  logps: jax.Array,
  reference_logps: jax.Array,
  sampler_logps: jax.Array,
  correction: jax.Array | float = 1.0,
) -> jax.Array:
  """Estimates the KL of each token in nats, a term to add to per-token losses; all arrays are [B, T].

  No mask is applied: the caller aggregates the tokens of the completion alone.

  Args:
    name: one of PLACES["loss"].
    logps: log-probabilities of the policy in nats; with a gradient.
    reference_logps: of the reference; constants.
    sampler_logps: of the sampling policy, the denominator of rho; constants. Unused without rho.
    correction: a factor of rho, if another program sampled than the one that computed sampler_logps. Unused without
      rho.

  Source: DeepSeek-AI 2025, section 3.1 (arXiv:2512.02556)
  """
  log_ratio = logps - reference_logps
  if name not in CORRECTED:
    return KL_ESTIMATORS[name](log_ratio)
  log_ratio = jax.lax.stop_gradient(log_ratio)
  rho = jax.lax.stop_gradient(ratio(logps - sampler_logps)) * correction
  value = rho * CORRECTED[name].estimate(log_ratio)
  slope = rho * CORRECTED[name].slope(log_ratio)
  return value + slope * (logps - jax.lax.stop_gradient(logps))


def sampled_kl(name: str, log_ratio: jax.Array) -> jax.Array:
  """Evaluates a KL estimator on tokens that the policy itself just sampled, where rho is 1; nats, in log_ratio's shape.

  Args:
    name: of KL_ESTIMATORS or CORRECTED.
    log_ratio: log p_policy - log p_reference of the sampled tokens.
  """
  if name in CORRECTED:
    return CORRECTED[name].estimate(log_ratio)
  return KL_ESTIMATORS[name](log_ratio)
