"""Stochastic rounding of weights that are stored in bfloat16."""

import jax
import jax.numpy as jnp

from alignjax.types import Params


def stored(new: Params, old: Params, key: jax.Array | None) -> Params:
  """Casts new values to the dtypes of the old ones, those in bfloat16 rounded stochastically: right on average.

  The noise belongs to the key and the place of a number in its tree: no device and no resume changes it.

  Args:
    new: the values.
    old: a tree like `new`; its dtypes are read.
    key: of the noise; None only if nothing is in bfloat16.

  Source: Zamirai et al. 2020, section 3 (arXiv:2010.06192)
  """
  leaves, treedef = jax.tree.flatten(new)
  dtypes = [x.dtype for x in jax.tree.leaves(old)]
  rounded = []
  for number, (x, dtype) in enumerate(zip(leaves, dtypes, strict=True)):
    if dtype == jnp.bfloat16:
      assert key is not None
      rounded.append(round_stochastically(x, jax.random.fold_in(key, number)))
    else:
      rounded.append(x.astype(dtype))
  return jax.tree.unflatten(treedef, rounded)


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
  """Rounds x to bfloat16: to one of its two neighbours, each with the probability that makes x the mean.

  NaN and infinity stay.
  """
  x = x.astype(jnp.float32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  up = jax.lax.bitcast_convert_type(bits + noise & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), up, x).astype(jnp.bfloat16)
