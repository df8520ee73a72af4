"""Attention: one function chooses between the kernels (splash.py, cudnn.py) and the blockwise computation here."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from alignjax.errors import InputError
from alignjax.model.attention import cudnn, kernel, splash
from alignjax.model.attention.form import Form, Segments, as_segments, dot, layers
from alignjax.system import sharding

QUERY_BLOCK = 256  # a block of queries meets only the keys that it can see: half the work of a full square


def attention(
  implementation: str, form: Form, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | Segments
) -> jax.Array:
  """Computes causal attention within segments: query t sees the columns up to its own that carry its segment id.

  If a token is seen by other segments than its own (a prompt that several completions share), segment_ids are
  [B, T, 1 + n]: its own, and theirs. There is no window then.

  If the mesh splits rows, an all-to-all gives each device whole rows of some heads, and another takes them back.

  Args:
    implementation: "splash", "cudnn", "xla", or "auto": splash on TPUs, cuDNN on GPUs if it supports this, else XLA.
    form: the scale, soft cap and window of the scores.
    q: [B, T, N, H].
    k: [B, T, K, H], with N a multiple of K: each key head serves N/K query heads in a row.
    v: [B, T, K, H].
    segment_ids: int32 [B, T]. cuDNN also needs the number of segments in a row: `Segments`.

  Returns:
    [B, T, N, H].

  Raises:
    InputError: the mesh does not divide the heads, or "cudnn" cannot compute this.
    ValueError: the implementation is unknown.

  Source: Jacobs et al. 2023, section 3.1 (arXiv:2309.14509), of the split rows
  """
  k, v = _a_head_for_each_device(k, v, q.shape[2])
  tokens_apart = ("batch", sharding.dividing(q.shape[1], "tokens"), "heads", None)
  heads_apart = ("batch", None, "attended", None)
  q, k, v = (_move(x, tokens_apart, heads_apart) for x in (q, k, v))
  segments = as_segments(segment_ids)
  ids = sharding.constrain(segments.ids, "batch", *(None,) * (segments.ids.ndim - 1))
  segments = dataclasses.replace(segments, ids=ids)
  return _move(_whole_rows(implementation, form, q, k, v, segments), heads_apart, tokens_apart)


def _move(x, source, target):
  """Moves x from one layout (logical axes) on the mesh to another."""
  return sharding.constrain(sharding.constrain(x, *source), *target)


def _fastest(form, q, segments):
  """Returns the name of the fastest implementation on the platform that is traced for."""
  platform = kernel.platform()
  if platform == "tpu":
    return "splash"
  if platform == "gpu" and not cudnn.limit(form, q, segments):
    return "cudnn"
  return "xla"


def _whole_rows(implementation, form, q, k, v, segments):
  """Returns the attention [B, T, N, H] of whole rows."""
  if implementation == "auto":
    implementation = _fastest(form, q, segments)
  if implementation == "cudnn":
    return cudnn.attention(form, q, k, v, segments)
  if implementation == "splash":
    return splash.attention(form, q, k, v, segments.ids)
  if implementation != "xla":
    raise ValueError(f"unknown attention implementation {implementation!r}")
  return _together(_attend(form, _apart(q, k.shape[2]), k, v, segments.ids))


def _a_head_for_each_device(k, v, heads):
  """Returns the keys and values, their heads repeated if the devices that divide them are more."""
  parts = sharding.ways("attended")
  if heads % parts:
    raise InputError(f"mesh: sequence x tensor = {parts} does not divide the {heads} heads; change one of them")
  kv_heads = k.shape[2]
  copies = math.lcm(kv_heads, parts) // kv_heads
  if copies == 1:
    return k, v
  return jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)


def cached_attention(
  form: Form,
  q: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  query_segments: jax.Array,
  key_segments: jax.Array,
  last: jax.Array,
) -> jax.Array:
  """Computes the attention of the newest T of the C tokens in a cache, a ring whose column `last` holds the newest.

  A query sees the columns up to its own that carry its segment id, within the window of `form`.

  Args:
    form: the scale, soft cap and window of the scores.
    q: [B, T, N, H].
    keys: [B, K, H, C]; with this order, and that of the values, no decode step has to transpose the cache.
    values: [B, K, C, H].
    query_segments: int32 [B, T].
    key_segments: int32 [B, C].
    last: int32 [].

  Returns:
    [B, T, N, H], in q's dtype; for a query that sees nothing (padding), a mean of the values.
  """
  columns = keys.shape[-1]
  age = (last - jnp.arange(columns)) % columns  # of a column, in tokens before the newest
  distance = age - jnp.arange(q.shape[1])[::-1, None]
  seen = form.sees(distance) & (query_segments[:, :, None] == key_segments[:, None, :])
  scores = form.scores("bkgth,bkhc->bkgtc", _apart(q, keys.shape[1]), keys)
  # Finite, so that a query that sees nothing (padding) yields a mean, not NaN.
  scores = jnp.where(seen[:, None, None], scores, -1e30)
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  out = dot("bkgtc,bkch->bkgth", weights.astype(values.dtype), values)
  return _together(out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)


def _apart(q, kv_heads):
  """Reshapes [B, T, N, H] to [B, K, G, T, H].

  With heads before tokens, no matmul transposes anything of the scores' size.
  """
  B, T, N, H = q.shape
  return q.reshape(B, T, kv_heads, N // kv_heads, H).transpose(0, 2, 3, 1, 4)


def _together(out):
  """Reshapes [B, K, G, T, H] to [B, T, N, H]."""
  B, K, G, T, H = out.shape
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form, q, k, v, segment_ids):
  """Computes [B, K, G, T, H] from q of that shape and k, v [B, T, K, H].

  The backward pass keeps the output and one normaliser per query. It computes the scores a second time: to write them
  out and to read them back would take longer.

  Source: Dao et al. 2022, algorithms 1 and 4 (arXiv:2205.14135), without their tiles over keys
  """
  return _forward(form, q, k, v, segment_ids)[0]


def _forward(form, q, k, v, segment_ids):
  """Returns the output, and what the backward pass needs."""
  outs = []
  normalisers = []
  for start, end, first in _blocks(form, q):
    scores = form.scores("bkgth,bckh->bkgtc", q[..., start:end, :], k[:, first:end])
    seen = _seen(form, segment_ids, start, end, first)
    scores = jnp.where(seen[:, None, None], scores, -1e30)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    out = dot("bkgtc,bckh->bkgth", weights.astype(v.dtype), v[:, first:end])
    outs.append((out / total[..., None]).astype(q.dtype))
    normalisers.append(top + jnp.log(total))
  out = jnp.concatenate(outs, axis=-2)
  normaliser = jnp.concatenate(normalisers, axis=-1)
  return out, (q, k, v, segment_ids, out, normaliser)


def _backward(form, residuals, d_out):
  """Returns the gradients of q, k and v."""
  q, k, v, segment_ids, out, normaliser = residuals
  wide = normaliser.dtype
  shift = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)  # sum_c p dp, of the softmax's derivative
  d_q_blocks = []
  d_k_blocks = []
  d_v_blocks = []
  blocks = _blocks(form, q)
  for start, end, first in blocks:
    q_block = q[..., start:end, :]
    d_out_block = d_out[..., start:end, :]
    seen = _seen(form, segment_ids, start, end, first)
    scores = form.scores("bkgth,bckh->bkgtc", q_block, k[:, first:end])
    p = jnp.where(seen[:, None, None], jnp.exp(scores - normaliser[..., start:end, None]), 0)
    d_p = dot("bkgth,bckh->bkgtc", d_out_block, v[:, first:end])
    d_scores = (p * (d_p - shift[..., start:end, None]) * form.slope(scores)).astype(q.dtype)
    d_q_blocks.append(dot("bkgtc,bckh->bkgth", d_scores, k[:, first:end]))
    # The scores keep their layout: a CPU transposes only arrays of the queries' size here.
    d_k_blocks.append(dot("bkgth,bkgtc->bkhc", q_block, d_scores))
    d_v_blocks.append(dot("bkgth,bkgtc->bkhc", d_out_block, p.astype(q.dtype)))
  firsts = [first for _, _, first in blocks]
  d_q = jnp.concatenate(d_q_blocks, axis=-2)
  d_k = _sum_over_blocks(d_k_blocks, firsts, k)
  d_v = _sum_over_blocks(d_v_blocks, firsts, v)
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


def _sum_over_blocks(parts, firsts, like):
  """Sums [B, K, H, end - first] of each block to [B, T, K, H], as `like`; the last block ends at the last key."""
  before = firsts[-1]
  after = like.shape[1] - before - parts[-1].shape[-1]
  total = jnp.pad(parts[-1], ((0, 0), (0, 0), (0, 0), (before, after)))
  for part, first in zip(parts[:-1], firsts[:-1], strict=True):
    total = total.at[..., first : first + part.shape[-1]].add(part)  # in place: a sum of padded parts is slow on CPUs
  return total.transpose(0, 3, 1, 2)


_attend.defvjp(_forward, _backward)


def _blocks(form, q):
  """(start, end, first) of each block of queries start .. end - 1, which see no key before `first` and none from `end`
  on.
  """
  length = q.shape[-2]
  blocks = []
  for start in range(0, length, QUERY_BLOCK):
    first = 0
    if form.window:
      first = max(0, start - form.window + 1)
    blocks.append((start, min(start + QUERY_BLOCK, length), first))
  return blocks


def _seen(form, segment_ids, start, end, first):
  """Returns True where query start + t sees key first + c < end, bool [B, end - start, end - first]."""
  distance = jnp.arange(start, end)[:, None] - jnp.arange(first, end)
  own, *others = layers(segment_ids)
  allowed = (own[:, start:end, None] == ids[:, None, first:end] for ids in (own, *others))
  return form.sees(distance) & functools.reduce(jnp.logical_or, allowed)
