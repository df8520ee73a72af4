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
  """Causal attention within segments: query t sees the columns up to its own that carry its segment id.

  Where a token is seen by other segments than its own (a prompt that several completions share), segment_ids are
  [B, T, 1 + n]: its own, and theirs. There is no window then.

  Where the mesh splits rows, an all-to-all gives each device whole rows of some heads, and another takes them back.

  Args:
    implementation: "splash", "cudnn", "xla", or "auto": the first on TPUs, the second on GPUs where it can, else XLA.
    form: what is computed.
    q: [B, T, N, H].
    k: [B, T, K, H], with N a multiple of K: each key head serves N/K query heads in a row.
    v: [B, T, K, H].
    segment_ids: int32 [B, T]; with the most of a row, or cuDNN is not asked.

  Returns:
    [B, T, N, H].

  Raises:
    InputError: heads that the mesh does not divide, or "cudnn" can not compute that.

  Source: Jacobs et al. 2023, section 3.1 (arXiv:2309.14509), of the split rows
  """
  k, v = _a_head_for_each_device(k, v, q.shape[2])
  tokens_apart = ("batch", sharding.dividing(q.shape[1], "tokens"), "heads", None)
  heads_apart = ("batch", None, "attended", None)
  move = lambda x, here, there: sharding.constrain(sharding.constrain(x, *here), *there)
  q, k, v = (move(x, tokens_apart, heads_apart) for x in (q, k, v))
  segments = as_segments(segment_ids)
  ids = sharding.constrain(segments.ids, "batch", *(None,) * (segments.ids.ndim - 1))
  segments = dataclasses.replace(segments, ids=ids)
  return move(_whole_rows(implementation, form, q, k, v, segments), heads_apart, tokens_apart)


def _whole_rows(implementation, form, q, k, v, segments):
  if implementation == "auto":
    platform = kernel.platform()
    on_gpu = platform == "gpu" and not cudnn.limit(form, q, segments)
    implementation = "splash" if platform == "tpu" else "cudnn" if on_gpu else "xla"
  if implementation == "cudnn":
    return cudnn.attention(form, q, k, v, segments)
  if implementation == "splash":
    return splash.attention(form, q, k, v, segments.ids)
  if implementation != "xla":
    raise ValueError(f"unknown attention implementation {implementation!r}")
  return _together(_attend(form, _apart(q, k.shape[2]), k, v, segments.ids))


def _a_head_for_each_device(k, v, heads):
  """The keys and values, their heads repeated where there are fewer than devices that take some of them."""
  parts, kv_heads = sharding.ways("attended"), k.shape[2]
  if heads % parts:
    raise InputError(f"mesh: sequence x tensor = {parts} does not divide the {heads} heads; change one of them")
  copies = math.lcm(kv_heads, parts) // kv_heads
  return (k, v) if copies == 1 else (jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2))


def cached_attention(
  form: Form,
  q: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  query_segments: jax.Array,
  key_segments: jax.Array,
  last: jax.Array,
) -> jax.Array:
  """The same for the newest T of the C tokens in a cache, which is a ring: column `last` holds the newest of all.

  Args:
    form: what is computed.
    q: [B, T, N, H].
    keys: [B, K, H, C]: in this order, as values in theirs, no decode step has to transpose the cache.
    values: [B, K, C, H].
    query_segments: int32 [B, T].
    key_segments: int32 [B, C].
    last: int32 [].

  Returns:
    [B, T, N, H].
  """
  queries, columns = q.shape[1], keys.shape[-1]
  age = (last - jnp.arange(columns)) % columns  # of a column, in tokens before the newest
  distance = age - jnp.arange(queries)[::-1, None]
  seen = form.sees(distance) & (query_segments[:, :, None] == key_segments[:, None, :])
  scores = form.scores("bkgth,bkhc->bkgtc", _apart(q, keys.shape[1]), keys)
  # A large finite number: a query that sees nothing (padding) yields a mean, not NaN.
  scores = jnp.where(seen[:, None, None], scores, -1e30)
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  out = dot("bkgtc,bkch->bkgth", weights.astype(values.dtype), values)
  return _together(out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)


