"""From the rewards of sampled completions to the advantages of their tokens.

Per-token arrays [B, T] have a mask that is 1 on the completion, contiguous in a row; anything may stand before and
after. Rewards of groups are [N, G]: G completions of each of N prompts; NaN is a reward that could not be had, whose
completion gets the advantage 0 and enters no mean. A row that is only there to fill a batch is such a one.
"""

import jax
import jax.numpy as jnp

from alignjax.losses.aggregation import divisor


def masked_mean(values: jax.Array, mask: jax.Array, axis: int | None = None, keepdims: bool = False) -> jax.Array:
  """The mean where the mask is nonzero, which may be weights; 0 where nothing is. Of equal values it is that value."""
  anchor, offset = _anchored_mean(values, mask, axis)
  mean = anchor + offset
  return mean if keepdims else jnp.squeeze(mean, axis)


def centred(values: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
  """Values less their mean where the mask is nonzero, 0 elsewhere; of equal values exactly 0, whatever their size.

  One of the values is subtracted first: what is left has the rounding error of the spread, not of the size.
  """
  anchor, offset = _anchored_mean(values, mask, axis)
  return jnp.where(mask > 0, (values - anchor) - offset, 0)


def _anchored_mean(values, mask, axis):
  """(the largest of the values, their mean less it), the axis kept with size 1."""
  there = mask > 0
  largest = jnp.max(jnp.where(there, values, -jnp.inf), axis=axis, keepdims=True)
  anchor = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0))
  differences = jnp.where(there, values - anchor, 0)
  weights = jnp.where(there, mask, 0).astype(differences.dtype)
  total = divisor(jnp.sum(weights, axis=axis, keepdims=True))
  return anchor, jnp.sum(weights * differences, axis=axis, keepdims=True) / total


def masked_var(values: jax.Array, mask: jax.Array, axis: int | None = None, ddof: int = 1) -> jax.Array:
  """The variance where the mask is nonzero, the axis kept with size 1; 0 where there are no more than ddof values.

  A mask of weights counts as many values as weigh alike: (sum w)^2 / sum w^2 of them, in any unit.
  """
  deviations = centred(values, mask, axis)
  weights = jnp.where(mask > 0, mask, 0).astype(deviations.dtype)
  add = lambda x: jnp.sum(x, axis=axis, keepdims=True)
  total = add(weights)
  free = total - ddof * add(jnp.square(weights)) / divisor(total)
  known = (add(mask > 0) > ddof) & (free > 0)
  return jnp.where(known, add(weights * jnp.square(deviations)) / jnp.where(known, free, 1), 0)


