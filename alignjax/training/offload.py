"""Keeps the moments of the stacked layers in the host's memory; one layer's at a time are on the device.

If all moments were moved to the device at once, they would take the memory that offloading freed. The moments of
embeddings and vectors stay on the device.
"""

import re
from typing import Any

import jax
import optax

from alignjax.types import Params

HOST = "pinned_host"


def stacked(params: Params) -> Params:
  """Marks the matrices of stacked layers [L, ...], which hold nearly all of a decoder: True; all else is False.

  False for the layers' vectors: the TPU compiler cannot slice one layer's out of a stack on the host.

  Args:
    params: a tree whose paths are those of the parameters; its leaves are not read.
  """

  def is_stacked_matrix(path, leaf) -> bool:
    del leaf
    names = [str(getattr(key, "key", key)).lower() for key in path]
    return "layers" in names and not re.search("norm|bias", names[-1])

  return jax.tree_util.tree_map_with_path(is_stacked_matrix, params)


def moment_shardings(params: Params) -> Params:
  """Returns the shardings of the moments, from a tree of the parameters' NamedShardings.

  Those of `stacked` matrices move to the host's memory; on CPUs none does.
  """

  def moved(sharding, is_stacked):
    if is_stacked and has_own_memory(sharding.mesh):
      return sharding.with_memory_kind(HOST)
    return sharding

  return jax.tree.map(moved, params, stacked(params))


def has_own_memory(mesh: jax.sharding.Mesh) -> bool:
  """Returns True if the mesh's devices have memory of their own; a CPU uses the host's."""
  return mesh.devices.flat[0].platform != "cpu"


def streamed(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
  """Applies `tx` to one layer of the stacked matrices after the other, and once to all else: same state and numbers.

  The moments of a layer are moved to the device for its update, and back afterwards.

  Args:
    tx: treats every number by itself, and reads no parameters.
  """

  def update(grads, state, params=None, **extra):
    del params
    stack = stacked(grads)
    other_grads = jax.tree.map(_unless_stacked, grads, stack)
    other_state = optax.tree_map_params(tx, _unless_stacked, state, stack)
    other_updates, other_state = tx.update(other_grads, other_state, None, **extra)
    grads = jax.tree.map(_if_stacked, grads, stack)
    state = optax.tree_map_params(tx, _if_stacked, state, stack)
    if not jax.tree.leaves(grads):  # a critic's head alone
      return other_updates, other_state
    is_moment = optax.tree_map_params(tx, lambda _: True, state, transform_non_params=lambda _: False)

    def update_layer(layer, carry):
      grads, state = carry

      def slice_of(x):
        return jax.device_put(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), jax.memory.Space.Device)

      def with_slice(x, new):
        return jax.lax.dynamic_update_index_in_dim(x, jax.device_put(new, _space(x)), layer, 0)

      def state_slice(x, moves):
        if moves:
          return slice_of(x)
        return x

      def with_state_slice(x, new, moves):
        if moves:
          return with_slice(x, new)
        return x

      layer_state = jax.tree.map(state_slice, state, is_moment)
      updates, layer_state = tx.update(jax.tree.map(slice_of, grads), layer_state, None, **extra)
      state = jax.tree.map(with_state_slice, state, layer_state, is_moment)
      return jax.tree.map(with_slice, grads, updates), state

    # In the carry, the updates take the gradient's memory, and the new moments take the old ones'.
    updates, state = jax.lax.fori_loop(0, _layers(grads), update_layer, (grads, state))
    return _union(other_updates, updates), _union(other_state, state)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def _if_stacked(x: Any, is_stacked: bool) -> Any:
  if is_stacked:
    return x
  return None


def _unless_stacked(x: Any, is_stacked: bool) -> Any:
  if is_stacked:
    return None
  return x


def _layers(tree: Any) -> int:
  (count,) = {len(leaf) for leaf in jax.tree.leaves(tree)}  # a critic's trunk is as deep as the policy's
  return count


def _space(x: jax.Array) -> Any:  # a jax.memory.Space, which type checkers do not see
  return jax.typeof(x).memory_space


def _union(one: Any, other: Any) -> Any:
  """Fills the Nones of one tree from another; if both have a value, the first tree's is taken."""

  def first_of(a, b):
    if a is None:
      return b
    return a

  return jax.tree.map(first_of, one, other, is_leaf=lambda x: x is None)
