"""The scalar head of reward and value models."""

import jax
import jax.numpy as jnp

from alignjax.types import Params


def score(params: Params, hidden: jax.Array) -> jax.Array:
  """The head's value at every token, float32 [B, T], from hidden states [B, T, D]."""
  return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), params["score"][:, 0].astype(jnp.float32))


def last_token_score(scores: jax.Array, segment_ids: jax.Array, num_segments: int) -> jax.Array:
  """The score at the last token of each segment, [B, S]; 0 for a segment that the row does not hold.

  The place is found by index (the last column that carries the segment's id), never by a pad id.

  Args:
    scores: [B, T].
    segment_ids: int32 [B, T], 1 .. S, 0 for padding.
    num_segments: S.
  """
  member = segment_ids[:, None, :] == jnp.arange(1, num_segments + 1)[:, None]  # [B, S, T]
  columns = jnp.arange(segment_ids.shape[1])
  last = jnp.max(jnp.where(member, columns, -1), axis=-1)  # [B, S]
  picked = jnp.take_along_axis(scores, jnp.maximum(last, 0), axis=1)
  return jnp.where(last >= 0, picked, 0.0)
