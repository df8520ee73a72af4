"""Positions taken a few at a time, so that the scores of the vocabulary exist for those few alone."""

import jax
import jax.numpy as jnp

from alignjax.sharding import row_shards

CHUNK_TOKENS = 1024  # tokens whose scores [.., V] exist at one time, per device


def size(rows: int, length: int, chunk: int | None = None) -> int:
  """Positions of every row that are taken at a time: `chunk`, or as many as keep rows * size near `CHUNK_TOKENS` per
  device; `length` is then divided evenly."""
  chunk = chunk or max(1, CHUNK_TOKENS * row_shards() // rows)
  return -(-length // -(-length // min(chunk, length)))


def pad(x: jax.Array, chunk: int) -> jax.Array:
  """x [B, T, ...] with zeros after its end, to a multiple of `chunk` positions."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *((0, 0),) * (x.ndim - 2)))


def split(x: jax.Array, chunk: int) -> jax.Array:
  """[B, n*c, ...] -> [n, B, c, ...]."""
  B, T = x.shape[:2]
  return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0)


def join(x: jax.Array) -> jax.Array:
  """[n, B, c, ...] -> [B, n*c, ...]."""
  n, B, c = x.shape[:3]
  return jnp.moveaxis(x, 0, 1).reshape(B, n * c, *x.shape[3:])


def logits(hidden: jax.Array, unembedding: jax.Array, temperature: jax.Array) -> jax.Array:
  """Scores [B, c, V] of one chunk in float32 (or wider), from hidden [B, c, D] and unembedding [V, D]."""
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  return jnp.einsum("btd,vd->btv", hidden, unembedding, preferred_element_type=dtype) / temperature
