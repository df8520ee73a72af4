"""f-divergences in place of DPO's reverse KL.

Each function maps ratios log p / p_reference [...] (nats) to scores of the same shape: f'(p / p_reference) up to a
constant, which cancels in differences of scores.

Source: Wang et al. 2023, table 1 (arXiv:2309.16240)
"""

import math

import jax
import jax.numpy as jnp

from alignjax.system.ranges import Finite


def reverse_kl(ratio: jax.Array) -> jax.Array:
  """Returns the ratio itself, the reverse KL's score, as in DPO."""
  return ratio


def forward_kl(ratio: jax.Array) -> jax.Array:
  """Computes 1 - exp(-ratio). Constant below -80 (float32), where the exponent is capped; TRL's becomes infinite."""
  return -jnp.expm1(_capped(-ratio))


def js(ratio: jax.Array) -> jax.Array:
  """Computes log 2 + log sigmoid(ratio), for the Jensen-Shannon divergence."""
  return math.log(2) + jax.nn.log_sigmoid(ratio)


def alpha(ratio: jax.Array, *, divergence_alpha: Finite = 0.5) -> jax.Array:
  """Computes (exp((a - 1) ratio) - 1) / (a - 1) with a = divergence_alpha.

  a = 0 is `forward_kl`, and a = 1 `reverse_kl`, which is also taken within 1e-6 of 1. The exponent is capped at 80
  (float32), as in TRL 1.x. TRL 0.x counts the other way: its coefficient is 1 - a.
  """
  power = divergence_alpha - 1.0
  is_one = jnp.abs(power) < 1e-6
  exponent = _capped(jnp.where(is_one, 0.0, power) * ratio)
  return jnp.where(is_one, ratio, jnp.expm1(exponent) / jnp.where(is_one, 1.0, power))


def _capped(exponent: jax.Array) -> jax.Array:
  """Caps at 80 in float32 (and bfloat16), 701 in float64: the exponential, and sums of a few, stay finite."""
  return jnp.minimum(exponent, math.floor(math.log(float(jnp.finfo(exponent.dtype).max))) - 8)


DIVERGENCES = {f.__name__: f for f in (reverse_kl, forward_kl, js, alpha)}
