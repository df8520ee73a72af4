"""The support of a sampler, the tokens that it can choose: one rule for sampling and for scoring.

A policy gradient and an importance ratio are those of the distribution that sampled. If that is truncated, a trainer
that scores the whole vocabulary computes wrong ratios from the first update on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Support(NamedTuple):
  """The rule by which a sampler's support is found; a part that is None is not compiled, and restricts nothing.

  Attributes:
    excluded: the id of a token that is never sampled, such as the pad.
    top_k: keeps the k best of the others; 0 keeps all.
    top_p: then keeps the fewest best that hold this share of the remaining probability; 1 keeps all.
  """

  excluded: jax.Array | int | None = None
  top_k: jax.Array | int | None = None
  top_p: jax.Array | float | None = None


def mask_logits(logits: jax.Array, support: Support, targets: jax.Array | None = None) -> jax.Array:
  """Sets logits [..., V], already divided by the temperature, to -inf outside of the support.

  Tokens that tie with the last one kept are kept too. So the support depends on the logits alone, never on the order of
  a sort, and a trainer that rescores a completion computes the same one. The parts apply in the order of the record, as
  in Hugging Face's and vLLM's samplers. Logits with other rounding, such as those with and without a cache, can differ
  in whether a token at the edge of a nucleus is inside, which changes the log-probs there by its share: rarely in
  float32 (one position in some thousands), often in bfloat16. top_k has no such edge, except for near-ties.

  Args:
    logits: float32 or wider.
    support: the rule.
    targets: int32 [...], tokens that are always inside. They were inside when they were sampled. A policy that has
      changed since may put them outside, and their log-probability must stay finite. None: none are.

  Source: Fan et al. 2018, section 5 (arXiv:1805.04833); Holtzman et al. 2020, section 3.1 (arXiv:1904.09751)
  """
  tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  masked = logits
  if support.excluded is not None:
    masked = jnp.where(tokens == support.excluded, -jnp.inf, masked)
  if support.top_k is not None or support.top_p is not None:
    masked = jnp.where(masked >= _last_kept(masked, support), masked, -jnp.inf)
  if targets is not None and masked is not logits:
    masked = jnp.where(tokens == targets[..., None], logits, masked)
  return masked


def _last_kept(logits: jax.Array, support: Support) -> jax.Array:
  """Returns the logit [..., 1] of the worst token that top-k and top-p keep."""
  vocab = logits.shape[-1]
  best_first = jnp.sort(logits, axis=-1, descending=True)
  k = jnp.asarray(0 if support.top_k is None else support.top_k)
  kept = jnp.arange(vocab) < jnp.where(k > 0, k, vocab)
  if support.top_p is not None:
    shares = jax.nn.softmax(jnp.where(kept, best_first, -jnp.inf))
    # A token stays if those before it hold less than top_p; the first always stays, and top_p = 1 drops none.
    before = jnp.cumsum(shares, axis=-1) - shares
    kept = kept & ((before < support.top_p) | (jnp.asarray(support.top_p) >= 1)) | (jnp.arange(vocab) == 0)
  return jnp.min(jnp.where(kept, best_first, jnp.inf), axis=-1, keepdims=True)
