"""From the rewards of sampled completions to the advantages of their tokens.

Per-token arrays [B, T] have a mask that is 1 on the completion, contiguous in a row; values elsewhere are ignored.
Rewards of groups are [N, G]: G completions of each of N prompts. NaN is a missing reward: its completion gets the
advantage 0 and is in no mean. Rows that only fill up a batch have NaN too.
"""

import functools

import jax
import jax.numpy as jnp

from alignjax.losses.aggregation import divisor


def masked_mean(values: jax.Array, mask: jax.Array, axis: int | None = None, keepdims: bool = False) -> jax.Array:
  """Returns the mean where the mask is nonzero, weighted by it; 0 if it is all 0. Of equal values it is exactly theirs.

  Args:
    values: any shape; ignored where the mask is 0, even NaN.
    mask: the same shape; weights of at least 0, or booleans.
    axis: None for all values.
    keepdims: keep the reduced axes with size 1.
  """
  anchor, offset = _anchored_mean(values, mask, axis)
  mean = anchor + offset
  if keepdims:
    return mean
  return jnp.squeeze(mean, axis)


def centred(values: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
  """Subtracts the mean where the mask is nonzero; 0 elsewhere, and exactly 0 for equal values, whatever their size.

  The largest value is subtracted first, so that the rounding error is that of the spread, not of the size. The mean is
  weighted by the mask, which may be weights, and taken over `axis` (None: over all values).
  """
  anchor, offset = _anchored_mean(values, mask, axis)
  return jnp.where(mask > 0, (values - anchor) - offset, 0)


def _anchored_mean(values, mask, axis):
  """(the largest of the values, their mean less it), the axis kept with size 1."""
  present = mask > 0
  largest = jnp.max(jnp.where(present, values, -jnp.inf), axis=axis, keepdims=True)
  anchor = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0))
  differences = jnp.where(present, values - anchor, 0)
  weights = jnp.where(present, mask, 0).astype(differences.dtype)
  total = divisor(jnp.sum(weights, axis=axis, keepdims=True))
  return anchor, jnp.sum(weights * differences, axis=axis, keepdims=True) / total


def masked_var(values: jax.Array, mask: jax.Array, axis: int | None = None, ddof: int = 1) -> jax.Array:
  """Returns the variance where the mask is nonzero, the axis kept with size 1; 0 if there are no more than ddof values.

  A mask of weights w counts as (sum w)^2 / sum w^2 values, whatever the unit of the weights. Its mean is weighted too.
  """
  deviations = centred(values, mask, axis)
  weights = jnp.where(mask > 0, mask, 0).astype(deviations.dtype)
  sum_over_axis = functools.partial(jnp.sum, axis=axis, keepdims=True)
  total = sum_over_axis(weights)
  free = total - ddof * sum_over_axis(jnp.square(weights)) / divisor(total)
  known = (sum_over_axis(mask > 0) > ddof) & (free > 0)
  return jnp.where(known, sum_over_axis(weights * jnp.square(deviations)) / jnp.where(known, free, 1), 0)


