"""Attention on NVIDIA GPUs: cuDNN's flash attention, through JAX, which never writes a score to memory.

It supports grouped heads, windows and the length of each row, but no segments. So each text of a row is moved into a
row of its own, at its beginning. The padding behind it costs memory and no work. JAX can give cuDNN packed rows as
they are, but 0.10.2 then reads the keys of grouped heads from wrong places: https://github.com/jax-ml/jax/pull/39521

Its backward pass sums in no fixed order. For bit-identical runs, set
XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true (https://github.com/openxla/xla/pull/14125).
Not run on a GPU yet.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignjax.errors import InputError
from alignjax.model.attention import kernel
from alignjax.model.attention.form import Form, Segments

KERNEL = "cudnn"  # of jax.nn.dot_product_attention
TEXTS = 4  # of a row at most: its queries, keys and values take that many times their memory
BLOCK = 128  # rows are padded to multiples of it, which every version of the kernel supports


def limit(form: Form, q: jax.Array, segments: Segments) -> str:
  """Says why cuDNN cannot compute this attention, with the remedy; "" if it can.

  Args:
    form: its soft cap is read.
    q: [B, T, N, H]; its dtype and H are read.
    segments: cuDNN needs one id per token, and `most` in 1 .. `TEXTS`.
  """
  gpu = capability()
  if gpu is None:
    return "there is no NVIDIA GPU; use auto"
  if gpu < (8, 0):
    return f"it needs compute capability 8.0 or higher, this GPU has {gpu[0]}.{gpu[1]}; use auto"
  size = q.shape[-1]
  largest = 256 if gpu >= (9, 0) else 128
  limits = {
    f"it does not compute in {q.dtype}; use model.dtype=bfloat16": q.dtype not in (jnp.bfloat16, jnp.float16),
    f"model.head_dim={size} is no multiple of 8 up to {largest}; use auto": size % 8 > 0 or size > largest,
    f"it has no model.attention_softcap={form.softcap}; use auto": form.softcap > 0,
    "a shared prompt is seen by several segments; use data.share_prompts=False": segments.ids.ndim == 3,
    "it is not known how many texts a row holds; give model.form.Segments": not segments.most,
    f"a row may hold {segments.most} texts, and it takes at most {TEXTS}; use data.pack=False": segments.most > TEXTS,
  }
  return next((reason for reason, applies in limits.items() if applies), "")


def capability() -> tuple[int, int] | None:
  """Returns the compute capability of this process's NVIDIA GPUs, such as (9, 0); None if there are none."""
  try:
    device, *_ = jax.local_devices(backend="cuda")
  except RuntimeError:
    return None
  major, minor = device.compute_capability.split(".")
  return int(major), int(minor)


def attention(form: Form, q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments) -> jax.Array:
  """Computes `attention.attention` of whole rows; NaN for tokens of segments above `segments.most`.

  Args:
    form: the scale and window of the scores; a soft cap is not supported.
    q, k, v: as for `attention.attention`.
    segments: with the number of segments in a row, at most `TEXTS`.

  Raises:
    InputError: cuDNN cannot compute this (`limit`).
  """
  if reason := limit(form, q, segments):
    raise InputError(f"model.attention='cudnn': {reason}")
  return kernel.on_each_device(functools.partial(_local, form, segments.most), q, k, v, segments.ids)


def _local(form, most, q, k, v, ids):
  """Returns the attention of one device's rows and heads."""
  place = _places(ids, most)
  q, k, v = (_apart(x, place) for x in (q, k, v))
  lengths = jnp.maximum(place.lengths, 1).reshape(-1)  # the kernel's result for an empty row is undefined
  # Both branches are the lengths. Under vmap over queries JAX requires lengths that are mapped over too.
  lengths = jnp.where(jnp.isnan(q[:, 0, 0, 0]), lengths, lengths)
  window = (form.window - 1, 0) if form.window else None
  out = jax.nn.dot_product_attention(
    q,
    k,
    v,
    scale=form.scale,
    is_causal=True,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    local_window_size=window,
    implementation=KERNEL,
  )
  beyond = (ids > most)[..., None, None]
  return jnp.where(beyond, jnp.nan, _together(out, place))


class _Places(NamedTuple):
  """The places of texts 1 .. S in rows; the tokens of a text are neighbours.

  Attributes:
    starts: int32 [B, S], the column of a text's first token.
    lengths: int32 [B, S], the number of its tokens.
    text: int32 [B, T], the text of each token, counted from 0; below 0 or from S on: none of these texts.
  """

  starts: jax.Array
  lengths: jax.Array
  text: jax.Array


def _places(ids, most):
  """Returns the places of the texts 1 .. `most` of rows with segment ids [B, T]."""
  members = ids[:, None, :] == jnp.arange(1, most + 1)[:, None]
  return _Places(jnp.argmax(members, axis=-1), jnp.sum(members, axis=-1), ids - 1)


@jax.custom_vjp
def _apart(x, place):
  """Moves x [B, T, ...] to [B * S, J, ...]: each text in a row of its own, from its first column on, with 0 behind."""
  rows, tokens = x.shape[:2]
  columns = jnp.arange(-(-tokens // BLOCK) * BLOCK)
  texts = _take(x, jnp.minimum(place.starts[..., None] + columns, tokens - 1), columns < place.lengths[..., None])
  return texts.reshape(rows * place.starts.shape[1], len(columns), *x.shape[2:])


@jax.custom_vjp
def _together(x, place):
  """Moves [B * S, J, ...] to [B, T, ...]; 0 for a token of no text. The padding behind texts is never read."""
  rows, texts = place.starts.shape
  text = jnp.clip(place.text, 0, texts - 1)
  column = jnp.arange(text.shape[1]) - jnp.take_along_axis(place.starts, text, axis=1)
  in_text = (place.text >= 0) & (place.text < texts)
  x = x.reshape(rows, texts * x.shape[1], *x.shape[2:])
  return _take(x, jnp.where(in_text, text * (x.shape[1] // texts) + column, 0), in_text)


def _take(x, columns, valid):
  """Returns x[b, columns[b]] where valid, else 0."""
  entries = jax.vmap(lambda row, columns: row[columns])(x, columns)
  return jnp.where(valid.reshape(*valid.shape, *(1,) * (entries.ndim - valid.ndim)), entries, 0)


# Each is the other's transpose; derived, they would be scatters.
_apart.defvjp(lambda x, place: (_apart(x, place), place), lambda place, d: (_together(d, place), None))
_together.defvjp(lambda x, place: (_together(x, place), place), lambda place, d: (_apart(d, place), None))
