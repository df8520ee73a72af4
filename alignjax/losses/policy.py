"""Losses of sampled completions and their advantages: per-token arrays in, per-token losses out.

A new loss is one function of `(tokens, *, epsilon: Positive = ..., ...)` and a line in the dict at the foot, which also
says of what its ratio is and how its per-token losses become one number (`aggregation`). Its keywords, their ranges
(`alignjax.system.ranges`) and defaults are the hyper-parameters that a config may set. Nothing here takes a mean over
what it happens to see.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignjax.losses.aggregation import AGGREGATIONS
from alignjax.losses.kl import MAX_LOG_RATIO, ratio
from alignjax.losses.objective import record_of
from alignjax.system.ranges import NonNegative, Positive

MIN_WEIGHT = 1e-8  # of a completion in `vespo`


class Tokens(NamedTuple):
  """The arrays that losses of sampled tokens read; all [B, T], 0 off the mask. See `make_tokens`.

  Attributes:
    logps: of the policy, in nats; with log_ratio the only field with a gradient.
    log_ratio: log p_policy - log p_old, in nats, of what `RATIOS` says: the token, or all of its completion.
    advantages: constants.
    mask: 1.0 on the completion.
    correction: the weight for having been sampled by another program than p_old, a constant, which a loss applies;
      1.0 if there was none. See `token_weight.sampling_correction`.
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
  """The result of a loss, both fields [B, T].

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
  """Builds the Tokens that policy losses read; arrays are [B, T]. Pass logps as old_logps for a first update.

  Everything is 0 off the mask, whatever the arrays hold there.

  Args:
    logps: of the policy, in nats; with a gradient.
    old_logps: of the policy that sampled; a constant.
    advantages: [B, T], or [B] or [B, 1] if one for each completion; constants.
    mask: 1 on the completion.
    ratio: one of `RATIOS`: what the loss needs is in its record in `LOSSES`.
    correction: [B, T] of `token_weight.sampling_correction`; 1.0 if p_old is what sampled.
  """
  there = mask > 0
  constant = jax.lax.stop_gradient
  advantages = advantages[:, None] if advantages.ndim == 1 else advantages

  def wide(x):
    return jnp.where(there, constant(x), 0).astype(logps.dtype)

  log_ratio = jnp.where(there, logps - constant(old_logps), 0)
  return Tokens(
    logps=jnp.where(there, logps, 0),
    log_ratio=RATIOS[ratio](log_ratio, wide(jnp.ones_like(logps))),
    advantages=wide(advantages),
    mask=wide(jnp.ones_like(logps)),
    correction=wide(correction),
  )


def row_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Sums over a row's mask, the sum at each of its tokens: [B, T] -> [B, T]."""
  return mask * jnp.sum(mask * values, axis=1, keepdims=True)


def row_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Averages over a row's mask, the mean at each of its tokens: [B, T] -> [B, T]; 0 in an empty row."""
  return row_sum(values, mask) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)


