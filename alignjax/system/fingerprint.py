"""Fingerprints of the exact bits of a tree of arrays: equal on any mesh, different after any changed bit.

File formats check the bytes that they wrote, and Orbax does not even do that: a flipped bit in the data of
an array loads silently. So every checkpoint has the fingerprints of its arrays.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

Table = dict[str, dict[str, Any]]  # path of an array -> its shape, dtype and fingerprint


def flatten(tree: Any) -> dict[str, Any]:
  """Returns the leaves by paths like `params/layers/q`, in the tree's order."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_name(path: tuple[Any, ...]) -> str:
  """Returns a key path of `jax.tree_util` as text, its parts joined by slashes."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def fingerprint(tree: Any) -> dict[str, str]:
  """Computes the 64-bit fingerprint of each array, as 16 hex digits, by path."""
  # One program for all. Of several, those that wait could hold the threads that the first one's collective needs (CPU).
  sums = jax.device_get(_bit_sums(flatten(tree)))
  return {path: f"{int(plain):08x}{int(weighted):08x}" for path, (plain, weighted) in sums.items()}


def describe(leaf: Any) -> dict[str, Any]:
  """Returns shape and dtype of an array, abstract or not, as JSON."""
  return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def table(tree: Any) -> Table:
  """Returns shape, dtype and fingerprint of each array, by path, as JSON."""
  prints = fingerprint(tree)
  return {path: describe(leaf) | {"fingerprint": prints[path]} for path, leaf in flatten(tree).items()}


def digest(value: Any) -> str:
  """Returns the hex sha256 of a JSON value, such as a table."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@jax.jit
def _bit_sums(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
  sums = {}
  for path, leaf in leaves.items():
    is_on_host = jax.typeof(leaf).memory_space == jax.memory.Space.Host
    sums[path] = _streamed_sums(leaf) if is_on_host else _sums(leaf)
  return sums


def _streamed_sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes `_sums` of a stack in the host's memory: one layer at a time is moved to the device."""

  def add(layer, sums):
    values = jax.device_put(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), jax.memory.Space.Device)
    return jax.tree.map(jnp.add, sums, _sums(values, layer.astype(jnp.uint32) * jnp.uint32(values.size % 2**32)))

  return jax.lax.fori_loop(0, len(x), add, (jnp.uint32(0), jnp.uint32(0)))


def _sums(x: jax.Array, first: jax.Array | int = 0) -> tuple[jax.Array, jax.Array]:
  """Computes a plain and a position-weighted uint32 sum of the mixed words of `x`; the first has the position `first`.

  Addition modulo 2^32 is exact in any order, so the sums do not depend on how devices split `x`.
  """
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  # The linear index from one iota per axis: a reshape would gather a sharded array.
  index = jnp.full(words.shape, first, jnp.uint32)
  stride = 1
  for axis in reversed(range(words.ndim)):
    iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    index += iota * jnp.uint32(stride % 2**32)
    stride *= words.shape[axis]
  # Odd multipliers and shifts spread every bit of index and word over the sum (as in murmur3).
  index = index * jnp.uint32(0x9E3779B1) + jnp.uint32(0x9E3779B9)
  index ^= index >> 15
  mixed = (words ^ index) * jnp.uint32(0x85EBCA6B)
  mixed ^= mixed >> 13
  return mixed.sum(dtype=jnp.uint32), (mixed * (index | 1)).sum(dtype=jnp.uint32)
