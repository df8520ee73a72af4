"""The function that a layer's attention computes, whichever kernel computes it."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp


class Form(NamedTuple):
  """The scores of a layer's attention, and which of them count.

  Attributes:
    scale: of queries times keys.
    softcap: squashes those scores s into cap * tanh(s / cap); 0: no cap (Gemma Team 2024, section 2, arXiv:2408.00118).
    window: how many tokens a token sees, itself included; 0: all.
  """

  scale: float
  softcap: float = 0.0
  window: int = 0

  def sees(self, distance: jax.Array) -> jax.Array:
    """Returns True where a token sees the token that comes `distance` tokens before it; no token sees a later one."""
    if not self.window:
      return distance >= 0
    return (distance >= 0) & (distance < self.window)

  def scores(self, equation: str, q: jax.Array, k: jax.Array) -> jax.Array:
    """Computes the scores of queries and keys, scaled and capped, in float32 or wider, before any mask.

    Args:
      equation: the einsum of q and k, such as "bkgth,bkhc->bkgtc".
      q, k: with the dimensions of the equation.
    """
    scores = dot(equation, q, k) * self.scale
    if not self.softcap:
      return scores
    return self.softcap * jnp.tanh(scores / self.softcap)

  def slope(self, scores: jax.Array) -> jax.Array | float:
    """Returns the derivative of these (capped) scores with respect to the products of queries and keys."""
    if not self.softcap:
      return self.scale
    return self.scale * (1 - jnp.square(scores / self.softcap))


@flax.struct.dataclass
class Segments:
  """Segment ids with a static bound on them; a model's forward takes these in place of the bare array.

  Attributes:
    ids: int32 [B, T], or [B, T, 1 + n] if several segments see a token; the tokens of a segment are neighbours.
    most: the largest id that a row may have; 0: not known.
  """

  ids: jax.Array
  most: int = flax.struct.field(pytree_node=False, default=0)


def as_segments(segment_ids: jax.Array | Segments) -> Segments:
  """Wraps plain ids, of which no bound is known (`most` 0); `Segments` stay as they are."""
  if isinstance(segment_ids, Segments):
    return segment_ids
  return Segments(segment_ids)


def dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Contracts x and y by an einsum equation with float32 (or wider) sums, and returns these unrounded."""
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def layers(segment_ids: jax.Array) -> list[jax.Array]:
  """Splits segment_ids [B, T] (n = 0) or [B, T, 1 + n] into each token's own [B, T] and the n others that see it."""
  if segment_ids.ndim == 2:
    return [segment_ids]
  return [segment_ids[..., n] for n in range(segment_ids.shape[-1])]
