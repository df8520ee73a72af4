"""From the rewards of sampled completions to the advantages of their tokens.

Per-token arrays [B, T] have a mask that is 1 on the completion, contiguous in a row; anything may stand before and
after. Rewards of groups are [N, G]: G completions of each of N prompts; NaN is a reward that could not be had, whose
completion gets the advantage 0 and enters no mean. A row that is only there to fill a batch is such a one.
"""

import jax
import jax.numpy as jnp


def masked_mean(values: jax.Array, mask: jax.Array, axis: int | None = None, keepdims: bool = False) -> jax.Array:
  """The mean where the mask is nonzero; 0 where nothing is."""
  count = jnp.sum(mask > 0, axis=axis, keepdims=keepdims)
  return jnp.sum(jnp.where(mask > 0, values, 0), axis=axis, keepdims=keepdims) / jnp.maximum(count, 1)


def masked_var(values: jax.Array, mask: jax.Array, axis: int | None = None, ddof: int = 1) -> jax.Array:
  """The variance where the mask is nonzero, the axis kept with size 1; 0 where there are no more than ddof values."""
  deviations = values - masked_mean(values, mask, axis, keepdims=True)
  count = jnp.sum(mask > 0, axis=axis, keepdims=True)
  total = jnp.sum(jnp.where(mask > 0, jnp.square(deviations), 0), axis=axis, keepdims=True)
  return jnp.where(count > ddof, total / jnp.maximum(count - ddof, 1), 0)


