"""Losses of supervised fine-tuning."""

import jax
import jax.numpy as jnp


def cross_entropy(token_logps: jax.Array) -> jax.Array:
  """Returns -log p of each token, [B, T] in nats. Sum over completion tokens, divide by their count in the whole step.

  Source: the negative log-likelihood; TRL's `nll` normalises alike (by the tokens of all microbatches and devices)
  """
  return -token_logps


def dft(token_logps: jax.Array) -> jax.Array:
  """Computes -p log p of each token, [B, T] in nats, the factor p a constant: no token outweighs the likely ones.

  The gradient of the likelihood is that of a policy whose rewards are 1 / p; the factor takes them back to 1. Divide as
  for `cross_entropy`.

  Source: Wu et al. 2025, the token-level loss (arXiv:2508.05629)
  """
  return -jax.lax.stop_gradient(jnp.exp(token_logps)) * token_logps
