"""Divergences between the next-token distributions of a student and a teacher, without logits of either.

As in losses/logps.py, the scores of both over the vocabulary exist for one chunk of tokens at a time; the backward pass
recomputes them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignjax.losses import chunks
from alignjax.losses.chunks import Capped
from alignjax.system.ranges import Positive, Share


class Divergence(NamedTuple):
  """The difference of a student from its teacher at each position; all [B, T].

  Attributes:
    jsd: the generalized Jensen-Shannon divergence, in nats; the only field with a gradient.
    entropy: of the student, in nats.
    agreement: 1.0 where the teacher's likeliest token is the student's.
  """

  jsd: jax.Array
  entropy: jax.Array
  agreement: jax.Array


def jsd(
  student: jax.Array,
  student_unembedding: jax.Array | Capped,
  teacher: jax.Array,
  teacher_unembedding: jax.Array | Capped,
  chunk: int | None = None,
  *,
  beta: Share = 0.5,
  temperature: Positive = 1.0,
) -> Divergence:
  """Computes the divergence of a student from a teacher at each position, in nats, as a Divergence of arrays [B, T].

  It is b KL(t || m) + (1 - b) KL(s || m) with m = b t + (1 - b) s, for student s and teacher t. At b = 0 and b = 1 that
  would be 0. There it is the limit of its quotient with b or 1 - b: KL(t || s) for b = 0, KL(s || t) for b = 1.
  Gradients flow to the student's states and unembedding; b and temperature are constants. As in TRL, it is not
  multiplied by the squared temperature. Column t is of the token that follows position t; no mask is applied.

  Args:
    student, teacher: hidden states [B, T, D]; the two may have different D.
    student_unembedding, teacher_unembedding: [V, D]. If one has more rows than the other, such as padding of the
      vocabulary, these rows are left out.
    chunk: as in `losses.logps.token_scores`.
    beta: b, from 0 to 1.
    temperature: divides the logits of both.

  Source: Agarwal et al. 2024, eq. 1 (arXiv:2306.13649)
  """
  B, T, _ = student.shape
  chunk = chunks.size(B, T, chunk)
  student_unembedding = chunks.capped(student_unembedding)
  teacher_unembedding = chunks.capped(teacher_unembedding)
  vocab = min(len(student_unembedding.matrix), len(teacher_unembedding.matrix))
  wide = jnp.promote_types(student.dtype, jnp.float32)

  def constant(x):
    return jax.lax.stop_gradient(jnp.asarray(x, wide))

  def cut(unembedding, dtype):
    return unembedding.take(None, dtype).gathered().take(vocab, dtype)

  padded = _divergence(
    chunks.pad(student, chunk),
    cut(student_unembedding, student.dtype),
    chunks.pad(jax.lax.stop_gradient(teacher), chunk),
    jax.lax.stop_gradient(cut(teacher_unembedding, teacher.dtype)),
    constant(beta),
    constant(temperature),
    chunk,
  )
  return Divergence(*(x[:, :T] for x in padded))


def _mixture(student, teacher, beta):
  """log m of log-probabilities [..., V]; at b = 0 and b = 1, the log-probabilities that the KL is taken from."""
  inside = jnp.where((beta > 0) & (beta < 1), beta, 0.5)
  mixed = jnp.logaddexp(student + jnp.log1p(-inside), teacher + jnp.log(inside))
  return jnp.where(beta <= 0, student, jnp.where(beta >= 1, teacher, mixed))


def _weights(beta):
  """Returns the weights of KL(t || m) and KL(s || m); at b = 0 and b = 1 the one that remains has the weight 1."""
  return jnp.where(beta <= 0, 1.0, beta), jnp.where(beta >= 1, 1.0, 1 - beta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _divergence(student, student_unembedding, teacher, teacher_unembedding, beta, temperature, chunk):
  return _forward(student, student_unembedding, teacher, teacher_unembedding, beta, temperature, chunk)[0]


def _forward(student, student_unembedding, teacher, teacher_unembedding, beta, temperature, chunk):
  """Returns the Divergence, and what the backward pass needs."""
  teacher_weight, student_weight = _weights(beta)

  def score_chunk(_, inputs):
    student_chunk, teacher_chunk = inputs
    s = jax.nn.log_softmax(chunks.logits(student_chunk, student_unembedding, temperature))
    t = jax.nn.log_softmax(chunks.logits(teacher_chunk, teacher_unembedding, temperature)).astype(s.dtype)
    m = _mixture(s, t, beta)
    p = jnp.exp(s)
    value = jnp.sum(teacher_weight * jnp.exp(t) * (t - m) + student_weight * p * (s - m), axis=-1)
    agreement = jnp.argmax(s, axis=-1) == jnp.argmax(t, axis=-1)
    return None, Divergence(value, -jnp.sum(p * s, axis=-1), agreement.astype(s.dtype))

  _, by_chunk = jax.lax.scan(score_chunk, None, (chunks.split(student, chunk), chunks.split(teacher, chunk)))
  residuals = (student, student_unembedding, teacher, teacher_unembedding, beta, temperature)
  return Divergence(*map(chunks.join, by_chunk)), residuals


def _backward(chunk, residuals, cotangents):
  """Returns the gradients of the student's states and unembedding."""
  student, student_unembedding, teacher, teacher_unembedding, beta, temperature = residuals
  _, student_weight = _weights(beta)

  def differentiate_chunk(d_unembedding, inputs):
    h, h_teacher, g = inputs
    logits = chunks.logits(h, student_unembedding, temperature)
    s = jax.nn.log_softmax(logits)
    t = jax.nn.log_softmax(chunks.logits(h_teacher, teacher_unembedding, temperature)).astype(s.dtype)
    p = jnp.exp(s)
    # The gradient to s up to a multiple of p, which the softmax removes; the part that flows through m is one.
    d_s = jnp.where(beta <= 0, -jnp.exp(t), student_weight * p * (s - _mixture(s, t, beta)))
    d_logits = d_s - p * jnp.sum(d_s, axis=-1, keepdims=True)
    d_logits = (d_logits * g[..., None] * chunks.slope(logits, student_unembedding, temperature)).astype(h.dtype)
    d_h = jnp.einsum("btv,vd->btd", d_logits, student_unembedding.matrix, preferred_element_type=s.dtype)
    d_unembedding += jnp.einsum("btd,btv->dv", h, d_logits, preferred_element_type=s.dtype)
    return d_unembedding, d_h.astype(h.dtype)

  zeros = jnp.zeros(student_unembedding.matrix.T.shape, jnp.promote_types(student.dtype, jnp.float32))
  parts = (chunks.split(student, chunk), chunks.split(teacher, chunk), chunks.split(cotangents.jsd, chunk))
  d_unembedding, d_hidden = jax.lax.scan(differentiate_chunk, zeros, parts)
  d_unembedding = Capped(d_unembedding.T.astype(student_unembedding.matrix.dtype), student_unembedding.cap)
  return chunks.join(d_hidden), d_unembedding, None, None, None, None


_divergence.defvjp(_forward, _backward)
