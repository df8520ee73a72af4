"""Weights of sampled tokens, by their sampler, by the change of the policy since then, and by their entropy.

All weights are constants [B, T]. Per-token losses are multiplied by them before a KL term is added.
"""

import jax
import jax.numpy as jnp

from alignjax.losses.kl import ratio


def sampling_correction(
  old_logps: jax.Array,
  sampling_logps: jax.Array,
  mask: jax.Array,
  *,
  level: str = "token",
  bound: str = "truncate",
  low: jax.Array | float = 0.0,
  high: jax.Array | float = 3.0,
) -> jax.Array:
  """Computes importance weights p_old / p_sampler [B, T] of tokens that another program sampled; 1 off the mask.

  Both must be log-probs of one distribution up to rounding, with the same temperature and truncation. A log-prob of the
  sampler that is NaN is taken as equal to p_old. The weights are constants.

  Args:
    old_logps: of the trainer, before the first update on these tokens; nats.
    sampling_logps: of the sampler; nats.
    mask: 1 on the completion.
    level: "token", or "sequence" for the product over the completion, at each of its tokens.
    bound: "truncate" holds weights in [low, high] (TIS), "mask" sets those outside to 0 (MIS).
    low: 0 for no bound.
    high: inf for no bound.

  Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (TIS); Liu et al.
    2025, "When speed kills stability" (MIS)
  """
  known = (mask > 0) & ~jnp.isnan(sampling_logps)
  weights = ratio(LEVELS[level](jnp.where(known, old_logps - sampling_logps, 0)))
  return jax.lax.stop_gradient(jnp.where(mask > 0, BOUNDS[bound](weights, low, high), 1))


LEVELS = {
  "token": lambda gap: gap,
  "sequence": lambda gap: jnp.broadcast_to(jnp.sum(gap, axis=1, keepdims=True), gap.shape),
}
BOUNDS = {
  "truncate": jnp.clip,
  "mask": lambda weights, low, high: jnp.where((weights >= low) & (weights <= high), weights, 0),
}


def on_policy(
  logps: jax.Array,
  sampling_logps: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  threshold: jax.Array | float,
) -> jax.Array:
  """Returns 0.0 at tokens of negative advantage in completions that the policy has moved away from, else 1.0; [B, T].

  It has moved away if the mean of log p_sampler - log p_policy over the completion is above the threshold. The weights
  are constants.

  Args:
    logps: of the policy; nats.
    sampling_logps: of the policy that sampled; nats.
    advantages: [B, T].
    mask: 1 on the completion.
    threshold: nats per token; inf keeps every token.

  Source: DeepSeek-AI 2025, eq. 9 (arXiv:2512.02556)
  """
  gap = jnp.where(mask > 0, sampling_logps - logps, 0)
  left = jnp.sum(gap, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1) > threshold
  kept = jnp.broadcast_to((advantages >= 0) | ~left, logps.shape)
  return jax.lax.stop_gradient(kept.astype(logps.dtype))


def top_entropy(entropy: jax.Array, mask: jax.Array, *, share: jax.Array | float) -> jax.Array:
  """Returns 1.0 at the share of tokens of the mask [B, T] with the highest entropy, else 0.0.

  The share is that of the given arrays, which must be the whole (mini)batch, before it is split. The quantile is
  float32, and tokens that tie with it are kept.

  Args:
    entropy: [B, T].
    mask: 1 on the completion.
    share: above 0, at most 1, which keeps all.

  Source: Wang et al. 2025, eq. 5 (arXiv:2506.01939)
  """
  in_completion = mask > 0
  in_order = jnp.sort(jnp.where(in_completion, entropy, jnp.inf).astype(jnp.float32).ravel())
  place = (1 - jnp.asarray(share, jnp.float32)) * jnp.maximum(jnp.sum(in_completion) - 1, 0)
  below = jnp.floor(place).astype(jnp.int32)
  lower = in_order[below]
  upper = in_order[jnp.minimum(below + 1, in_order.size - 1)]
  threshold = jnp.where(place > below, lower + (place - below) * (upper - lower), lower)
  return jax.lax.stop_gradient((in_completion & (entropy >= threshold)).astype(entropy.dtype))
