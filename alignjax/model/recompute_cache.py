"""A cache for any causal model: the tokens so far, which every new one has the model read again.

A token costs a forward pass over the whole ring: right for every model, without a line of it written for sampling, and
slow for long texts. Rows are at most as long as the ring, so all shapes are static.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.model.decoder import write_ring
from alignjax.system import sharding

COLUMNS = ("tokens", "segment_ids", "positions")


def empty(rows: int, columns: int) -> dict[str, Any]:
  """A ring of `columns` tokens for each row; segment id 0 marks unwritten ones."""
  ring = lambda: sharding.constrain(jnp.zeros((rows, columns), jnp.int32), "batch", None)
  return {name: ring() for name in COLUMNS} | {"index": jnp.zeros((), jnp.int32)}


def forward(
  states: Callable[..., jax.Array],
  cache: dict[str, Any],
  tokens: jax.Array,
  segment_ids: jax.Array,
  positions: jax.Array,
) -> tuple[jax.Array, dict[str, Any]]:
  """Hidden states [B, T, D] of T tokens behind those in the cache, and the cache with them, as of `decoder.forward`.

  Args:
    states: (tokens, segment_ids, positions), int32 [B, C] each -> [B, C, D].
    cache: from `empty`; its index may be any integer.
    tokens: int32 [B, T].
    segment_ids: int32 [B, T].
    positions: int32 [B, T].
  """
  index, count = cache["index"], tokens.shape[1]
  new = dict(zip(COLUMNS, (tokens, segment_ids, positions), strict=True))
  rings = {name: write_ring(cache[name], x.astype(jnp.int32), index, axis=1) for name, x in new.items()}
  oldest_first = lambda ring: jnp.roll(ring, -(index + count), axis=1)
  hidden = states(*(oldest_first(rings[name]) for name in COLUMNS))
  return hidden[:, -count:], rings | {"index": index + count}
