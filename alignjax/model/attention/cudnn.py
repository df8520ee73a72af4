"""Attention on NVIDIA GPUs: cuDNN's flash attention, through JAX, which never writes a score to memory.

It knows grouped heads and windows, and of each row how many tokens count, but no segments. So the texts of a row are
laid apart, each into a row of its own that begins with it. What they have behind them costs memory and no work.
JAX can hand cuDNN packed rows as they are, but 0.10.2 takes the keys of grouped heads from wrong places then:
https://github.com/jax-ml/jax/pull/39521

Its backward pass sums in no fixed order: for runs that are to be bit-identical, XLA_FLAGS has
--xla_gpu_exclude_nondeterministic_ops=true (https://github.com/openxla/xla/pull/14125). Not run on a GPU yet.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignjax.errors import InputError
from alignjax.model.attention import kernel
from alignjax.model.attention.form import Form, Segments

KERNEL = "cudnn"  # of jax.nn.dot_product_attention
TEXTS = 4  # of a row at most: so many times the memory of its queries, keys and values is taken
BLOCK = 128  # rows are laid out in multiples of it, which every version of the kernel takes


def limit(form: Form, q: jax.Array, segments: Segments) -> str:
  """What stands against cuDNN here, and the remedy, for queries [B, T, N, H]; "" if nothing."""
  size, found = q.shape[-1], capability()
  largest = 256 if found and found >= (9, 0) else 128
  limits = {
    "there is no NVIDIA GPU; use auto": found is None,
    "it needs compute capability 8.0 or higher, this GPU has {}.{}; use auto".format(*found or (0, 0)): (
      found is not None and found < (8, 0)
    ),
    f"it does not compute in {q.dtype}; use model.dtype=bfloat16": q.dtype not in (jnp.bfloat16, jnp.float16),
    f"model.head_dim={size} is no multiple of 8 up to {largest}; use auto": size % 8 > 0 or size > largest,
    f"it has no model.attention_softcap={form.softcap}; use auto": form.softcap > 0,
    "a shared prompt is seen by several segments; use data.share_prompts=False": segments.ids.ndim == 3,
    "it is not known how many texts a row holds; give model.form.Segments": not segments.most,
    f"a row may hold {segments.most} texts, and it takes at most {TEXTS}; use data.pack=False": segments.most > TEXTS,
  }
  return next((words for words, stands in limits.items() if stands), "")


def capability() -> tuple[int, int] | None:
  """The compute capability of this process's NVIDIA GPUs, which JAX asks too; None: there are none."""
  try:
    device, *_ = jax.local_devices(backend="cuda")
  except RuntimeError:
    return None
  major, minor = device.compute_capability.split(".")
  return int(major), int(minor)


def attention(form: Form, q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments) -> jax.Array:
  """As `attention.attention`; NaN for tokens of segments beyond the most that a row is said to have.

  Raises:
    InputError: cuDNN can not compute that.
  """
  if why := limit(form, q, segments):
    raise InputError(f"model.attention='cudnn': {why}")
  return kernel.on_each_device(functools.partial(_local, form, segments.most), q, k, v, segments.ids)


def _local(form, most, q, k, v, ids):
  """Of one device's rows and heads."""
  place = _places(ids, most)
  q, k, v = (_apart(x, place) for x in (q, k, v))
  lengths = jnp.maximum(place.lengths, 1).reshape(-1)  # of nothing, a kernel may make anything
  # Both are the lengths: but where queries are mapped over (vmap), JAX asks that these are as well.
  lengths = jnp.where(jnp.isnan(q[:, 0, 0, 0]), lengths, lengths)
  out = jax.nn.dot_product_attention(
    q,
    k,
    v,
    scale=form.scale,
    is_causal=True,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    local_window_size=(form.window - 1, 0) if form.window else None,
    implementation=KERNEL,
  )
  beyond = (ids > most)[..., None, None]
  return jnp.where(beyond, jnp.nan, _together(out, place))


class _Places(NamedTuple):
  """Where the texts 1 .. S of rows lie; those of a segment are neighbours.

  Attributes:
    starts: int32 [B, S], the column of a text's first token.
    lengths: int32 [B, S], its tokens.
    text: int32 [B, T], of a token; S or more, or below 0: none of these.
  """

  starts: jax.Array
  lengths: jax.Array
  text: jax.Array


def _places(ids, most):
  members = ids[:, None, :] == jnp.arange(1, most + 1)[:, None]
  return _Places(jnp.argmax(members, axis=-1), jnp.sum(members, axis=-1), ids - 1)


@jax.custom_vjp
def _apart(x, place):
  """[B * S, J, ...] from x [B, T, ...]: each text in a row of its own, from its first column on, with 0 behind."""
  rows, tokens = x.shape[:2]
  columns = jnp.arange(-(-tokens // BLOCK) * BLOCK)
  found = _take(x, jnp.minimum(place.starts[..., None] + columns, tokens - 1), columns < place.lengths[..., None])
  return found.reshape(rows * place.starts.shape[1], len(columns), *x.shape[2:])


@jax.custom_vjp
def _together(x, place):
  """[B, T, ...] again; 0 for a token of no text. What lies behind the texts is not read, whatever it is."""
  rows, texts = place.starts.shape
  text = jnp.clip(place.text, 0, texts - 1)
  column = jnp.arange(text.shape[1]) - jnp.take_along_axis(place.starts, text, axis=1)
  there = (place.text >= 0) & (place.text < texts)
  x = x.reshape(rows, texts * x.shape[1], *x.shape[2:])
  return _take(x, jnp.where(there, text * (x.shape[1] // texts) + column, 0), there)


def _take(x, columns, there):
  """x[b, columns[b]], and 0 where nothing is there."""
  found = jax.vmap(lambda row, columns: row[columns])(x, columns)
  return jnp.where(there.reshape(*there.shape, *(1,) * (found.ndim - there.ndim)), found, 0)


# Each is the other's transpose; derived, they would be scatters.
_apart.defvjp(lambda x, place: (_apart(x, place), place), lambda place, d: (_together(d, place), None))
_together.defvjp(lambda x, place: (_together(x, place), place), lambda place, d: (_apart(d, place), None))
