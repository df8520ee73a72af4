"""The table of weights that a model is made from: each weight's shape, axes and initialiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignjax.types import Params


class Weight(NamedTuple):
  """One parameter.

  Attributes:
    shape: of the array; layers are stacked on its first dimension.
    axes: the logical axis of each dimension (`sharding.RULES`); None: replicated.
    init: (key, shape, dtype) -> a fresh array.
    inputs: how many dimensions of a matrix (after that of the layers) meet the input; 0: it is no matrix.
    dtype: of the stored array; "": the model's param_dtype.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Callable[..., jax.Array]
  inputs: int = 0
  dtype: str = ""


def is_weight(x: Any) -> bool:
  """Returns True if a node of a table is one of its leaves."""
  return isinstance(x, Weight)


def init_weights(table: Any, key: jax.Array, dtype: str) -> Params:
  """Draws fresh weights of a table. A weight's key is folded from its path: adding a weight changes no other.

  Args:
    table: a tree of `Weight`.
    key: from which all are folded.
    dtype: of the weights that name none.
  """

  def draw(path, weight):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    folded = jax.random.fold_in(key, _stable_hash(name))
    return weight.init(folded, weight.shape, jnp.dtype(weight.dtype or dtype))

  return jax.tree_util.tree_map_with_path(draw, table, is_leaf=is_weight)


def _stable_hash(name: str) -> int:
  # Python's own hash differs from run to run.
  value = 2166136261
  for byte in name.encode():
    value = (value ^ byte) * 16777619 % 2**32
  return value
