"""Attention on TPUs: the splash kernel that comes with JAX, which never writes a score to memory.

It skips the blocks of keys that no query of a block can see, forwards and backwards. It supports segments, grouped
heads, sliding windows and soft caps. Each device runs it on its own rows and heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.model.attention import kernel
from alignjax.model.attention.form import Form, layers

LANES = 128  # of a TPU's vector unit: rows are taken in multiples of it
QUERIES = 512  # of a block at most: larger ones do not fit a v5e's vector memory
KEYS = 1024  # likewise


def attention(form: Form, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """Computes `attention.attention` of whole rows. On other platforms than TPUs the kernel is interpreted: slow."""
  return kernel.on_each_device(functools.partial(_local, form), q, k, v, segment_ids)


def _local(form, q, k, v, segment_ids):
  """Returns the attention of one device's rows and heads."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash  # slow to import
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  tokens, heads = q.shape[1:3]
  length = -(-tokens // LANES) * LANES

  def padded(x, value):
    widths = ((0, 0), (0, length - tokens), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, widths, constant_values=value)

  own, *others = (padded(ids, -1) for ids in layers(segment_ids))  # -1: of no text
  if others:  # a key has one id in the kernel: keys that several segments see are repeated for each
    mask = masks.NumpyMask(np.tile(np.tri(length, dtype=bool), 1 + len(others)))
  elif form.window:
    mask = masks.LocalMask((length, length), (form.window - 1, 0), 0)
  else:
    mask = masks.CausalMask((length, length))
  queries = _block(length, QUERIES)
  keys = _block(length, KEYS)
  attend = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=splash.BlockSizes(
      block_q=queries,
      block_kv=keys,
      block_kv_compute=min(keys, 512),
      block_q_dkv=queries,
      block_kv_dkv=keys,
      block_kv_dkv_compute=min(keys, 512),
      block_q_dq=queries,
      block_kv_dq=keys,
    ),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=form.softcap or None,
    interpret=kernel.platform() != "tpu",
  )

  def heads_first(x):
    return padded(x, 0).swapaxes(1, 2)

  def repeated(x):
    return jnp.concatenate([x] * (1 + len(others)), axis=2)

  def attend_row(q, k, v, ids, key_ids):
    return attend(q, k, v, segment_ids=splash.SegmentIds(ids, key_ids))

  scaled = (q.astype(jnp.promote_types(q.dtype, jnp.float32)) * form.scale).astype(q.dtype)
  q = heads_first(scaled)
  k = repeated(heads_first(k))
  v = repeated(heads_first(v))
  out = jax.vmap(attend_row)(q, k, v, own, jnp.concatenate([own, *others], axis=1))
  return out.swapaxes(1, 2)[:, :tokens].astype(q.dtype)


def _block(length, most):
  """Returns the largest size of a block that divides a row of `length` tokens: `LANES` or its doubles up to `most`."""
  size = LANES
  while size * 2 <= most and length % (size * 2) == 0:
    size *= 2
  return size
