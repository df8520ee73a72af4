"""Losses of preference learning from the policy's own samples: summed log-probs in, per-example losses out.

Online DPO needs no loss of its own: `best_of_two` makes a pair for a loss of `losses.preference`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignjax.losses.pair import Pair, make_pair
from alignjax.system.ranges import NonNegative


def best_of_two(scores: jax.Array) -> jax.Array:
  """Returns where the first of two completions is the chosen one, bool [...] of scores [..., 2]; a tie is the first's.

  Source: Guo et al. 2024, algorithm 1 (arXiv:2402.04792)
  """
  return scores[..., 0] >= scores[..., 1]


def in_order(first: jax.Array, second: jax.Array, first_wins: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Orders the values [...] of two completions as (chosen, rejected); `first_wins` is bool [...]."""
  return jnp.where(first_wins, first, second), jnp.where(first_wins, second, first)


def online_pair(
  logps: tuple[jax.Array, jax.Array], reference_logps: tuple[jax.Array, jax.Array], first_wins: jax.Array, **kwargs
) -> Pair:
  """Builds the Pair of two completions [...] each, from their summed log-probabilities in nats.

  Log-probs must be those of the distribution that sampled; TRL's are at temperature 1, whatever its sampler's is.

  Args:
    logps, reference_logps: (of the first, of the second) completion, under policy and reference.
    first_wins: bool [...], of `best_of_two`.
    **kwargs: of `make_pair`. They are not reordered: lengths must already be of (chosen, rejected).
  """
  return make_pair(*in_order(*logps, first_wins), *in_order(*reference_logps, first_wins), **kwargs)


def xpo(
  logps: tuple[jax.Array, jax.Array],
  reference_logps: tuple[jax.Array, jax.Array],
  first_wins: jax.Array,
  loss: Callable[[Pair], jax.Array],
  *,
  alpha: NonNegative = 1e-5,
) -> jax.Array:
  """Computes the loss of a pair (policy's sample, reference's sample) + alpha log p_policy(reference's sample), [...].

  The second term is optimism: it takes probability away from the reference's samples.

  Args:
    logps, reference_logps: summed, nats, of (the policy's sample, the reference's), under policy and reference.
    first_wins: whether the policy's sample is the chosen one.
    loss: of a Pair; a loss of `losses.preference` with its hyper-parameters bound.
    alpha: weight of the second term.

  Source: Xie et al. 2024, algorithm 1 (arXiv:2405.21046)
  """
  return loss(online_pair(logps, reference_logps, first_wins)) + alpha * logps[1]


def nash_md(
  token_logps: jax.Array,
  reference_token_logps: jax.Array,
  mask: jax.Array,
  preferred: jax.Array,
  *,
  beta: NonNegative = 0.1,
) -> jax.Array:
  """Computes beta sum_t r_t log p_t - (P - 1/2) log p of the policy's samples, [B].

  r_t = log p_t - log p_ref,t is a constant. The first term has the gradient of the KL, token by token; its value has no
  meaning.

  Args:
    token_logps, reference_token_logps: [B, T], nats.
    mask: [B, T], 1 on the completion.
    preferred: P [B], the probability that the sample beats one of the geometric mixture of policy and reference.
    beta: weight of the KL.

  Source: Munos et al. 2023, section 7 (arXiv:2312.00886)
  """
  logps = jnp.where(mask > 0, token_logps, 0)
  log_ratio = jax.lax.stop_gradient(jnp.where(mask > 0, token_logps - reference_token_logps, 0))
  return beta * jnp.sum(log_ratio * logps, axis=1) - (preferred - 0.5) * jnp.sum(logps, axis=1)


def mixture_logits(logits: jax.Array, reference_logits: jax.Array, mixture_coef: jax.Array | float) -> jax.Array:
  """Computes the logits [..., V] of p^(1 - c) p_ref^c, the opponent in Nash-MD, up to a constant; c = mixture_coef.

  Source: Munos et al. 2023, eq. 5 (arXiv:2312.00886)
  """
  return mixture_coef * reference_logits + (1 - mixture_coef) * logits
