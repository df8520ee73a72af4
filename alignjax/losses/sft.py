"""Losses of supervised fine-tuning."""

import jax


def cross_entropy(token_logps: jax.Array) -> jax.Array:
  """-log p of each token, [B, T] in nats. Sum over completion tokens, divide by their count in the whole step.

  Source: the negative log-likelihood; TRL's `nll` normalises alike (by the tokens of all microbatches and devices)
  """
  return -token_logps
