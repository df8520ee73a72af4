"""A cache for any causal model: the tokens so far, which the model reads again for every new one.

A token costs a forward pass over the whole ring: correct for every model without code for sampling, but slow for long
texts. Rows are at most as long as the ring, so all shapes are static.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.model.decoder import write_ring
from alignjax.system import sharding

COLUMNS = ("tokens", "segment_ids", "positions")


def empty(rows: int, columns: int) -> dict[str, Any]:
  """Makes a ring of `columns` tokens for each row; segment id 0 marks unwritten ones."""
  cache = {name: sharding.constrain(jnp.zeros((rows, columns), jnp.int32), "batch", None) for name in COLUMNS}
  cache["index"] = jnp.zeros((), jnp.int32)
  return cache


def forward(
  states: Callable[..., jax.Array],
  cache: dict[str, Any],
  tokens: jax.Array,
  segment_ids: jax.Array,
  positions: jax.Array,
) -> tuple[jax.Array, dict[str, Any]]:
  """Computes the hidden states [B, T, D] of T tokens that follow those in the cache.

  Args:
    states: (tokens, segment_ids, positions), int32 [B, C] each -> [B, C, D].
    cache: from `empty`; its index may be any integer.
    tokens: int32 [B, T].
    segment_ids: int32 [B, T].
    positions: int32 [B, T].

  Returns:
    The states and the new cache, as `decoder.forward` does.
  """
  index = cache["index"]
  count = tokens.shape[1]
  new = dict(zip(COLUMNS, (tokens, segment_ids, positions), strict=True))
  rings = {name: write_ring(cache[name], x.astype(jnp.int32), index, axis=1) for name, x in new.items()}
  oldest_first = (jnp.roll(rings[name], -(index + count), axis=1) for name in COLUMNS)
  hidden = states(*oldest_first)
  return hidden[:, -count:], rings | {"index": index + count}
