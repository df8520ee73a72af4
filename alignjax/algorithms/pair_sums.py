"""From log-probabilities of tokens to those of a pair's sides: sums over segments, weights, and the Pair of losses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import segments
from alignjax.data import segment
from alignjax.losses.logps import TokenScores, next_token_scores, segment_sum
from alignjax.losses.pair import Pair, both_ways, make_pair, per_token
from alignjax.model.decoder import Model
from alignjax.types import Batch, Params, Rows


def token_scores(model: Model, params: Params, rows: Rows, sides: int = 2, **also: bool) -> TokenScores:
  """Computes `next_token_scores` of the rows' tokens, [B, T].

  Args:
    model, params: policy or reference.
    rows: of pairs, or of triples.
    sides: texts of an example, 2 or 3.
    **also: of `losses.logps.token_scores`, such as entropy=True.
  """
  hidden, _ = model.forward(params, rows["tokens"], segments(rows, sides), rows["positions"])
  return next_token_scores(hidden, model.unembedding(params), rows["tokens"], **also)


def pair_logps(model: Model, params: Params, rows: Rows, ld_alpha: float = 1.0, sides: int = 2) -> jax.Array:
  """Computes the log-probabilities of the completions, [B, P, 2] in nats, weighted by `token_weights`; 0 for no pair.

  `sides` is the number of texts of an example: 3 for rows with third completions, which are not in the result.
  """
  return side_sums(token_scores(model, params, rows, sides).logps * token_weights(rows, ld_alpha), rows)


def side_sums(values: jax.Array, rows: Rows) -> jax.Array:
  """Sums values [B, T] over each pair's sides (chosen, rejected), [B, P, 2]; 0 where there is no pair.

  The whole segments are summed: mask prompts before.
  """
  texts = segment.count(rows["example_mask"].shape[1], segment.PAIR)
  return segment.by_example(segment_sum(values, rows["segment_ids"], texts), segment.PAIR)


def likelihood_sums(values: jax.Array, rows: Rows, likelihood: str) -> jax.Array:
  """Sums values [B, T] over the completions of the likelihood term, [B, P, 2]: of each pair, and of the turned pair.

  `likelihood` is of `likelihood_of`: "chosen", or anything else for the third, which both have. Mask prompts before.
  """
  if likelihood == "chosen":
    return side_sums(values, rows)
  P = rows["example_mask"].shape[1]
  third = segment_sum(values, segment.thirds(rows["segment_ids"], P), P)
  return jnp.stack([third, third], axis=-1)


def token_weights(rows: Rows, ld_alpha: float = 1.0) -> jax.Array:
  """Returns 1 for a completion's tokens, [B, T], and ld_alpha for those beyond the length of the shorter side.

  It is 0 elsewhere. In policy and reference alike, as in the paper and TRL 1.x; TRL 0.x weighs the policy alone.

  Source: Liu et al. 2024, eq. 9 (arXiv:2409.06411)
  """
  mask = rows["loss_mask"]
  if ld_alpha == 1.0:
    return mask
  sides = side_sums(mask, rows)
  shared = jnp.broadcast_to(sides.min(axis=-1, keepdims=True), sides.shape)
  lengths = segment.by_segment(sides)
  before = jnp.cumsum(lengths, axis=1) - lengths
  # The number that a token has in its completion, from 1: segments lie in a row one after the other.
  limit = jnp.pad(before + segment.by_segment(shared), ((0, 0), (1, 0)))  # segment 0 is padding
  beyond = jnp.cumsum(mask, axis=1) > jnp.take_along_axis(limit, rows["segment_ids"], axis=1)
  return mask * jnp.where(beyond, ld_alpha, 1.0)


def wpo_weights(scores: TokenScores, rows: Rows) -> jax.Array:
  """Returns w(chosen) * w(rejected), [B, P]: near 1 for what the policy itself would write, small for what not.

  w is the exponential of the mean over a completion's tokens of log p - log sum_v p_v^2. The weights are constants. Not
  cut at 1: neither are the paper's and TRL 1.x's; TRL 0.x cuts the product.

  Args:
    scores: of the policy, [B, T], with log_sum_sq_probs.
    rows: of pairs.

  Source: Zhou et al. 2024, eq. 4 (arXiv:2406.11827)
  """
  relative = (scores.logps - scores.log_sum_sq_probs) * rows["loss_mask"]
  means = per_token(side_sums(relative, rows), side_sums(rows["loss_mask"], rows))
  return jax.lax.stop_gradient(jnp.exp(means.sum(axis=-1)))


def confidences(rows: Rows) -> jax.Array:
  """Returns the probability that the label of each pair is right, [B, P]; 1 for pairs that no data set labelled."""
  return rows.get("confidences", jnp.ones_like(rows["weights"]))


def to_pairs(logps: jax.Array, batch: Batch, nll: jax.Array, **more) -> Pair:
  """Builds the Pair [2, B, P] that preference losses read: the pairs of each row, and the same turned over.

  Args:
    logps: [B, P, 2], the policy's summed log-probabilities of (chosen, rejected).
    batch: lengths come from "loss_mask"; "reference_logps" [B, P, 2] (0 if absent), "confidences" (1), "matched_*" and
      the total "mean_nll_tokens" are used if present.
    nll: [B, P, 2], of the likelihood term: for the pair, and for the turned one.
    **more: further arguments of `make_pair`, such as `score`.
  """
  rows = batch.rows

  def ways(values):
    return both_ways(values[..., 0], values[..., 1], confidences(rows))

  chosen, rejected = ways(logps)
  reference_chosen, reference_rejected = ways(rows.get("reference_logps", jnp.zeros_like(logps)))
  chosen_length, rejected_length = ways(side_sums(rows["loss_mask"], rows))
  matched = {name: rows[name] for name in Pair._fields if name.startswith("matched") and name in rows}
  return make_pair(
    chosen,
    rejected,
    reference_chosen,
    reference_rejected,
    chosen_length=chosen_length,
    rejected_length=rejected_length,
    nll=ways(nll)[0],
    mean_nll_tokens=batch.totals.get("mean_nll_tokens"),
    **more,
  )._replace(**{name: jnp.moveaxis(column, -1, 0) for name, column in matched.items()})


def matched_columns(match: Callable[[Pair, jax.Array], Rows], logps: jax.Array, batch: Batch) -> Rows:
  """Returns the columns [B, P, 2] that couple the pairs, and the turned pairs, of a whole batch.

  Each way of a pair takes part if it may be the right one. Ranks have no weights: a pair of confidence below 1 has two
  of them, however little its label is doubted.

  Args:
    match: `PairObjective.match`.
    logps: [B, P, 2], the policy's.
    batch: of the whole step.
  """
  exists = batch.rows["example_mask"]
  confidence = confidences(batch.rows)
  exist = jnp.stack([exists * (confidence > 0), exists * (confidence < 1)])
  columns = match(to_pairs(logps, batch, -logps), exist)
  return {name: jnp.moveaxis(column, 0, -1) for name, column in columns.items()}