def whiten(values: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
  """Scales values to variance 1 and shifts them to mean 0 over the mask, which may be weights; 0 off the mask.

  Without shift_mean, the mean stays as it is. The statistics are those of the whole array, which must therefore be the
  whole batch. TRL whitens each process' rows by themselves.
  """
  whitened = centred(values, mask) * jax.lax.rsqrt(masked_var(values, mask) + 1e-8)
  if not shift_mean:
    whitened = whitened + masked_mean(values, mask)
  return jnp.where(mask > 0, whitened, 0)


def token_rewards(scores: jax.Array, kl: jax.Array, mask: jax.Array, *, kl_coef: jax.Array | float) -> jax.Array:
  """Returns rewards [B, T]: -kl_coef * kl at every token of the mask, and the row's score added at its last one.

  TRL adds the score one token later, on the first pad, if there is one: the mask of its advantages is longer by one.

  Args:
    scores: [B]; ignored in rows whose mask is empty.
    kl: [B, T], an estimate of each token's KL from the reference in nats (`losses.kl`).
    mask: [B, T], 1 on the completion.
    kl_coef: price of a nat.

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
  """Computes (advantages, returns), both [B, T] and 0 off the mask.

  A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), and returns = A + V, the targets of the values. The
  value after the mask's end is 0, also for a completion that was cut off.

  Args:
    rewards, values: [B, T]; ignored off the mask.
    mask: [B, T], 1 on the completion.
    gamma: discount per token.
    lam: weight of longer returns; 0 takes one step, 1 all rewards that follow.

  Source: Schulman et al. 2015, eq. 16 (arXiv:1506.02438)
  """
  in_completion = mask > 0
  rewards = jnp.where(in_completion, rewards, 0)
  values = jnp.where(in_completion, values, 0)
  next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  errors = jnp.where(in_completion, rewards + gamma * next_values - values, 0)

  def earlier(advantage, column):
    error, in_completion = column
    advantage = jnp.where(in_completion, error + gamma * lam * advantage, 0)
    return advantage, advantage

  _, advantages = jax.lax.scan(earlier, jnp.zeros_like(errors[:, 0]), (errors.T, in_completion.T), reverse=True)
  advantages = advantages.T
  return advantages, advantages + values


def weighted_sum(rewards: jax.Array, weights: jax.Array) -> jax.Array:
  """Sums R reward functions [N, G, R] with weights [R], to [N, G].

  A function whose reward is missing (NaN) adds nothing; the sum is NaN if all are missing.
  """
  missing = jnp.isnan(rewards)
  total = jnp.sum(jnp.where(missing, 0, rewards * weights), axis=-1)
  return jnp.where(jnp.all(missing, axis=-1), jnp.nan, total)


def group_advantages(
  rewards: jax.Array, *, scale: str = "group", epsilon: float = 1e-4, weights: jax.Array | None = None
) -> jax.Array:
  """Computes (r - mean of the group) / (std + epsilon), [N, G], for rewards [N, G]; 0 where a reward is missing (NaN).

  Args:
    rewards: [N, G].
    scale: whose std divides: "group", "batch" (of all rewards, not centred by group), or "none" for no division.
    epsilon: added to the deviation; unused by "none".
    weights: [N, G], of each completion in the deviation of a "batch"; None: all are equal. Unused by the other scales.

  Source: Shao et al. 2024, section 4.1.2 (arXiv:2402.03300); "none": Liu et al. 2025 (arXiv:2503.20783); "batch": Liu
    et al. 2025 (arXiv:2508.08221)
  """
  present = ~jnp.isnan(rewards)
  differences = centred(rewards, present, axis=1)
  if scale == "none":
    return differences
  if scale == "group":
    variance = masked_var(rewards, present, 1)
  else:
    variance = masked_var(rewards, _present_weights(rewards, weights))
  return differences / (jnp.sqrt(variance) + epsilon)


def _present_weights(rewards, weights):
  """`weights`, or ones, and 0 where a reward is missing."""
  missing = jnp.isnan(rewards)
  if weights is None:
    weights = jnp.ones_like(rewards)
  return jnp.where(missing, 0, weights)


def gdpo_advantages(
  rewards: jax.Array,
  weights: jax.Array,
  *,
  epsilon: float = 1e-4,
  shaped: jax.Array | None = None,
  example_weights: jax.Array | None = None,
) -> jax.Array:
  """Computes advantages [N, G] of R reward functions [N, G, R]; 0 where all are missing (NaN), or a group's are equal.

  Each function is normalised in its group; their sum by weights [R] is normalised over the batch. A function of small
  spread thus counts as much as one of large spread, which would dominate a sum that is normalised only once.

  Shaping terms of a score, such as the KL or the penalties for length and a missing end, are not normalised. They are
  added to the normalised functions, less their mean in the group. So a penalty of 1 costs one standard deviation of a
  function of weight 1; if it were normalised, its coefficient would have no effect.

  Args:
    rewards: [N, G, R], NaN where a function does not apply.
    weights: [R].
    epsilon: added to every deviation.
    shaped: [N, G], the weighted sum with its shaping terms, NaN for a completion that does not count; None: without
      shaping terms.
    example_weights: [N, G], of each completion over the batch; None: all are equal.

  Source: Liu et al. 2026 (arXiv:2601.05242)
  """
  if shaped is not None:
    rewards = jnp.where(jnp.isnan(shaped)[..., None], jnp.nan, rewards)
  present = ~jnp.isnan(rewards)
  by_function = jax.vmap(lambda r: group_advantages(r, epsilon=epsilon), in_axes=-1, out_axes=-1)(rewards)
  summed = weighted_sum(jnp.where(present, by_function, jnp.nan), weights)
  if shaped is not None:
    summed += centred(_shaping(shaped, rewards, weights), ~jnp.isnan(summed), axis=1)
  learned = jnp.any(jnp.nan_to_num(summed) != 0, axis=1, keepdims=True)  # else the batch's mean leaves a rounding error
  return jnp.where(learned, normalise(summed, epsilon=epsilon, weights=example_weights), 0)


def _shaping(shaped, rewards, weights):
  """`shaped` less the weighted sum of the rewards; 0 where the difference is a rounding error."""
  difference = shaped - weighted_sum(rewards, weights)
  size = jnp.sum(jnp.where(jnp.isnan(rewards), 0, jnp.abs(rewards * weights)), axis=-1)
  return jnp.where(jnp.abs(difference) > 4 * jnp.finfo(size.dtype).eps * size, difference, 0)


def rloo_advantages(rewards: jax.Array) -> jax.Array:
  """Computes r_i less the mean of the others of its group, [N, G], for rewards [N, G]; 0 if missing (NaN) or alone.

  Source: Ahmadian et al. 2024, eq. 8 (arXiv:2402.14740); Kool et al. 2019
  """
  present = ~jnp.isnan(rewards)
  count = jnp.sum(present, axis=1, keepdims=True)
  # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
  return jnp.where(count > 1, centred(rewards, present, axis=1) * count / jnp.maximum(count - 1, 1), 0)


def reinforce_plus_plus_advantages(rewards: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
  """Computes r less its group's mean, whitened over the batch, for rewards [N, G]; 0 in groups of equal rewards.

  Unlike "group" scaling it does not amplify groups whose rewards hardly differ. All completions have equal weight,
  whatever their length, or `weights` [N, G]. A missing reward (NaN) is left out, with the advantage 0.

  Source: Hu et al. 2025, REINFORCE++ with baseline (arXiv:2501.03262)
  """
  differences = group_advantages(rewards, scale="none")
  learned = jnp.any(differences != 0, axis=1, keepdims=True)  # else the batch's mean leaves a rounding error
  return jnp.where(learned, whiten(differences, _present_weights(rewards, weights)), 0)


def normalise(values: jax.Array, *, epsilon: float = 1e-4, weights: jax.Array | None = None) -> jax.Array:
  """Computes (x - mean) / (std + epsilon) over all values; 0 for NaN, which is left out.

  `weights`, of the shape of values, count in mean and deviation; None: all are equal.
  """
  present_weights = _present_weights(values, weights)
  return centred(values, present_weights) / (jnp.sqrt(masked_var(values, present_weights)) + epsilon)


def varied(rewards: jax.Array) -> jax.Array:
  """Returns where rewards [N, G] differ within the group, bool [N]; a group of equal rewards has no gradient.

  Missing rewards (NaN) are left out; a group without two rewards is False. DAPO samples until it has a batch of groups
  whose rewards differ.

  Source: Yu et al. 2025, section 3.2 (arXiv:2503.14476)
  """
  present = ~jnp.isnan(rewards)
  lowest = jnp.min(jnp.where(present, rewards, jnp.inf), axis=1)
  highest = jnp.max(jnp.where(present, rewards, -jnp.inf), axis=1)
  return highest > lowest


def finished_only(mask: jax.Array, finished: jax.Array) -> jax.Array:
  """Returns the mask [B, T] without the rows that were cut off before their end (finished [B] is 0 or False).

  Their rewards stay in the group's mean; only their loss is dropped.

  Source: Yu et al. 2025, section 3.4, overlong filtering (arXiv:2503.14476)
  """
  return jnp.where(finished[:, None].astype(bool), mask, 0)


def overlong_penalty(lengths: jax.Array, *, max_length: int, buffer: int) -> jax.Array:
  """Returns a term to add to rewards: 0 up to max_length - buffer tokens, then falling linearly to -1 at max_length.

  Args:
    lengths: tokens of each completion, any shape, which is the result's.
    max_length: tokens from which on the term is -1.
    buffer: tokens over which it falls; above 0.

  Source: Yu et al. 2025, eq. 13 (arXiv:2503.14476)
  """
  return -jnp.clip((lengths - (max_length - buffer)) / buffer, 0.0, 1.0)