def whiten(values: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
  """Values of variance 1 and mean 0 over the mask, which may be weights; 0 off it; the mean stays where it was if not
  shift_mean.

  Scope: the whole array, so give it the whole batch. TRL whitens each process' own.
  """
  whitened = centred(values, mask) * jax.lax.rsqrt(masked_var(values, mask) + 1e-8)
  return jnp.where(mask > 0, whitened if shift_mean else whitened + masked_mean(values, mask), 0)


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


def group_advantages(
  rewards: jax.Array, *, scale: str = "group", epsilon: float = 1e-4, weights: jax.Array | None = None
) -> jax.Array:
  """(r - mean of the group) / (std + epsilon) of rewards [N, G]; std of the "group", of the whole "batch", or "none".

  Args:
    rewards: [N, G].
    scale: of what the deviation is.
    epsilon: added to it.
    weights: [N, G], how much each counts in the deviation of a batch; None: all alike.

  Source: Shao et al. 2024, section 4.1.2 (arXiv:2402.03300); "none": Liu et al. 2025 (arXiv:2503.20783); "batch": Liu
    et al. 2025 (arXiv:2508.08221)
  """
  there = ~jnp.isnan(rewards)
  differences = centred(rewards, there, axis=1)
  if scale == "none":
    return differences
  variance = masked_var(rewards, there, 1) if scale == "group" else masked_var(rewards, _counted(rewards, weights))
  return differences / (jnp.sqrt(variance) + epsilon)


def _counted(rewards, weights):
  """`weights`, or ones, and 0 where a reward is missing."""
  return jnp.where(jnp.isnan(rewards), 0, jnp.ones_like(rewards) if weights is None else weights)


def gdpo_advantages(
  rewards: jax.Array,
  weights: jax.Array,
  *,
  epsilon: float = 1e-4,
  shaped: jax.Array | None = None,
  example_weights: jax.Array | None = None,
) -> jax.Array:
  """[N, G] of R reward functions' [N, G, R]: each normalised in its group, summed by weights [R], then over the batch.

  So a function of small spread counts as much as one of large spread, which a sum normalised once would drown.

  What shapes a score, such as the penalty of a missing end or of length, or the KL, is no function of the sum: less
  its mean in the group it is added to the normalised ones as it is. A penalty of 1 thus costs one standard deviation
  of a function of weight 1; normalised like them, its coefficient would mean nothing.

  Args:
    rewards: [N, G, R].
    weights: [R].
    epsilon: added to every deviation.
    shaped: [N, G], the weighted sum with all that shapes it, NaN for a completion that counts for nothing; None: the
      weighted sum.
    example_weights: [N, G], how much each counts over the batch; None: all alike.

  Source: Liu et al. 2026 (arXiv:2601.05242)
  """
  if shaped is not None:
    rewards = jnp.where(jnp.isnan(shaped)[..., None], jnp.nan, rewards)
  there = ~jnp.isnan(rewards)
  by_function = jax.vmap(lambda r: group_advantages(r, epsilon=epsilon), in_axes=-1, out_axes=-1)(rewards)
  summed = weighted_sum(jnp.where(there, by_function, jnp.nan), weights)
  if shaped is not None:
    summed += centred(_difference(shaped, rewards, weights), ~jnp.isnan(summed), axis=1)
  learned = jnp.any(jnp.nan_to_num(summed) != 0, axis=1, keepdims=True)  # else the batch's mean leaves a rounding error
  return jnp.where(learned, normalise(summed, epsilon=epsilon, weights=example_weights), 0)


def _difference(shaped, rewards, weights):
  """By how much `shaped` differs from the weighted sum of the rewards; 0 where that is a rounding error."""
  difference = shaped - weighted_sum(rewards, weights)
  size = jnp.sum(jnp.where(jnp.isnan(rewards), 0, jnp.abs(rewards * weights)), axis=-1)
  return jnp.where(jnp.abs(difference) > 4 * jnp.finfo(size.dtype).eps * size, difference, 0)


def rloo_advantages(rewards: jax.Array) -> jax.Array:
  """r_i less the mean of the others of its group, of rewards [N, G]; 0 where there are no others.

  Source: Ahmadian et al. 2024, eq. 8 (arXiv:2402.14740); Kool et al. 2019
  """
  there = ~jnp.isnan(rewards)
  count = jnp.sum(there, axis=1, keepdims=True)
  # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
  return jnp.where(count > 1, centred(rewards, there, axis=1) * count / jnp.maximum(count - 1, 1), 0)


def reinforce_plus_plus_advantages(rewards: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
  """r less its group's mean, whitened over the batch, of rewards [N, G].

  Unlike "group" scaling it does not blow up groups whose rewards barely differ. Completions count alike here, whatever
  their length, or by `weights` [N, G].

  Source: Hu et al. 2025, REINFORCE++ with baseline (arXiv:2501.03262)
  """
  differences = group_advantages(rewards, scale="none")
  learned = jnp.any(differences != 0, axis=1, keepdims=True)  # else the batch's mean leaves a rounding error
  return jnp.where(learned, whiten(differences, _counted(rewards, weights)), 0)


def normalise(values: jax.Array, *, epsilon: float = 1e-4, weights: jax.Array | None = None) -> jax.Array:
  """(x - mean) / (std + epsilon) over all values, by weights of their shape; 0 for NaN, which is left out."""
  counted = _counted(values, weights)
  return centred(values, counted) / (jnp.sqrt(masked_var(values, counted)) + epsilon)


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
