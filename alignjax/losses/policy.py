"""Losses of sampled completions and their advantages: per-token arrays in, per-token losses out.

A new loss is one function of `(tokens, *, epsilon=..., ...)` and a line in the dict at the foot, which also says of
what its ratio is and how its per-token losses become one number (`aggregation`). Its keywords and their defaults are
the hyper-parameters that a config may set. Nothing here takes a mean over what it happens to see.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignjax.losses.kl import ratio

INFINITY = float("inf")


class Tokens(NamedTuple):
  """What is known of sampled tokens; all [B, T], 0 off the mask. See `make_tokens`.

  Attributes:
    logps: of the policy, in nats; with log_ratio the only field with a gradient.
    log_ratio: log p_policy - log p_old, in nats, of what `RATIOS` says: the token, or all of its completion.
    advantages: constants.
    mask: 1.0 on the completion.
    correction: the weight for having been sampled by another program than p_old, a constant; see `correction`.
  """

  logps: jax.Array
  log_ratio: jax.Array
  advantages: jax.Array
  mask: jax.Array
  correction: jax.Array

  @property
  def ratio(self) -> jax.Array:
    """exp(log_ratio): importance weights, with a gradient."""
    return ratio(self.log_ratio)


class TokenLosses(NamedTuple):
  """What a loss returns, both [B, T].

  Attributes:
    losses: per token; `aggregation.aggregate` makes one number of them.
    clipped: 1.0 where the gradient is cut, above where the advantage is positive and below where it is negative.
  """

  losses: jax.Array
  clipped: jax.Array


def make_tokens(
  logps: jax.Array,
  old_logps: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  ratio: str = "token",
  correction: jax.Array | float = 1.0,
) -> Tokens:
  """The Tokens of log-probabilities, advantages and mask, all [B, T]; pass logps as old_logps for a first update.

  Args:
    logps: of the policy, in nats.
    old_logps: of the policy that sampled; a constant.
    advantages: [B, T], or [B] or [B, 1] if one for each completion; constants.
    mask: 1 on the completion.
    ratio: one of `RATIOS`.
    correction: of `correction.sampling_correction`.
  """
  there = mask > 0
  constant = jax.lax.stop_gradient
  advantages = advantages[:, None] if advantages.ndim == 1 else advantages
  wide = lambda x: jnp.where(there, constant(x), 0).astype(logps.dtype)
  log_ratio = jnp.where(there, logps - constant(old_logps), 0)
  return Tokens(
    logps=jnp.where(there, logps, 0),
    log_ratio=RATIOS[ratio](log_ratio, wide(jnp.ones_like(logps))),
    advantages=wide(advantages),
    mask=wide(jnp.ones_like(logps)),
    correction=wide(correction),
  )


def row_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
  """The sum over a row's mask, at each of its tokens: [B, T] -> [B, T]."""
  return mask * jnp.sum(mask * values, axis=1, keepdims=True)


def row_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """The mean over a row's mask, at each of its tokens: [B, T] -> [B, T]; 0 in an empty row."""
  return row_sum(values, mask) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)


def sequence_token(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
  """The value of the row's mean with the gradient of the token's own: advantages may then differ within a row."""
  return jax.lax.stop_gradient(row_mean(log_ratio, mask) - log_ratio) + log_ratio


# Of what the ratio is: the token; the completion, as a geometric mean over its tokens; the same with each token's own
# gradient; the completion's probability.
RATIOS = {
  "token": lambda log_ratio, mask: log_ratio,
  "sequence": row_mean,
  "sequence_token": sequence_token,
  "product": row_sum,
}


def surrogate(tokens: Tokens, epsilon, epsilon_high, delta) -> TokenLosses:
  """-min(min(rho, delta) A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) times the correction, rho the ratio."""
  rho, advantages = tokens.ratio, tokens.advantages
  free = jnp.minimum(rho, delta) * advantages
  held = jnp.clip(rho, 1 - epsilon, 1 + epsilon_high) * advantages
  clipped = cut(rho < 1 - epsilon, rho > 1 + epsilon_high, advantages)
  return TokenLosses(-jnp.minimum(free, held) * tokens.correction, clipped)


def cut(below: jax.Array, above: jax.Array, advantages: jax.Array) -> jax.Array:
  """1.0 where the ratio is beyond the bound that the sign of the advantage pushes it to."""
  return (below & (advantages < 0) | above & (advantages > 0)).astype(advantages.dtype)


def ppo(tokens: Tokens, *, epsilon=0.2, epsilon_high=0.2, delta=INFINITY) -> TokenLosses:
  """`surrogate`; delta > 1 + epsilon_high is the dual clip: with a negative advantage the loss ends at -delta A.

  Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347); delta: Ye et al. 2020, eq. 5 (arXiv:1912.09729)
  """
  return surrogate(tokens, epsilon, epsilon_high, delta)


def ppo_value_loss(
  values: jax.Array,
  old_values: jax.Array,
  returns: jax.Array,
  mask: jax.Array,
  *,
  epsilon: jax.Array | float = 0.2,
) -> TokenLosses:
  """max((V - R)^2, (clip(V, V_old - epsilon, V_old + epsilon) - R)^2) / 2, all [B, T]; epsilon = inf clips nothing.

  Source: Schulman et al. 2017, in the authors' code (arXiv:1707.06347); Huang et al. 2024 (arXiv:2403.17031)
  """
  old_values, returns = jax.lax.stop_gradient((old_values, returns))
  near = jnp.clip(values, old_values - epsilon, old_values + epsilon)
  free, held = jnp.square(values - returns), jnp.square(near - returns)
  there = mask > 0
  losses = jnp.where(there, jnp.maximum(free, held) / 2, 0)
  return TokenLosses(losses, (there & (held > free)).astype(values.dtype))


class PolicyLoss(NamedTuple):
  """A loss of the family.

  Attributes:
    loss: (tokens, *, hyper-parameters) -> TokenLosses.
    ratio: of `RATIOS`, for `make_tokens`.
    aggregation: of `aggregation.AGGREGATIONS`.
  """

  loss: Callable[..., TokenLosses]
  ratio: str
  aggregation: str


LOSSES = {
  "ppo": PolicyLoss(ppo, "token", "token_mean"),
}
