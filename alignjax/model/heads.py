"""The scalar head of reward and value models; several of them are an ensemble on one trunk."""

import jax
import jax.numpy as jnp

from alignjax.types import Params


def score(params: Params, hidden: jax.Array) -> jax.Array:
  """Computes the head's value at every token, float32 [B, T], from hidden states [B, T, D]; for an ensemble, the mean.

  Args:
    params: their entry "score" [D, heads] is read.
    hidden: after the final norm.
  """
  return head_scores(params, hidden).mean(axis=-1)


def head_scores(params: Params, hidden: jax.Array) -> jax.Array:
  """Computes the value of each head at every token, float32 [B, T, heads], from hidden states [B, T, D]."""
  hidden = hidden.astype(jnp.float32)
  heads = params["score"].astype(jnp.float32)
  # One by one, so that a head's numbers do not depend on how many heads there are.
  return jnp.stack([jnp.einsum("btd,d->bt", hidden, head) for head in heads.T], axis=-1)


def last_token_score(scores: jax.Array, segment_ids: jax.Array, num_segments: int) -> jax.Array:
  """Picks the score at the last token of each segment, [B, S, ...]; 0 for a segment that the row does not have.

  The last token is the last column with the segment's id; pad ids are not read.

  Args:
    scores: [B, T, ...].
    segment_ids: int32 [B, T], 1 .. S, 0 for padding.
    num_segments: S; static.
  """
  member = segment_ids[:, None, :] == jnp.arange(1, num_segments + 1)[:, None]  # [B, S, T]
  columns = jnp.arange(segment_ids.shape[1])
  last = jnp.max(jnp.where(member, columns, -1), axis=-1)  # [B, S]
  last = last.reshape(*last.shape, *(1,) * (scores.ndim - 2))
  picked = jnp.take_along_axis(scores, jnp.maximum(last, 0), axis=1)
  return jnp.where(last >= 0, picked, 0.0)
