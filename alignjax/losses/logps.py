"""Log-probabilities of tokens without logits.

No array of size [tokens, V] exists: the vocabulary's scores exist for one chunk of tokens at a time, and the backward
pass recomputes them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignjax.losses import chunks
from alignjax.losses.chunks import Capped
from alignjax.losses.support import Support, mask_logits
from alignjax.system import sharding


class TokenScores(NamedTuple):
  """Scores of the targets; all [B, T].

  Attributes:
    logps: log-probability in nats; the only field with a gradient, unless `entropy_gradient` is set.
    is_top1: 1.0 where no token is likelier.
    entropy: of the whole distribution, in nats; zeros unless requested.
    log_sum_sq_probs: log of the sum of p^2 over the vocabulary, in nats; zeros unless requested.
  """

  logps: jax.Array
  is_top1: jax.Array
  entropy: jax.Array
  log_sum_sq_probs: jax.Array


def token_logps(
  hidden: jax.Array,
  unembedding: jax.Array | Capped,
  targets: jax.Array,
  temperature: jax.Array | float = 1.0,
  chunk: int | None = None,
  support: Support | None = None,
) -> jax.Array:
  """Computes log softmax(hidden @ unembedding.T / temperature)[target], float32 or wider [B, T], in nats.

  The arguments are those of `token_scores`. `next_token_logps` aligns it with the tokens themselves.
  """
  return token_scores(hidden, unembedding, targets, temperature, chunk, support=support).logps


def token_scores(
  hidden: jax.Array,
  unembedding: jax.Array | Capped,
  targets: jax.Array,
  temperature: jax.Array | float = 1.0,
  chunk: int | None = None,
  entropy: bool = False,
  log_sum_sq_probs: bool = False,
  support: Support | None = None,
  entropy_gradient: bool = False,
) -> TokenScores:
  """Computes the log-probability, the top-1 flag and other requested scores of each target, [B, T], float32 or wider.

  Gradients flow from the log-probabilities, and from the entropy if entropy_gradient is set, to `hidden` and
  `unembedding`; the temperature is a constant. No mask is applied.

  Args:
    hidden: [B, T, D], the states that predict the targets.
    unembedding: [V, D], `Capped` if its logits are.
    targets: int32 [B, T].
    temperature: divides the logits.
    chunk: positions of every row taken at a time; None keeps B * chunk near `chunks.CHUNK_TOKENS` per device.
    entropy, log_sum_sq_probs: whether to compute these; each costs one more pass over the scores.
    support: of the sampler, if it did not sample from the whole vocabulary. All scores are then of the distribution on
      the support and the target, and the gradient is that of a fixed support. top_k and top_p sort the scores.
    entropy_gradient: whether the entropy has a gradient (for a bonus in a loss), which costs one more pass backwards;
      needs `entropy`.
  """
  B, T, _ = hidden.shape
  chunk = chunks.size(B, T, chunk)
  wide = jnp.promote_types(hidden.dtype, jnp.float32)
  temperature = jax.lax.stop_gradient(jnp.asarray(temperature, wide))
  extras = _Extras(entropy, log_sum_sq_probs, entropy_gradient)
  hidden = chunks.pad(hidden, chunk)
  targets = chunks.pad(targets, chunk)
  if support is None:
    support = Support()
  unembedding = chunks.capped(unembedding).take(None, hidden.dtype).gathered()
  scores = _scores(hidden, unembedding, targets, temperature, support, chunk, extras)
  return TokenScores(*(x[:, :T] for x in scores))


def next_token_scores(hidden: jax.Array, unembedding: jax.Array | Capped, tokens: jax.Array, **kwargs) -> TokenScores:
  """Computes `token_scores` aligned with `tokens` [B, T]: column t scores tokens[t] given the past; column 0 is 0.

  In a packed row, the first token of each segment is scored by the segment before it: mask it out.

  Args:
    hidden: [B, T, D], the states of these tokens.
    unembedding: as in `token_scores`, as are **kwargs.
    tokens: int32 [B, T].
  """
  scores = token_scores(hidden, unembedding, jnp.roll(tokens, -1, axis=1), **kwargs)
  return TokenScores(*(jnp.roll(x, 1, axis=1).at[:, 0].set(0.0) for x in scores))


def next_token_logps(hidden: jax.Array, unembedding: jax.Array | Capped, tokens: jax.Array, **kwargs) -> jax.Array:
  """Computes the log-probabilities of `next_token_scores` alone, [B, T] in nats, from the same arguments."""
  return next_token_scores(hidden, unembedding, tokens, **kwargs).logps


def segment_sum(values: jax.Array, segment_ids: jax.Array, num_segments: int) -> jax.Array:
  """Sums values [B, T] over the segments 1 .. S of each row, [B, S], S = num_segments; rows are independent.

  Other segments, such as the padding's 0, are ignored.
  """
  member = segment_ids[:, None, :] == jnp.arange(1, num_segments + 1)[:, None]
  # Not an einsum: a matmul would round the sums on accelerators.
  return jnp.sum(jnp.where(member, values[:, None, :], 0), axis=-1)


def _is_target(targets, vocab):
  """Returns whether each token of the vocabulary is the target, bool [B, c, V]."""
  return jax.lax.broadcasted_iota(jnp.int32, (*targets.shape, vocab), 2) == targets[..., None]


class _Extras(NamedTuple):
  """The options of `token_scores` that cost a pass each."""

  entropy: bool
  log_sum_sq_probs: bool
  entropy_gradient: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _scores(hidden, unembedding, targets, temperature, support, chunk, extras):
  return _scores_forward(hidden, unembedding, targets, temperature, support, chunk, extras)[0]


def _scores_forward(hidden, unembedding, targets, temperature, support, chunk, extras):
  """Returns the TokenScores, and what the backward pass needs."""

  def score_chunk(_, inputs):
    h, target = inputs
    logits = mask_logits(chunks.logits(h, unembedding, temperature), support, target)
    top = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - top[..., None])
    total = jnp.sum(weights, axis=-1)
    normaliser = top + jnp.log(total)
    target_logit = jnp.sum(jnp.where(_is_target(target, logits.shape[-1]), logits, 0), axis=-1)
    entropy = squares = jnp.zeros_like(top)
    if extras.entropy:
      entropy = normaliser - jnp.sum(jnp.where(weights == 0, 0, weights * logits), axis=-1) / total  # 0 log 0 = 0
    if extras.log_sum_sq_probs:
      squares = jnp.log(jnp.sum(jnp.square(weights), axis=-1)) - 2 * jnp.log(total)
    is_top1 = (target_logit >= top).astype(logits.dtype)
    return None, (TokenScores(target_logit - normaliser, is_top1, entropy, squares), normaliser)

  inputs = (chunks.split(hidden, chunk), chunks.split(targets, chunk))
  _, (scores, normaliser) = jax.lax.scan(score_chunk, None, inputs)
  residuals = (hidden, unembedding, targets, temperature, support, normaliser, scores.entropy)
  return TokenScores(*map(chunks.join, scores)), residuals


def _scores_backward(chunk, extras, residuals, cotangents):
  """Returns the gradients of hidden and unembedding."""
  hidden, unembedding, targets, temperature, support, normaliser, entropy = residuals
  d_logps, d_entropy = (chunks.split(x, chunk) for x in (cotangents.logps, cotangents.entropy))

  def placed(d_unembedding):
    """The sum over devices, chunk by chunk: on each of them it would be as large as the whole matrix in float32."""
    return sharding.constrain(d_unembedding, "embed", "vocab")

  def differentiate_chunk(d_unembedding, inputs):
    h, target, normaliser, entropy, g, g_entropy = inputs
    logits = chunks.logits(h, unembedding, temperature)
    slope = chunks.slope(logits, unembedding, temperature)
    logits = mask_logits(logits, support, target)
    logps = logits - normaliser[..., None]
    probabilities = jnp.exp(logps)
    # d log p / d logits = onehot(target) - p; d entropy / d logits = -p (log p + entropy).
    d_logits = (_is_target(target, logits.shape[-1]) - probabilities) * g[..., None]
    if extras.entropy_gradient:
      surprise = jnp.where(probabilities == 0, 0, probabilities * (logps + entropy[..., None]))
      d_logits -= surprise * g_entropy[..., None]
    d_logits = (d_logits * slope).astype(h.dtype)
    wide = probabilities.dtype
    d_h = jnp.einsum("btv,vd->btd", d_logits, unembedding.matrix, preferred_element_type=wide)
    d_unembedding += jnp.einsum("btd,btv->dv", h, d_logits, preferred_element_type=wide)
    return placed(d_unembedding), d_h.astype(h.dtype)

  # Transposed, [D, V]: the matmul then transposes the states, not the scores.
  zeros = jnp.zeros(unembedding.matrix.T.shape, jnp.promote_types(hidden.dtype, jnp.float32))
  d_unembedding, d_hidden = jax.lax.scan(
    differentiate_chunk,
    placed(zeros),
    (chunks.split(hidden, chunk), chunks.split(targets, chunk), normaliser, entropy, d_logps, d_entropy),
  )
  d_unembedding = Capped(d_unembedding.T.astype(unembedding.matrix.dtype), unembedding.cap)
  return chunks.join(d_hidden), d_unembedding, None, None, None


_scores.defvjp(_scores_forward, _scores_backward)
