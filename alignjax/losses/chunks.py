"""Chunks of positions: the scores of the vocabulary exist for only one chunk at a time."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from alignjax.system import sharding

CHUNK_TOKENS = 1024  # tokens whose scores [.., V] exist at one time, per device


def size(rows: int, length: int, chunk: int | None = None) -> int:
  """Returns how many positions of a row a chunk has, which divides a length that `pad` rounds up.

  Chunks divide `length` as evenly as they can, and devices that split rows divide the chunks evenly.

  Args:
    rows, length: B and T of the states.
    chunk: the wanted size, kept up to evenness; None for as many as keep rows * size near `CHUNK_TOKENS` per device.
  """
  parts = sharding.ways("tokens")
  chunk = chunk or max(1, CHUNK_TOKENS * sharding.ways("batch") * parts // rows)
  even = -(-length // -(-length // min(chunk, length)))
  return -(-even // parts) * parts


def pad(x: jax.Array, chunk: int) -> jax.Array:
  """Pads x [B, T, ...] with zeros at the end of T, to a multiple of `chunk` positions."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *((0, 0),) * (x.ndim - 2)))


def split(x: jax.Array, chunk: int) -> jax.Array:
  """Splits [B, n*c, ...] into chunks [n, B, c, ...], c = `chunk`; `join` undoes it.

  If devices split rows, every chunk has a share of each device's part: a chunk is then not contiguous in the row.
  """
  B, T = x.shape[:2]
  parts = _parts(chunk)
  apart = x.reshape(B, parts, T // chunk, chunk // parts, *x.shape[2:])
  return jnp.moveaxis(apart, 2, 0).reshape(T // chunk, B, chunk, *x.shape[2:])


def join(x: jax.Array) -> jax.Array:
  """Joins the chunks of `split`: [n, B, c, ...] -> [B, n*c, ...]."""
  n, B, c = x.shape[:3]
  parts = _parts(c)
  apart = x.reshape(n, B, parts, c // parts, *x.shape[3:])
  return jnp.moveaxis(apart, 0, 2).reshape(B, n * c, *x.shape[3:])


def _parts(chunk):
  """Returns the parts of a row on devices that can each have a share of a chunk."""
  return math.gcd(chunk, sharding.ways("tokens"))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["cap"])
@dataclasses.dataclass(frozen=True)
class Capped:
  """An unembedding [V, D] whose logits z are squashed into cap * tanh(z / cap); a cap of 0 leaves them.

  Attributes:
    matrix: [V, D].
    cap: static, in units of logits before the temperature divides them.

  Source: Gemma Team 2024, section 2 (arXiv:2408.00118)
  """

  matrix: jax.Array
  cap: float = 0.0

  def take(self, vocab: int | None, dtype: jax.typing.DTypeLike) -> "Capped":
    """Returns the first `vocab` rows (None: all), cast to a dtype, with the same cap."""
    return dataclasses.replace(self, matrix=self.matrix[:vocab].astype(dtype))

  def gathered(self) -> "Capped":
    """Gathers the whole matrix on every device, once for all chunks."""
    return dataclasses.replace(self, matrix=sharding.gather(self.matrix, "vocab", "embed"))


def capped(unembedding: jax.Array | Capped) -> Capped:
  """Returns an unembedding as `Capped`, the form that the functions here take; a plain [V, D] gets the cap 0."""
  if isinstance(unembedding, Capped):
    return unembedding
  return Capped(unembedding)


def logits(hidden: jax.Array, unembedding: Capped, temperature: jax.Array | float = 1.0) -> jax.Array:
  """Computes the logits [B, c, V] of one chunk, float32 or wider, from hidden [B, c, D]: capped, then / temperature."""
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  z = jnp.einsum("btd,vd->btv", hidden, unembedding.matrix, preferred_element_type=dtype)
  if unembedding.cap:
    z = unembedding.cap * jnp.tanh(z / unembedding.cap)
  return z / temperature


def slope(logits: jax.Array, unembedding: Capped, temperature: jax.Array) -> jax.Array:
  """Returns the derivative of `logits` by the product hidden @ matrix.T, at its result `logits` [B, c, V].

  A scalar where there is no cap.
  """
  cap = unembedding.cap
  if not cap:
    return 1 / temperature
  return (1 - jnp.square(logits * temperature / cap)) / temperature
