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
  """Computes max((V - R)^2, (clip(V, V_old - epsilon, V_old + epsilon) - R)^2) / 2 of each token, as TokenLosses.

  `clipped` is 1.0 where the clipped square is the larger: there the value gets no gradient.

  Args:
    values: V [B, T], with a gradient.
    old_values, returns: V_old and R [B, T], constants.
    mask: [B, T], 1 on the completion; the loss is 0 elsewhere.
    epsilon: in units of value; inf clips nothing.

  Source: Schulman et al. 2017, in the authors' code (arXiv:1707.06347); Huang et al. 2024 (arXiv:2403.17031)
  """
  old_values, returns = jax.lax.stop_gradient((old_values, returns))
  clipped = jnp.clip(values, old_values - epsilon, old_values + epsilon)
  squares = jnp.square(values - returns)
  clipped_squares = jnp.square(clipped - returns)
  in_completion = mask > 0
  losses = jnp.where(in_completion, jnp.maximum(squares, clipped_squares) / 2, 0)
  return TokenLosses(losses, (in_completion & (clipped_squares > squares)).astype(values.dtype))
