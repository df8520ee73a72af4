"""From log-probabilities of tokens to those of a pair's sides: sums over segments, weights, and the Pair of losses."""

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import segments
from alignjax.losses.logps import TokenScores, next_token_scores, segment_sum
from alignjax.losses.pair import Pair, make_pair, per_token
from alignjax.model.decoder import Model
from alignjax.types import Batch, Params


def token_scores(model: Model, params: Params, batch: Batch, sides: int = 2, **also: bool) -> TokenScores:
  """Computes `next_token_scores` of the batch's tokens, [B, T].

  Args:
    model, params: policy or reference.
    batch: rows of pairs, or of triples.
    sides: texts of an example, 2 or 3.
    **also: of `losses.logps.token_scores`, such as entropy=True.
  """
  hidden, _ = model.forward(params, batch["tokens"], segments(batch, sides), batch["positions"])
  return next_token_scores(hidden, model.unembedding(params), batch["tokens"], **also)


def pair_logps(model: Model, params: Params, batch: Batch, ld_alpha: float = 1.0, sides: int = 2) -> jax.Array:
  """Computes the log-probabilities of the completions, [B, P, 2] in nats, weighted by `token_weights`; 0 for no pair.

  `sides` is the number of texts of an example: 3 for rows with third completions, which are not in the result.
  """
  return side_sums(token_scores(model, params, batch, sides).logps * token_weights(batch, ld_alpha), batch)


def side_sums(values: jax.Array, batch: Batch) -> jax.Array:
  """Sums values [B, T] over each pair's sides (chosen, rejected), [B, P, 2]; 0 where there is no pair.

  The whole segments are summed: mask prompts before.
  """
  B, P = batch["example_mask"].shape
  return segment_sum(values, batch["segment_ids"], 2 * P).reshape(B, P, 2)


def likelihood_sums(values: jax.Array, batch: Batch, likelihood: str) -> jax.Array:
  """Sums values [B, T] over the completions of the likelihood term, [B, P]; third ones are segments from 2P + 1.

  `likelihood` is of `likelihood_of`: "chosen", or anything else for the third. Mask prompts before.
  """
  if likelihood == "chosen":
    return side_sums(values, batch)[..., 0]
  P = batch["example_mask"].shape[1]
  return segment_sum(values, jnp.maximum(batch["segment_ids"] - 2 * P, 0), P)


def token_weights(batch: Batch, ld_alpha: float = 1.0) -> jax.Array:
  """Returns 1 for a completion's tokens, [B, T], and ld_alpha for those beyond the length of the shorter side.

  It is 0 elsewhere. In policy and reference alike, as in the paper and TRL 1.x; TRL 0.x weighs the policy alone.

  Source: Liu et al. 2024, eq. 9 (arXiv:2409.06411)
  """
  mask, segments = batch["loss_mask"], batch["segment_ids"]
  if ld_alpha == 1.0:
    return mask
  lengths = side_sums(mask, batch)
  shared = jnp.broadcast_to(lengths.min(axis=-1, keepdims=True), lengths.shape)
  before = jnp.cumsum(lengths.reshape(len(mask), -1), axis=1) - lengths.reshape(len(mask), -1)
  # The number that a token has in its completion, from 1: segments lie in a row one after the other.
  limit = jnp.pad(before + shared.reshape(before.shape), ((0, 0), (1, 0)))  # segment 0 is padding
  beyond = jnp.cumsum(mask, axis=1) > jnp.take_along_axis(limit, segments, axis=1)
  return mask * jnp.where(beyond, ld_alpha, 1.0)


def wpo_weights(scores: TokenScores, batch: Batch) -> jax.Array:
  """Returns w(chosen) * w(rejected), [B, P]: near 1 for what the policy itself would write, small for what not.

  w is the exponential of the mean over a completion's tokens of log p - log sum_v p_v^2. The weights are constants. Not
  cut at 1: neither are the paper's and TRL 1.x's; TRL 0.x cuts the product.

  Args:
    scores: of the policy, [B, T], with log_sum_sq_probs.
    batch: of pairs.

  Source: Zhou et al. 2024, eq. 4 (arXiv:2406.11827)
  """
  relative = (scores.logps - scores.log_sum_sq_probs) * batch["loss_mask"]
  means = per_token(side_sums(relative, batch), side_sums(batch["loss_mask"], batch))
  return jax.lax.stop_gradient(jnp.exp(means.sum(axis=-1)))


def to_pair(logps: jax.Array, batch: Batch, **more) -> Pair:
  """Builds the Pair that preference losses read, for P pairs in each of B rows.

  Args:
    logps: [B, P, 2], the policy's summed log-probabilities of (chosen, rejected).
    batch: lengths come from "loss_mask"; "reference_logps" [B, P, 2] (0 if absent), "mean_nll_tokens" and "matched_*"
      are used if present.
    **more: further arguments of `make_pair`, such as `score`.
  """
  reference, lengths = batch.get("reference_logps", jnp.zeros_like(logps)), side_sums(batch["loss_mask"], batch)
  columns = {name: batch[name] for name in Pair._fields if name.startswith("matched") and name in batch}
  return make_pair(
    logps[..., 0],
    logps[..., 1],
    reference[..., 0],
    reference[..., 1],
    chosen_length=lengths[..., 0],
    rejected_length=lengths[..., 1],
    mean_nll_tokens=batch.get("mean_nll_tokens"),
    **more,
  )._replace(**columns)
