"""Moments of the stacked layers in the host's memory: the optimizer has one layer's at a time on the device.

Moved whole, the moments would take the place that they had left. Embeddings and vectors stay where they are.
"""

import re
from typing import Any

import jax
import optax

from alignjax.types import Params

HOST = "pinned_host"


def stacked(params: Params) -> Params:
  """True for the matrices of stacked layers [L, ...], where nearly all of a decoder is; False for all else.

  Not for the layers' vectors: the TPU compiler cuts no layer's out of a stack on the host.
  """
  names = lambda path: [str(getattr(key, "key", key)).lower() for key in path]
  matrix = lambda path: "layers" in names(path) and not re.search("norm|bias", names(path)[-1])
  return jax.tree_util.tree_map_with_path(lambda path, _: matrix(path), params)


def moment_shardings(params: Params) -> Params:
  """Where the moments of parameters with these NamedShardings lie."""
  move = lambda sharding, is_stacked: is_stacked and has_own_memory(sharding.mesh)
  place = lambda sharding, is_stacked: sharding.with_memory_kind(HOST) if move(sharding, is_stacked) else sharding
  return jax.tree.map(place, params, stacked(params))


def has_own_memory(mesh: jax.sharding.Mesh) -> bool:
  """Whether its devices do; a CPU's is the host's already."""
  return mesh.devices.flat[0].platform != "cpu"


def streamed(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
  """`tx` over one layer of the stacked matrices after the other, and then over all else: the same state and numbers.

  Moments go to the device for that, and back to where they were.

  Args:
    tx: it treats every number by itself, and reads no parameters.
  """

  def update(grads, state, params=None, **extra):
    del params
    stack = stacked(grads)
    take = lambda those: lambda x, is_stacked: x if is_stacked == those else None
    others, others_state = tx.update(
      jax.tree.map(take(False), grads, stack), optax.tree_map_params(tx, take(False), state, stack), None, **extra
    )
    grads, state = jax.tree.map(take(True), grads, stack), optax.tree_map_params(tx, take(True), state, stack)
    of_params = optax.tree_map_params(tx, lambda _: True, state, transform_non_params=lambda _: False)

    def one(layer, carry):
      grads, state = carry
      at = lambda x: jax.device_put(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), jax.memory.Space.Device)
      into = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, jax.device_put(new, _space(x)), layer, 0)
      own = jax.tree.map(lambda x, moves: at(x) if moves else x, state, of_params)
      updates, own = tx.update(jax.tree.map(at, grads), own, None, **extra)
      state = jax.tree.map(lambda x, new, moves: into(x, new) if moves else x, state, own, of_params)
      return jax.tree.map(into, grads, updates), state

    if not jax.tree.leaves(grads):  # a critic's head alone
      return others, others_state
    # In the carry, so that the updates take the gradient's place, and the moments their own.
    updates, state = jax.lax.fori_loop(0, _layers(grads), one, (grads, state))
    return _union(others, updates), _union(others_state, state)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def _layers(tree: Any) -> int:
  (count,) = {len(leaf) for leaf in jax.tree.leaves(tree)}  # a critic's trunk is as deep as the policy's
  return count


def _space(x: jax.Array) -> Any:  # a jax.memory.Space, which type checkers do not see
  return jax.typeof(x).memory_space


def _union(one: Any, other: Any) -> Any:
  """A tree from two with holes; what both have is the first one's."""
  return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda x: x is None)
