"""From per-token losses to one number, by counts of the whole (mini)batch: parts of a batch add up to the whole."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def divisor(total: jax.Array) -> jax.Array:
  """Returns a float sum of weights as a divisor, at least the smallest positive float: the mean of nothing is then 0.

  A sum below 1 is not replaced by 1: a mean does not depend on the unit of its weights.
  """
  total = jnp.asarray(total)
  return jnp.maximum(total, jnp.finfo(total.dtype).tiny)


class Counts(NamedTuple):
  """Scalars of the whole (mini)batch, not of a part of it, all above 0; see `count`.

  Attributes:
    tokens: the sum of the masks.
    sequences: rows that have a completion, even if its mask is 0.
    max_tokens: sequences times the length of the longest completion that is allowed.
  """

  tokens: jax.Array
  sequences: jax.Array
  max_tokens: jax.Array


def count(mask: jax.Array, exists: jax.Array, max_length: int) -> Counts:
  """Counts the tokens and sequences that `aggregate` divides by; each count goes through `divisor`, so it is above 0.

  Args:
    mask: [B, T] of the whole (mini)batch, 1 on the tokens that are learned from.
    exists: [B], true where a row has a completion, even if its mask is 0.
    max_length: tokens that a completion may have at most.
  """
  sequences = divisor(jnp.sum(exists.astype(mask.dtype)))
  return Counts(divisor(jnp.sum(mask)), sequences, sequences * max_length)


def token_mean(losses: jax.Array, mask: jax.Array, counts: Counts) -> jax.Array:
  """Returns the sum over all tokens / tokens: long completions have more weight.

  Source: Yu et al. 2025, section 3.3 (arXiv:2503.14476)
  """
  return jnp.sum(losses * mask) / counts.tokens


def sequence_mean(losses: jax.Array, mask: jax.Array, counts: Counts) -> jax.Array:
  """Returns the sum over completions of their tokens' mean / sequences: a token of a long completion has less weight.

  Source: Shao et al. 2024, eq. 3 (arXiv:2402.03300)
  """
  length = jnp.maximum(jnp.sum(mask, axis=1), 1)
  return jnp.sum(jnp.sum(losses * mask, axis=1) / length) / counts.sequences


def sequence_sum(losses: jax.Array, mask: jax.Array, counts: Counts) -> jax.Array:
  """Returns the sum over all tokens / sequences."""
  return jnp.sum(losses * mask) / counts.sequences


def constant(losses: jax.Array, mask: jax.Array, counts: Counts) -> jax.Array:
  """Returns the sum over all tokens / max_tokens: a token has the same weight in every batch.

  Source: Liu et al. 2025, section 3.2 (arXiv:2503.20783)
  """
  return jnp.sum(losses * mask) / counts.max_tokens


AGGREGATIONS = {f.__name__: f for f in (token_mean, sequence_mean, sequence_sum, constant)}


def aggregate(losses: jax.Array, mask: jax.Array, how: str, counts: Counts) -> jax.Array:
  """Aggregates per-token losses [B, T] to a scalar; the results of a batch's parts add up to that of the batch.

  Args:
    losses: [B, T]; ignored where the mask is 0, even NaN.
    mask: [B, T], 1 on the tokens that are learned from.
    how: one of AGGREGATIONS.
    counts: of the whole (mini)batch, by `count`, not of the rows given.
  """
  return AGGREGATIONS[how](jnp.where(mask > 0, losses, 0), mask, counts)
