"""Log-probabilities of tokens without logits.

Nothing of size [tokens, V] is ever held: the vocabulary's scores exist for one chunk of tokens at a time, forwards and,
recomputed, backwards.
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
  """What is known of each target; all [B, T].

  Attributes:
    logps: log-probability in nats; the only field with a gradient, unless one of the entropy is asked for.
    is_top1: 1.0 where no token is likelier.
    entropy: of the whole distribution, in nats; zeros unless it was asked for.
    log_sum_sq_probs: log of the sum of p^2 over the vocabulary, in nats; zeros unless it was asked for.
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
  """log softmax(hidden @ unembedding.T / temperature)[target], float32 [B, T], in nats. Arguments: `token_scores`."""
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
  """Log-probability, top-1 flag and what else is asked of each target.

  Gradients flow from the log-probabilities, and from the entropy if asked, to `hidden` and `unembedding`; the
  temperature is taken as a constant.

  Args:
    hidden: [B, T, D], the states that predict the targets.
    unembedding: [V, D], `Capped` where its logits are.
    targets: int32 [B, T].
    temperature: divides the logits.
    chunk: positions of every row taken at a time; None keeps B * chunk near `chunks.CHUNK_TOKENS` per device.
    entropy, log_sum_sq_probs: whether to compute these, each one more pass over the scores.
    support: what the targets were sampled from, if not from the whole vocabulary: all scores are of the distribution on
      that and the target, whose gradient is that of a support which does not move. top_k and top_p sort the scores.
    entropy_gradient: whether the entropy has one (for a bonus in a loss), a pass more over the scores backwards.
  """
  B, T, _ = hidden.shape
  chunk = chunks.size(B, T, chunk)
  wide = jnp.promote_types(hidden.dtype, jnp.float32)
  temperature = jax.lax.stop_gradient(jnp.asarray(temperature, wide))
  also = (entropy, log_sum_sq_probs, entropy_gradient)
  hidden, targets = chunks.pad(hidden, chunk), chunks.pad(targets, chunk)
  support = Support() if support is None else support
  unembedding = chunks.capped(unembedding).take(None, hidden.dtype).gathered()
  scores = _scores(hidden, unembedding, targets, temperature, support, chunk, also)
  return TokenScores(*(x[:, :T] for x in scores))


def next_token_scores(hidden: jax.Array, unembedding: jax.Array | Capped, tokens: jax.Array, **kwargs) -> TokenScores:
  """`token_scores` aligned with `tokens` [B, T]: column t scores tokens[t] given the past; column 0 is 0."""
  scores = token_scores(hidden, unembedding, jnp.roll(tokens, -1, axis=1), **kwargs)
  return TokenScores(*(jnp.roll(x, 1, axis=1).at[:, 0].set(0.0) for x in scores))


def next_token_logps(hidden: jax.Array, unembedding: jax.Array | Capped, tokens: jax.Array, **kwargs) -> jax.Array:
  """`token_logps` aligned with `tokens` [B, T]: column t scores tokens[t] given the past; column 0 is 0."""
  return next_token_scores(hidden, unembedding, tokens, **kwargs).logps


def segment_sum(values: jax.Array, segment_ids: jax.Array, num_segments: int) -> jax.Array:
  """Sums of values [B, T] over segments 1 .. S of each row, [B, S]; a row never meets another."""
  member = segment_ids[:, None, :] == jnp.arange(1, num_segments + 1)[:, None]
  # Not an einsum: a matmul would round the sums on accelerators.
  return jnp.sum(jnp.where(member, values[:, None, :], 0), axis=-1)


def _is_target(targets, vocab):
  return jax.lax.broadcasted_iota(jnp.int32, (*targets.shape, vocab), 2) == targets[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _scores(hidden, unembedding, targets, temperature, support, chunk, also):
  return _scores_forward(hidden, unembedding, targets, temperature, support, chunk, also)[0]


def _scores_forward(hidden, unembedding, targets, temperature, support, chunk, also):
  entropy, log_sum_sq_probs, _ = also

  def one(_, inputs):
    h, target = inputs
    logits = mask_logits(chunks.logits(h, unembedding, temperature), support, target)
    top = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - top[..., None])
    total = jnp.sum(weights, axis=-1)
    normaliser = top + jnp.log(total)
    picked = jnp.sum(jnp.where(_is_target(target, logits.shape[-1]), logits, 0), axis=-1)
    spread = squares = jnp.zeros_like(top)
    if entropy:
      spread = normaliser - jnp.sum(jnp.where(weights == 0, 0, weights * logits), axis=-1) / total  # 0 log 0 = 0
    if log_sum_sq_probs:
      squares = jnp.log(jnp.sum(jnp.square(weights), axis=-1)) - 2 * jnp.log(total)
    is_top1 = (picked >= top).astype(logits.dtype)
    return None, (TokenScores(picked - normaliser, is_top1, spread, squares), normaliser)

  _, (scores, normaliser) = jax.lax.scan(one, None, (chunks.split(hidden, chunk), chunks.split(targets, chunk)))
  residuals = (hidden, unembedding, targets, temperature, support, normaliser, scores.entropy)
  return TokenScores(*map(chunks.join, scores)), residuals


def _scores_backward(chunk, also, residuals, cotangents):
  hidden, unembedding, targets, temperature, support, normaliser, spread = residuals
  cotangent, of_entropy = (chunks.split(x, chunk) for x in (cotangents.logps, cotangents.entropy))

  def one(d_unembedding, inputs):
    h, target, normaliser, spread, g, g_entropy = inputs
    logits = chunks.logits(h, unembedding, temperature)
    slope = chunks.slope(logits, unembedding, temperature)
    logits = mask_logits(logits, support, target)
    logps = logits - normaliser[..., None]
    probabilities = jnp.exp(logps)
    # d log p / d logits = onehot(target) - p; d entropy / d logits = -p (log p + entropy).
    d_logits = (_is_target(target, logits.shape[-1]) - probabilities) * g[..., None]
    if also[2]:
      surprise = jnp.where(probabilities == 0, 0, probabilities * (logps + spread[..., None]))
      d_logits -= surprise * g_entropy[..., None]
    d_logits = (d_logits * slope).astype(h.dtype)
    wide = probabilities.dtype
    d_h = jnp.einsum("btv,vd->btd", d_logits, unembedding.matrix, preferred_element_type=wide)
    d_unembedding += jnp.einsum("btd,btv->dv", h, d_logits, preferred_element_type=wide)
    return placed(d_unembedding), d_h.astype(h.dtype)

  # Transposed, [D, V]: the matmul then transposes the states, not the scores.
  # Summed over the devices chunk by chunk: on each of them it would be as large as the whole matrix in float32.
  placed = lambda x: sharding.constrain(x, "embed", "vocab")
  zeros = jnp.zeros(unembedding.matrix.T.shape, jnp.promote_types(hidden.dtype, jnp.float32))
  d_unembedding, d_hidden = jax.lax.scan(
    one,
    placed(zeros),
    (chunks.split(hidden, chunk), chunks.split(targets, chunk), normaliser, spread, cotangent, of_entropy),
  )
  d_unembedding = Capped(d_unembedding.T.astype(unembedding.matrix.dtype), unembedding.cap)
  return chunks.join(d_hidden), d_unembedding, None, None, None


_scores.defvjp(_scores_forward, _scores_backward)