def sequence_token(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the row's mean with the gradient of the token's own value: advantages may then differ within a row."""
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
  """Computes PPO's clipped loss of each token: TokenLosses (losses, clipped), both [B, T].

  With rho = tokens.ratio and A = tokens.advantages:
    loss = -min(min(rho, delta) A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) * tokens.correction

  Args:
    tokens: of `make_tokens`; its ratio is of a token or of a whole completion, as it was made.
    epsilon, epsilon_high: how far the ratio may fall below and rise above 1.
    delta: the largest ratio where A < 0 (two-sided clipping); 0 is no bound, because a config is JSON, without
      infinity.
  """
  rho, advantages = tokens.ratio, tokens.advantages
  free = jnp.minimum(rho, jnp.where(jnp.asarray(delta) > 0, delta, jnp.inf)) * advantages
  held = jnp.clip(rho, 1 - epsilon, 1 + epsilon_high) * advantages
  clipped = cut(rho < 1 - epsilon, rho > 1 + epsilon_high, advantages)
  return TokenLosses(-jnp.minimum(free, held) * tokens.correction, clipped)


def cut(below: jax.Array | bool, above: jax.Array, advantages: jax.Array) -> jax.Array:
  """Returns 1.0 where the ratio is beyond the bound that the sign of the advantage pushes it to, else 0.0.

  Args:
    below, above: where the ratio is below its lower, above its upper bound; the gradient is cut where the advantage is
      negative, or positive.
    advantages: [B, T].
  """
  return (below & (advantages < 0) | above & (advantages > 0)).astype(advantages.dtype)


def ppo(
  tokens: Tokens, *, epsilon: Positive = 0.2, epsilon_high: Positive = 0.2, delta: NonNegative = 0.0
) -> TokenLosses:
  """Computes `surrogate` of each token, mean over all tokens; the entropy bonus is the caller's.

  delta > 1 + epsilon_high is the dual clip: where the advantage is negative, the loss goes no higher than -delta A.

  Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347); dual clip: Ye et al. 2020, eq. 5 (arXiv:1912.09729)
  """
  return surrogate(tokens, epsilon, epsilon_high, delta)


def grpo(
  tokens: Tokens, *, epsilon: Positive = 0.2, epsilon_high: Positive = 0.2, delta: NonNegative = 0.0
) -> TokenLosses:
  """Computes `surrogate` of each token, mean over completions of the means over their tokens.

  Source: Shao et al. 2024, eq. 3 (arXiv:2402.03300); delta: Prime Intellect 2025, section 3.4 (arXiv:2505.07291)
  """
  return surrogate(tokens, epsilon, epsilon_high, delta)


def dr_grpo(
  tokens: Tokens, *, epsilon: Positive = 0.2, epsilon_high: Positive = 0.2, delta: NonNegative = 0.0
) -> TokenLosses:
  """Computes `surrogate` of each token, their sum over a constant.

  Neither length nor, with the advantages of scale "none", spread biases it.

  Source: Liu et al. 2025, section 3.2 (arXiv:2503.20783)
  """
  return surrogate(tokens, epsilon, epsilon_high, delta)


def bnpo(
  tokens: Tokens, *, epsilon: Positive = 0.2, epsilon_high: Positive = 0.2, delta: NonNegative = 0.0
) -> TokenLosses:
  """Computes `surrogate` of each token, mean over the tokens; TRL's are those of a microbatch, these of the minibatch.

  Source: Xiao et al. 2025 (arXiv:2506.02864), as TRL names the mean over tokens
  """
  return surrogate(tokens, epsilon, epsilon_high, delta)


def dapo(
  tokens: Tokens, *, epsilon: Positive = 0.2, epsilon_high: Positive = 0.28, delta: NonNegative = 0.0
) -> TokenLosses:
  """Computes `surrogate` with a higher upper bound, mean over the tokens of the (mini)batch.

  Source: Yu et al. 2025, eq. 8 (arXiv:2503.14476)
  """
  return surrogate(tokens, epsilon, epsilon_high, delta)


def gspo(
  tokens: Tokens, *, epsilon: Positive = 3e-4, epsilon_high: Positive = 4e-4, delta: NonNegative = 0.0
) -> TokenLosses:
  """Computes `surrogate` of completions: the ratio is the geometric mean over the completion's tokens, clipped as one.

  Needs Tokens of ratio="sequence".

  Source: Zheng et al. 2025, eq. 5 (arXiv:2507.18071)
  """
  return surrogate(tokens, epsilon, epsilon_high, delta)


def gspo_token(
  tokens: Tokens, *, epsilon: Positive = 3e-4, epsilon_high: Positive = 4e-4, delta: NonNegative = 0.0
) -> TokenLosses:
  """Computes `gspo` whose tokens may have advantages of their own.

  With equal ones it has the value and gradient of `gspo`. Needs Tokens of ratio="sequence_token".

  Source: Zheng et al. 2025, eq. 13 (arXiv:2507.18071)
  """
  return surrogate(tokens, epsilon, epsilon_high, delta)


def luspo(
  tokens: Tokens, *, epsilon: Positive = 2e-3, epsilon_high: Positive = 2.5e-3, delta: NonNegative = 0.0
) -> TokenLosses:
  """Computes `gspo` times the completion's length, so that every token weighs the same.

  Needs Tokens of ratio="sequence"; the length comes from the aggregation, "sequence_sum".

  Source: Liu et al. 2026 (arXiv:2602.05261)
  """
  return surrogate(tokens, epsilon, epsilon_high, delta)


def rloo(
  tokens: Tokens, *, epsilon: Positive = 0.2, epsilon_high: Positive = 0.2, delta: NonNegative = 0.0
) -> TokenLosses:
  """Computes `surrogate` of completions as one action: the ratio is that of their whole probability.

  Needs Tokens of ratio="product".

  Source: Ahmadian et al. 2024, section 3 (arXiv:2402.14740); the clipped ratio as in TRL
  """
  return surrogate(tokens, epsilon, epsilon_high, delta)


def cispo(tokens: Tokens, *, epsilon_high: Positive = 5.0) -> TokenLosses:
  """Computes -min(ratio, epsilon_high) A log p, the weight a constant: every token keeps a gradient.

  epsilon_high is the largest ratio itself, not its distance from 1. `clipped` marks where it is exceeded and A > 0.

  Source: MiniMax 2025, eq. 4 (arXiv:2506.13585)
  """
  rho = jax.lax.stop_gradient(tokens.ratio)
  weight = jnp.minimum(rho, epsilon_high) * tokens.advantages
  return TokenLosses(-weight * tokens.logps * tokens.correction, cut(False, rho > epsilon_high, tokens.advantages))


def sapo(tokens: Tokens, *, softness: Positive = 1.0, softness_negative: Positive = 1.05) -> TokenLosses:
  """Computes -A 4 sigmoid(t (ratio - 1)) / t: a soft trust region, narrower (t larger) where the advantage is negative.

  t is softness where A > 0, else softness_negative. No token counts as clipped.

  Source: Gao et al. 2025, eq. 5 (arXiv:2511.20347)
  """
  t = jnp.where(tokens.advantages > 0, softness, softness_negative)
  gate = 4 * jax.nn.sigmoid(t * (tokens.ratio - 1)) / t
  return TokenLosses(-gate * tokens.advantages * tokens.correction, jnp.zeros_like(gate))


def vespo(
  tokens: Tokens,
  *,
  k: NonNegative = 2.0,
  lam: NonNegative = 3.0,
  k_negative: NonNegative = 3.0,
  lam_negative: NonNegative = 2.0,
) -> TokenLosses:
  """Computes -phi A log p with phi = w^k exp(lam (1 - w)), a constant, w the ratio of the whole completion.

  The correction, of tokens, is a factor of w; k_negative and lam_negative are k and lam where the advantage is
  negative. Needs Tokens of ratio="token", whose log-ratios it sums itself. No token counts as clipped.

  Source: Shen et al. 2026 (arXiv:2602.10693)
  """
  log_ratio = jnp.clip(jax.lax.stop_gradient(tokens.log_ratio), -MAX_LOG_RATIO, MAX_LOG_RATIO)
  correction = jnp.clip(jnp.log(jnp.maximum(tokens.correction, MIN_WEIGHT)), max=MAX_LOG_RATIO)
  log_w = jnp.clip(row_sum(log_ratio + correction, tokens.mask), math.log(MIN_WEIGHT), MAX_LOG_RATIO)
  good = tokens.advantages >= 0
  shape = jnp.where(good, k, k_negative)
  rate = jnp.where(good, lam, lam_negative)
  phi = jnp.exp(shape * log_w + rate * (1 - jnp.exp(log_w)))
  return TokenLosses(-phi * tokens.advantages * tokens.logps, jnp.zeros_like(phi))


def gmpo(tokens: Tokens, *, epsilon: Positive = 0.4, epsilon_high: Positive = 0.4) -> TokenLosses:
  """Computes -exp(mean over the completion of its clipped log-ratios) A.

  Log-ratios are clipped in nats: at epsilon_high where A > 0, else at -epsilon. Needs Tokens of ratio="token". Tokens
  that are to be left out (`token_weight.top_entropy`) leave the mask, and so the mean.

  Source: Zhao et al. 2025, eq. 4 (arXiv:2507.20673)
  """
  log_ratio, advantages = tokens.log_ratio, tokens.advantages
  held = jnp.where(advantages > 0, jnp.minimum(log_ratio, epsilon_high), jnp.maximum(log_ratio, -epsilon))
  losses = -ratio(row_mean(held, tokens.mask)) * advantages * tokens.correction
  return TokenLosses(losses, cut(log_ratio < -epsilon, log_ratio > epsilon_high, advantages))


class PolicyLoss(NamedTuple):
  """A loss of the family.

  Attributes:
    loss: (tokens, *, hyper-parameters) -> TokenLosses.
    ratio: a key of `RATIOS`, for `make_tokens`.
    aggregation: a key of `aggregation.AGGREGATIONS`.
  """

  loss: Callable[..., Any]
  ratio: str
  aggregation: str


def adopt(own: Callable[..., TokenLosses | jax.Array] | PolicyLoss) -> PolicyLoss:
  """Makes the record of a user's loss (tokens, *, hyper-parameters): ratios of tokens, mean over tokens.

  The function returns TokenLosses, or losses [B, T] alone, of which none counts as clipped. One with another ratio or
  aggregation is given as a PolicyLoss.

  Raises:
    TypeError: a record of another family, or one that names an unknown ratio or aggregation.
  """
  record: PolicyLoss = record_of(own, PolicyLoss, "token", "token_mean")
  if record.ratio not in RATIOS:
    raise TypeError(f"has the ratio {record.ratio!r}; use one of {', '.join(RATIOS)}")
  if record.aggregation not in AGGREGATIONS:
    raise TypeError(f"has the aggregation {record.aggregation!r}; use one of {', '.join(AGGREGATIONS)}")

  @functools.wraps(record.loss)
  def loss(tokens, **hparams):
    result = record.loss(tokens, **hparams)
    if isinstance(result, TokenLosses):
      return result
    return TokenLosses(result, jnp.zeros_like(tokens.logps))

  return record._replace(loss=loss)


LOSSES = {
  "ppo": PolicyLoss(ppo, "token", "token_mean"),
  "grpo": PolicyLoss(grpo, "token", "sequence_mean"),
  "dr_grpo": PolicyLoss(dr_grpo, "token", "constant"),
  "bnpo": PolicyLoss(bnpo, "token", "token_mean"),
  "dapo": PolicyLoss(dapo, "token", "token_mean"),
  "gspo": PolicyLoss(gspo, "sequence", "sequence_mean"),
  "gspo_token": PolicyLoss(gspo_token, "sequence_token", "sequence_mean"),
  "luspo": PolicyLoss(luspo, "sequence", "sequence_sum"),
  "rloo": PolicyLoss(rloo, "product", "sequence_mean"),
  "cispo": PolicyLoss(cispo, "token", "token_mean"),
  "sapo": PolicyLoss(sapo, "token", "sequence_mean"),
  "vespo": PolicyLoss(vespo, "token", "token_mean"),
  "gmpo": PolicyLoss(gmpo, "token", "sequence_mean"),
}
