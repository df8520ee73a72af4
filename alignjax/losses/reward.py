"""Losses of reward models: arrays in, per-pair losses out."""

import jax
import jax.numpy as jnp


def bradley_terry(
  chosen: jax.Array,
  rejected: jax.Array,
  *,
  margin: jax.Array | float = 0.0,
  center_coefficient: jax.Array | float = 0.0,
) -> jax.Array:
  """-log sigmoid(chosen - rejected - margin) + center_coefficient * (chosen + rejected)^2, per pair.

  The second term holds the mean reward near zero, which the likelihood leaves free (Eisenstein et al. 2023,
  arXiv:2312.09244); TRL's `center_rewards_coefficient`.

  Args:
    chosen: rewards of the preferred completions, any shape.
    rejected: rewards of the others, the same shape.
    margin: by how much a pair should differ, in units of reward.
    center_coefficient: weight of the centring term; 0 leaves it out.

  Source: Ouyang et al. 2022, eq. 1 (arXiv:2203.02155); margin: Touvron et al. 2023, eq. 2 (arXiv:2307.09288)
  """
  likelihood = -jax.nn.log_sigmoid(chosen - rejected - margin)
  return likelihood + center_coefficient * jnp.square(chosen + rejected)