def _apart(q, kv_heads):
  """[B, K, G, T, H]: heads before tokens, as the scores have them; so no matmul transposes anything of their size."""
  B, T, N, H = q.shape
  return q.reshape(B, T, kv_heads, N // kv_heads, H).transpose(0, 2, 3, 1, 4)


def _together(out):
  """[B, T, N, H] again."""
  B, K, G, T, H = out.shape
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form, q, k, v, segment_ids):
  """[B, K, G, T, H] from q of that shape and k, v [B, T, K, H].

  The backward pass keeps the output and one normaliser per query, and computes the scores a second time: writing them
  out, and reading them back, would take longer.

  Source: Dao et al. 2022, algorithms 1 and 4 (arXiv:2205.14135), without their tiles over keys
  """
  return _forward(form, q, k, v, segment_ids)[0]


def _forward(form, q, k, v, segment_ids):
  outs, normalisers = [], []
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
  out, normaliser = jnp.concatenate(outs, axis=-2), jnp.concatenate(normalisers, axis=-1)
  return out, (q, k, v, segment_ids, out, normaliser)


def _backward(form, residuals, d_out):
  q, k, v, segment_ids, out, normaliser = residuals
  wide = normaliser.dtype
  shift = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)  # sum_c p dp, of the softmax's derivative
  d_q, d_k, d_v = [], [], []
  blocks = _blocks(form, q)
  for start, end, first in blocks:
    q_block, d_out_block = q[..., start:end, :], d_out[..., start:end, :]
    seen = _seen(form, segment_ids, start, end, first)
    of_query = lambda x: x[..., start:end, None]  # noqa: B023
    scores = form.scores("bkgth,bckh->bkgtc", q_block, k[:, first:end])
    p = jnp.where(seen[:, None, None], jnp.exp(scores - of_query(normaliser)), 0)
    d_p = dot("bkgth,bckh->bkgtc", d_out_block, v[:, first:end])
    d_scores = (p * (d_p - of_query(shift)) * form.slope(scores)).astype(q.dtype)
    d_q.append(dot("bkgtc,bckh->bkgth", d_scores, k[:, first:end]))
    # The scores stay where they are: what a CPU transposes here has the size of the queries.
    d_k.append(dot("bkgth,bkgtc->bkhc", q_block, d_scores))
    d_v.append(dot("bkgth,bkgtc->bkhc", d_out_block, p.astype(q.dtype)))
  firsts = [first for _, _, first in blocks]
  d_q, d_k, d_v = jnp.concatenate(d_q, axis=-2), _sum_over_blocks(d_k, firsts, k), _sum_over_blocks(d_v, firsts, v)
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


def _sum_over_blocks(parts, firsts, like):
  """[B, T, K, H], as `like`, from [B, K, H, end - first] of each block; the last ends last."""
  before, after = firsts[-1], like.shape[1] - firsts[-1] - parts[-1].shape[-1]
  total = jnp.pad(parts[-1], ((0, 0), (0, 0), (0, 0), (before, after)))
  for part, first in zip(parts[:-1], firsts[:-1], strict=True):
    total = total.at[..., first : first + part.shape[-1]].add(part)  # in place: a sum of padded parts is slow on CPUs
  return total.transpose(0, 3, 1, 2)


_attend.defvjp(_forward, _backward)


def _blocks(form, q):
  """(first, last + 1, first key) of the queries that are taken together: they see no keys before, and none after."""
  length = q.shape[-2]
  starts = range(0, length, QUERY_BLOCK)
  first = lambda start: max(0, start - form.window + 1) if form.window else 0
  return [(start, min(start + QUERY_BLOCK, length), first(start)) for start in starts]


def _seen(form, segment_ids, start, end, first):
  """Whether query start + t sees key first + c < end, bool [B, end - start, end - first]."""
  distance = jnp.arange(start, end)[:, None] - jnp.arange(first, end)
  own, *others = layers(segment_ids)
  allowed = (own[:, start:end, None] == ids[:, None, first:end] for ids in (own, *others))
  return form.sees(distance) & functools.reduce(jnp.logical_or, allowed)
