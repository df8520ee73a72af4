"""Attention: one function chooses the implementation. The seam for TPU and GPU kernels."""

import functools

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

  Query t stands in column `first_column + t`; it sees that and the older columns that carry its segment id. The columns
  are a ring: that after the last query's is the oldest (where keys and queries are the same tokens, there is none).

  Args:
    implementation: "auto" or "xla"; "auto" chooses for the device at hand.
    q: [B, T, N, H].
    k: [B, C, K, H], with N a multiple of K: each key head serves N/K query heads in a row.
    v: [B, C, K, H].
    query_segments: int32 [B, T].
    key_segments: int32 [B, C].
    first_column: 0 where keys and queries are the same tokens; a cache's column otherwise.

  Returns:
    [B, T, N, H].
  """
  if implementation not in ("auto", "xla"):
    raise ValueError(f"unknown attention implementation {implementation!r}")
  B, T, N, H = q.shape
  C, K = k.shape[1:3]
  blocks = ((0, T, C),)
  if isinstance(first_column, int):
    ends = ((t, min(t + QUERY_BLOCK, T)) for t in range(0, T, QUERY_BLOCK))
    blocks = tuple((start, end, min(first_column + end, C)) for start, end in ends)
  # Heads before tokens, as the scores have them: so no matmul below transposes anything of the size of the scores.
  q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  out = _attend(blocks, q, k, v, query_segments, key_segments, jnp.int32(first_column))
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks, q, k, v, query_segments, key_segments, first_column):
  """[B, K, G, T, H] from q of that shape and k, v [B, C, K, H]; blocks of (first query, last query + 1, keys).

  The backward pass keeps the output and one normaliser per query, and computes the scores a second time: writing them
  out, and reading them back, would take longer.

  Source: Dao et al. 2022, algorithms 1 and 4 (arXiv:2205.14135), without their tiles over keys
  """
  return _forward(blocks, q, k, v, query_segments, key_segments, first_column)[0]


def _forward(blocks, q, k, v, query_segments, key_segments, first_column):
  outs, normalisers = [], []
  for start, end, keys in blocks:
    scores = _dot("bkgth,bckh->bkgtc", q[..., start:end, :], k[:, :keys]) * q.shape[-1] ** -0.5
    seen = _seen(query_segments[:, start:end], key_segments[:, :keys], first_column + start)
    # A large finite number: a query that sees nothing (padding beside a cache) yields a mean, not NaN.
    scores = jnp.where(seen[:, None, None], scores, -1e30)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    out = _dot("bkgtc,bckh->bkgth", weights.astype(v.dtype), v[:, :keys])
    outs.append((out / total[..., None]).astype(q.dtype))
    normalisers.append(top + jnp.log(total))
  out, normaliser = jnp.concatenate(outs, axis=-2), jnp.concatenate(normalisers, axis=-1)
  return out, (q, k, v, query_segments, key_segments, first_column, out, normaliser)


def _backward(blocks, residuals, d_out):
  q, k, v, query_segments, key_segments, first_column, out, normaliser = residuals
  scale, wide = q.shape[-1] ** -0.5, normaliser.dtype
  shift = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)  # sum_c p dp, of the softmax's derivative
  d_q, d_k, d_v = [], [], []
  for start, end, keys in blocks:
    q_block, d_out_block = q[..., start:end, :], d_out[..., start:end, :]
    seen = _seen(query_segments[:, start:end], key_segments[:, :keys], first_column + start)
    of_query = lambda x: x[..., start:end, None]  # noqa: B023
    scores = _dot("bkgth,bckh->bkgtc", q_block, k[:, :keys]) * scale
    p = jnp.where(seen[:, None, None], jnp.exp(scores - of_query(normaliser)), 0)
    d_p = _dot("bkgth,bckh->bkgtc", d_out_block, v[:, :keys])
    d_scores = (p * (d_p - of_query(shift)) * scale).astype(q.dtype)
    d_q.append(_dot("bkgtc,bckh->bkgth", d_scores, k[:, :keys]))
    # The scores stay where they are: what a CPU transposes here has the size of the queries.
    d_k.append(_dot("bkgth,bkgtc->bkhc", q_block, d_scores))
    d_v.append(_dot("bkgth,bkgtc->bkhc", d_out_block, p.astype(q.dtype)))
  d_q, d_k, d_v = jnp.concatenate(d_q, axis=-2), _sum_over_blocks(d_k, k), _sum_over_blocks(d_v, v)
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, None


def _sum_over_blocks(parts, like):
  """[B, C, K, H], as `like`, from [B, K, H, keys] of each block; the last has the most keys."""
  total = jnp.pad(parts[-1], ((0, 0), (0, 0), (0, 0), (0, like.shape[1] - parts[-1].shape[-1])))
  for part in parts[:-1]:
    total = total.at[..., : part.shape[-1]].add(part)  # in place: a sum of padded parts is slow on CPUs
  return total.transpose(0, 3, 1, 2)


_attend.defvjp(_forward, _backward)


def _seen(query_segments, key_segments, first_column):
  """Whether query t sees key c, bool [B, T, C]."""
  queries, keys = query_segments.shape[1], key_segments.shape[1]
  age = (first_column + queries - 1 - jnp.arange(keys)) % keys  # of a key, in tokens before the last query
  causal = age >= jnp.arange(queries)[::-1, None]
  return causal & (query_segments[:, :, None] == key_segments[:, None, :])


def _dot(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
