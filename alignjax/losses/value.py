"""The loss of a value model."""

import jax
import jax.numpy as jnp

from alignjax.losses.policy import TokenLosses


def ppo_value_loss(
  values: jax.Array,
  old_values: jax.Array,
  returns: jax.Array,
  mask: jax.Array,
  *,
  epsilon: jax.Array | float = 0.2,
) -> TokenLosses:
  """max((V - R)^2, (clip(V, V_old - epsilon, V_old + epsilon) - R)^2) / 2, all [B, T]; epsilon = inf clips nothing.

  Source: Schulman et al. 2017, in the authors' code (arXiv:1707.06347); Huang et al. 2024 (arXiv:2403.17031)
  """
  old_values, returns = jax.lax.stop_gradient((old_values, returns))
  clipped = jnp.clip(values, old_values - epsilon, old_values + epsilon)
  squares = jnp.square(values - returns)
  clipped_squares = jnp.square(clipped - returns)
  in_completion = mask > 0
  losses = jnp.where(in_completion, jnp.maximum(squares, clipped_squares) / 2, 0)
  return TokenLosses(losses, (in_completion & (clipped_squares > squares)).astype(values.dtype))
