"""Attention: one function chooses the implementation. The seam for TPU and GPU kernels."""

import jax
import jax.numpy as jnp

QUERY_BLOCK = 256  # a block of queries meets only the keys that it can see: half the work of a full square


def attention(
  implementation: str,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segments: jax.Array,
  key_segments: jax.Array,
  first_column: jax.Array | int = 0,
) -> jax.Array:
  """Causal attention within segments.

  Query t stands in column `first_column + t`; it sees the columns up to its own that carry its segment id.

  Args:
    implementation: "auto" or "xla"; "auto" chooses for the device at hand.
    q: [B, T, N, H].
    k: [B, C, K, H], with N a multiple of K: each key head serves N/K query heads in a row.
    v: [B, C, K, H].
    query_segments: int32 [B, T].
    key_segments: int32 [B, C].
    first_column: 0 where keys and queries are the same tokens; a cache's index otherwise.

  Returns:
    [B, T, N, H].
  """
  if implementation not in ("auto", "xla"):
    raise ValueError(f"unknown attention implementation {implementation!r}")
  length = q.shape[1]
  if not isinstance(first_column, int) or length != k.shape[1] or length % QUERY_BLOCK:
    return _attend(q, k, v, query_segments, key_segments, first_column)
  blocks = []
  for start in range(0, length, QUERY_BLOCK):
    end = start + QUERY_BLOCK
    blocks.append(
      _attend(
        q[:, start:end], k[:, :end], v[:, :end], query_segments[:, start:end], key_segments[:, :end],
        first_column + start,
      )
    )  # fmt: skip
  return jnp.concatenate(blocks, axis=1)


def _attend(q, k, v, query_segments, key_segments, first_column):
  B, T, N, H = q.shape
  C, K = k.shape[1:3]
  q = q.reshape(B, T, K, N // K, H) * H**-0.5
  accumulate = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum("btkgh,bckh->bkgtc", q, k, preferred_element_type=accumulate)
  seen = jnp.arange(C) <= first_column + jnp.arange(T)[:, None]
  seen = seen & (query_segments[:, :, None] == key_segments[:, None, :])
  # A large finite number: a query that sees nothing (padding beside a cache) yields a mean, not NaN.
  scores = jnp.where(seen[:, None, None], scores, -1e30)
  probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum("bkgtc,bckh->btkgh", probabilities, v, preferred_element_type=accumulate)
  return out.astype(q.dtype).reshape(B, T, N, H)
