"""Losses over pairs of completions: the arrays that they read, and the record of such a loss. No model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignjax.losses.aggregation import divisor


class Pair(NamedTuple):
  """The arrays that losses over pairs read, all of one shape but for the scalar `mean_nll_tokens`. See `make_pair`.

  Attributes:
    chosen, rejected: log-probabilities of the completions, summed, in nats.
    chosen_ratio, rejected_ratio: the same less the reference's.
    chosen_score, rejected_score: the ratios after the f-divergence (reverse KL: the ratios).
    chosen_length, rejected_length: completion tokens; 0 where there is no pair.
    nll: -log p, summed, of the completions that a likelihood term is of: the chosen ones.
    mean_nll_tokens: their tokens per pair, over all pairs of the optimizer step: a mean over pairs of
      nll / mean_nll_tokens is the mean over tokens.
    matched_gap, matched_chosen, matched_rejected: constants that couple a pair to the whole batch; see `aot`.
  """

  chosen: jax.Array
  rejected: jax.Array
  chosen_ratio: jax.Array
  rejected_ratio: jax.Array
  chosen_score: jax.Array
  rejected_score: jax.Array
  chosen_length: jax.Array
  rejected_length: jax.Array
  nll: jax.Array
  mean_nll_tokens: jax.Array
  matched_gap: jax.Array | None = None
  matched_chosen: jax.Array | None = None
  matched_rejected: jax.Array | None = None

  @property
  def margin(self) -> jax.Array:
    """Score of the chosen side less the rejected's: by how much the policy prefers it more than the reference does."""
    return self.chosen_score - self.rejected_score

  @property
  def chosen_mean(self) -> jax.Array:
    """log p(chosen) per token; 0 for an empty completion."""
    return per_token(self.chosen, self.chosen_length)

  @property
  def rejected_mean(self) -> jax.Array:
    """log p(rejected) per token; 0 for an empty completion."""
    return per_token(self.rejected, self.rejected_length)


def make_pair(
  chosen: jax.Array,
  rejected: jax.Array,
  reference_chosen: jax.Array | float = 0.0,
  reference_rejected: jax.Array | float = 0.0,
  *,
  chosen_length: jax.Array | None = None,
  rejected_length: jax.Array | None = None,
  nll: jax.Array | None = None,
  mean_nll_tokens: jax.Array | None = None,
  score: Callable[[jax.Array], jax.Array] = lambda ratio: ratio,
) -> Pair:
  """Builds the Pair of summed log-probabilities [...] of policy and reference; no reference is a reference of 0.

  The matched_* fields are None: `_replace` sets them.

  Args:
    chosen, rejected, reference_chosen, reference_rejected: nats.
    chosen_length, rejected_length: tokens; 1 if None, so that what is averaged stays as it was given.
    nll: -chosen if None.
    mean_nll_tokens: the mean of chosen_length if None: the arrays are then the whole step.
    score: one of `divergence.DIVERGENCES`.
  """
  chosen_ratio, rejected_ratio = chosen - reference_chosen, rejected - reference_rejected
  chosen_length = jnp.ones_like(chosen) if chosen_length is None else chosen_length
  return Pair(
    chosen=chosen,
    rejected=rejected,
    chosen_ratio=chosen_ratio,
    rejected_ratio=rejected_ratio,
    chosen_score=score(chosen_ratio),
    rejected_score=score(rejected_ratio),
    chosen_length=chosen_length,
    rejected_length=jnp.ones_like(rejected) if rejected_length is None else rejected_length,
    nll=-chosen if nll is None else nll,
    mean_nll_tokens=divisor(jnp.mean(chosen_length)) if mean_nll_tokens is None else mean_nll_tokens,
  )


def both_ways(chosen: jax.Array, rejected: jax.Array, confidence: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Stacks values of pairs' sides, and the same turned over, to (chosen [2, ...], rejected [2, ...]), for `expected`.

  A way without weight, of confidence 0 or 1, is the other one: its loss may not be finite.

  Args:
    chosen, rejected: of the pairs as labelled, of one shape.
    confidence: the probability that the label is right, of a shape that broadcasts to theirs.
  """
  turns = confidence < 1
  stays = confidence > 0
  return (
    jnp.stack([jnp.where(stays, chosen, rejected), jnp.where(turns, rejected, chosen)]),
    jnp.stack([jnp.where(stays, rejected, chosen), jnp.where(turns, chosen, rejected)]),
  )


def expected(both: jax.Array, confidence: jax.Array) -> jax.Array:
  """Computes confidence * both[0] + (1 - confidence) * both[1] of numbers [2, ...] of pairs and turned pairs."""
  return confidence * both[0] + (1 - confidence) * both[1]


def abstract_pair(shape: tuple[int, ...]) -> Pair:
  """Returns a Pair of abstract float32 arrays of a shape, to trace a loss with; the matched_* fields are None."""
  wide: Any = jax.ShapeDtypeStruct(shape, jnp.float32)  # in place of an array
  fields = dict.fromkeys(Pair._fields, wide) | {"mean_nll_tokens": jax.ShapeDtypeStruct((), jnp.float32)}
  return Pair(**(fields | dict.fromkeys(("matched_gap", "matched_chosen", "matched_rejected"))))


Sides = tuple[jax.Array, jax.Array]  # of the chosen and the rejected completions, [B, P] each


def log_ratios(pair: Pair) -> Sides:
  """Returns the ratios to the reference, in nats: implied rewards divided by beta, whatever the divergence."""
  return pair.chosen_ratio, pair.rejected_ratio


def sums(pair: Pair) -> Sides:
  """Returns the summed log-probabilities of (chosen, rejected) completions, in nats: what is logged as logps/*."""
  return pair.chosen, pair.rejected


def no_metrics(pair: Pair) -> dict[str, jax.Array]:
  """Returns {}, the metrics of an objective that logs only what all log."""
  del pair
  return {}


class PairObjective(NamedTuple):
  """A loss over pairs, and all that an algorithm must know of it.

  Attributes:
    loss: (pair, *, hyper-parameters) -> losses of the pairs, in the pair's shape.
    reference: whether it reads the reference's log-probabilities.
    divergence: whether it allows any f-divergence: it reads the ratios through the scores alone, or not at all.
    likelihood: whether it has a likelihood term (`Pair.nll`), which may be of a third completion.
    third: whether that term is of a third completion by default.
    match: (pairs of the whole batch, which exist) -> the matched_* columns that couple them; None if pairs are apart.
    rewards: (pair, *, hyper-parameters) -> implied rewards divided by beta, for the metrics rewards/*.
    logps: (pair) -> (logps/chosen, logps/rejected) to log, as TRL does.
    metrics: (pair) -> further metrics of the pairs.
  """

  loss: Callable[..., jax.Array]
  reference: bool = True
  divergence: bool = False
  likelihood: bool = False
  third: bool = False
  match: Callable[[Pair, jax.Array], dict[str, jax.Array]] | None = None
  rewards: Callable[..., Sides] = log_ratios
  logps: Callable[[Pair], Sides] = sums
  metrics: Callable[[Pair], dict[str, jax.Array]] = no_metrics


def per_token(total: jax.Array, length: jax.Array) -> jax.Array:
  """Divides a sum by its length in tokens; 0 for what is empty, whose total is 0."""
  return total / jnp.maximum(length, 1.0)