def whiten(values: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
  """Values of variance 1 and mean 0 over the mask, 0 off it; the mean stays where it was if not shift_mean.

  Scope: the whole array, so give it the whole batch. TRL whitens each process' own.
  """
  mean = masked_mean(values, mask)
  whitened = (values - mean) * jax.lax.rsqrt(masked_var(values, mask) + 1e-8)
  return jnp.where(mask > 0, whitened if shift_mean else whitened + mean, 0)


def token_rewards(scores: jax.Array, kl: jax.Array, mask: jax.Array, *, kl_coef: jax.Array | float) -> jax.Array:
  """Rewards [B, T]: -kl_coef * kl at every token of the mask, and the row's score [B] added at its last one.

  TRL adds it one token later, on the first pad, where there is one: its advantages come of a mask longer by one.

  Source: Stiennon et al. 2020, section 3.4 (arXiv:2009.01325)
  """
  after = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
  last = (mask > 0) & (after == 0)
  return jnp.where(mask > 0, -kl_coef * kl, 0) + jnp.where(last, scores[:, None], 0)


def gae(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  gamma: jax.Array | float,
  lam: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
  """(advantages, returns) [B, T] of rewards and values [B, T]; 0 off the mask, and after it nothing is worth anything.

  A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), and returns = A + V, the targets of the values.

  Source: Schulman et al. 2015, eq. 16 (arXiv:1506.02438)
  """
  there = mask > 0
  rewards, values = jnp.where(there, rewards, 0), jnp.where(there, values, 0)
  next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  errors = jnp.where(there, rewards + gamma * next_values - values, 0)

  def earlier(advantage, column):
    error, there = column
    advantage = jnp.where(there, error + gamma * lam * advantage, 0)
    return advantage, advantage

  _, advantages = jax.lax.scan(earlier, jnp.zeros_like(errors[:, 0]), (errors.T, there.T), reverse=True)
  advantages = advantages.T
  return advantages, advantages + values


def weighted_sum(rewards: jax.Array, weights: jax.Array) -> jax.Array:
  """[N, G] of R reward functions' [N, G, R] and weights [R]; a function without a value adds nothing, none at all
  is NaN."""
  missing = jnp.isnan(rewards)
  total = jnp.sum(jnp.where(missing, 0, rewards * weights), axis=-1)
  return jnp.where(jnp.all(missing, axis=-1), jnp.nan, total)


def group_advantages(rewards: jax.Array, *, scale: str = "group", epsilon: float = 1e-4) -> jax.Array:
  """(r - mean of the group) / (std + epsilon) of rewards [N, G]; std of the "group", of the whole "batch", or "none".

  Source: Shao et al. 2024, section 4.1.2 (arXiv:2402.03300); "none": Liu et al. 2025 (arXiv:2503.20783); "batch": Liu
    et al. 2025 (arXiv:2508.08221)
  """
  there = ~jnp.isnan(rewards)
  centred = rewards - masked_mean(rewards, there, axis=1, keepdims=True)
  axis = {"group": 1, "batch": None, "none": None}[scale]
  spread = 1.0 if scale == "none" else jnp.sqrt(masked_var(rewards, there, axis)) + epsilon
  return jnp.where(there, centred / spread, 0)


def gdpo_advantages(rewards: jax.Array, weights: jax.Array, *, epsilon: float = 1e-4) -> jax.Array:
  """[N, G] of R reward functions' [N, G, R]: each normalised in its group, summed by weights [R], then over the batch.

  So a function of small spread counts as much as one of large spread, which a sum normalised once would drown.

  Source: Liu et al. 2026 (arXiv:2601.05242)
  """
  there = ~jnp.isnan(rewards)
  by_function = jax.vmap(lambda r: group_advantages(r, epsilon=epsilon), in_axes=-1, out_axes=-1)(rewards)
  return normalise(weighted_sum(jnp.where(there, by_function, jnp.nan), weights), epsilon=epsilon)


def rloo_advantages(rewards: jax.Array) -> jax.Array:
  """r_i less the mean of the others of its group, of rewards [N, G]; 0 where there are no others.

  Source: Ahmadian et al. 2024, eq. 8 (arXiv:2402.14740); Kool et al. 2019
  """
  there = ~jnp.isnan(rewards)
  count = jnp.sum(there, axis=1, keepdims=True)
  centred = rewards - masked_mean(rewards, there, axis=1, keepdims=True)
  # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
  return jnp.where(there & (count > 1), centred * count / jnp.maximum(count - 1, 1), 0)


def reinforce_plus_plus_advantages(rewards: jax.Array) -> jax.Array:
  """r less its group's mean, whitened over the batch, of rewards [N, G].

  Unlike "group" scaling it does not blow up groups whose rewards barely differ. Completions count alike here, whatever
  their length.

  Source: Hu et al. 2025, REINFORCE++ with baseline (arXiv:2501.03262)
  """
  return whiten(group_advantages(rewards, scale="none"), ~jnp.isnan(rewards))


ADVANTAGES = {
  "group": group_advantages,
  "rloo": rloo_advantages,
  "reinforce++": reinforce_plus_plus_advantages,
}


def normalise(values: jax.Array, *, epsilon: float = 1e-4) -> jax.Array:
  """(x - mean) / (std + epsilon) over all values; 0 for NaN, which is left out."""
  there = ~jnp.isnan(values)
  spread = jnp.sqrt(masked_var(values, there)) + epsilon
  return jnp.where(there, (values - masked_mean(values, there)) / spread, 0)


def varied(rewards: jax.Array) -> jax.Array:
  """Whether rewards [N, G] differ within the group, [N]: where they do not, there is nothing to learn.

  DAPO samples until it has a batch of groups that do.

  Source: Yu et al. 2025, section 3.2 (arXiv:2503.14476)
  """
  there = ~jnp.isnan(rewards)
  lowest = jnp.min(jnp.where(there, rewards, jnp.inf), axis=1)
  highest = jnp.max(jnp.where(there, rewards, -jnp.inf), axis=1)
  return highest > lowest


def finished_only(mask: jax.Array, finished: jax.Array) -> jax.Array:
  """The mask [B, T] without the rows that were cut off before their end (finished [B] is 0 or False).

  Their rewards stay in the group's mean: what is dropped is their loss.

  Source: Yu et al. 2025, section 3.4, overlong filtering (arXiv:2503.14476)
  """
  return jnp.where(finished[:, None].astype(bool), mask, 0)


def overlong_penalty(lengths: jax.Array, *, max_length: int, buffer: int) -> jax.Array:
  """To be added to rewards: 0 up to max_length - buffer tokens, then down in a straight line to -1 at max_length.

  Source: Yu et al. 2025, eq. 13 (arXiv:2503.14476)
  """
  return -jnp.clip((lengths - (max_length - buffer)) / buffer, 0.0, 1.0)
