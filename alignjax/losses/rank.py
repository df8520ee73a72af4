"""Pairs that meet in the batch by rank: the columns that `aot` and `aot_unpaired` compare each pair with."""

import jax
import jax.numpy as jnp

from alignjax.losses.pair import Pair


def match_gaps(pair: Pair, exists: jax.Array) -> dict[str, jax.Array]:
  """Returns {"matched_gap": an array of the pairs' shape}, the constants that `aot` reads.

  Args:
    pair: all pairs of a whole batch, not of a part of it.
    exists: the pairs' shape, nonzero where there is one; the others get 0.
  """
  reference_gap = (pair.chosen - pair.rejected) - (pair.chosen_ratio - pair.rejected_ratio)
  return {"matched_gap": of_equal_rank(pair.chosen - pair.rejected, reference_gap, exists)}


def match_ratios(pair: Pair, exists: jax.Array) -> dict[str, jax.Array]:
  """Returns {"matched_chosen", "matched_rejected": arrays of the pairs' shape}, the constants of `aot_unpaired`.

  Args:
    pair, exists: as in `match_gaps`.
  """
  chosen, rejected = pair.chosen_ratio, pair.rejected_ratio
  return {
    "matched_chosen": of_equal_rank(rejected, chosen, exists),
    "matched_rejected": of_equal_rank(chosen, rejected, exists),
  }


def of_equal_rank(values: jax.Array, others: jax.Array, exists: jax.Array) -> jax.Array:
  """Matches each of `values` with the entry of `others` that has the same rank; constants, 0 where nothing exists.

  All three arguments have one shape; ranks are over the whole arrays, `exists` is nonzero where there is a pair.
  """
  there = exists.ravel() > 0
  order = jnp.argsort(jnp.where(there, values.ravel(), jnp.inf))
  in_order = jnp.sort(jnp.where(there, others.ravel(), jnp.inf))
  matched = jnp.zeros_like(in_order).at[order].set(in_order)
  return jax.lax.stop_gradient(jnp.where(there, matched, 0).reshape(values.shape))
