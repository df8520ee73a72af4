"""What a layer's attention computes, whatever computes it."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp


class Form(NamedTuple):
  """The scores of a layer's attention, and which of them count.

  Attributes:
    scale: of queries times keys.
    softcap: squashes those scores s into cap * tanh(s / cap); 0: not (Gemma Team 2024, section 2 (arXiv:2408.00118)).
    window: how many tokens, its own included, a token sees; 0: all.
  """

  scale: float
  softcap: float = 0.0
  window: int = 0

  def sees(self, distance: jax.Array) -> jax.Array:
    """Whether a token sees the one so many tokens before it."""
    return (distance >= 0) & (distance < self.window) if self.window else distance >= 0

  def scores(self, equation: str, q: jax.Array, k: jax.Array) -> jax.Array:
    """Of queries and keys, in float32 or wider, before any mask."""
    scores = dot(equation, q, k) * self.scale
    return self.softcap * jnp.tanh(scores / self.softcap) if self.softcap else scores

  def slope(self, scores: jax.Array) -> jax.Array | float:
    """The derivative of these scores in the products of queries and keys."""
    return self.scale * (1 - jnp.square(scores / self.softcap)) if self.softcap else self.scale


@flax.struct.dataclass
class Segments:
  """Segment ids, and what is known of them before there are any: a model's forward takes these in their place.

  Attributes:
    ids: int32 [B, T], or [B, T, 1 + n] where several segments see a token; those of a segment are neighbours.
    most: no row has a segment above this number; 0: that is not known.
  """

  ids: jax.Array
  most: int = flax.struct.field(pytree_node=False, default=0)


def as_segments(segment_ids: jax.Array | Segments) -> Segments:
  """Of plain ids nothing is known."""
  return segment_ids if isinstance(segment_ids, Segments) else Segments(segment_ids)


def dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Contracts with float32 (or wider) sums, which are the result."""
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def layers(segment_ids: jax.Array) -> list[jax.Array]:
  """Each token's own segment [B, T], and the n others that see it, from segment_ids [B, T] (n = 0) or [B, T, 1 + n]."""
  if segment_ids.ndim == 2:
    return [segment_ids]
  return [segment_ids[..., n] for n in range(segment_ids.shape[-1])]
