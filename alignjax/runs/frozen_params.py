"""The constant parameters of a run: its reference, and the models of other runs, such as a reward model.

Each tree is written once, next to the checkpoints, and verified whenever it is read. The reference of LoRA factors is
their base: there is no copy of it, in memory or on disk.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from alignjax.algorithms import Algorithm
from alignjax.errors import InputError
from alignjax.model import Model
from alignjax.runs import array_store
from alignjax.system.fingerprint import Table, digest, table
from alignjax.types import Params


class ConstantTrees(NamedTuple):
  """Makes the constant trees of a run, by name, on its mesh.

  Attributes:
    algorithm, model, mesh: of the run.
    base: the frozen base under LoRA factors; {} without factors.
  """

  algorithm: Algorithm
  model: Model
  mesh: jax.sharding.Mesh
  base: Params

  def abstract(self, name: str) -> Params:
    """Returns the tree of this name, abstract and placed."""
    if self._is_base(name):
      return self.model.split(self.model.abstract(self.mesh))[1]
    return self.algorithm.model_of(name, self.model).frozen().abstract(self.mesh)

  def copy(self, name: str, tree: Params) -> Params:
    """Copies a tree whose arrays will be donated, in the dtypes in which constant trees are held."""
    if self._is_base(name):
      return self.base
    return jax.tree.map(lambda x, to: jnp.array(x, to.dtype), tree, self.abstract(name))

  def load(self, name: str, workdir: epath.Path, expected_digest: str) -> Params:
    """Reads a tree from the run's directory; the reference of LoRA factors is the base, which is not read.

    Args:
      name: of the tree.
      workdir: of the run.
      expected_digest: as `save_reference` returned it.

    Raises:
      InputError: as `load_reference`.
    """
    if self._is_base(name):
      return self.base
    return load_reference(workdir / name, self.abstract(name), expected_digest)

  def _is_base(self, name: str) -> bool:
    return name == "reference" and bool(self.model.trained)


def save_reference(directory: epath.PathLike, params: Params, metadata: Mapping[str, Any] | None = None) -> str:
  """Writes a constant tree unless the directory has it, and returns the digest of its arrays.

  Args:
    directory: of this tree alone.
    params: its arrays.
    metadata: JSON, which `reference_metadata` returns.

  Raises:
    InputError: the directory holds another tree, or a damaged one; or it cannot be written.
  """
  path = array_store.absolute(directory)
  rows = table({"params": params})
  if not path.exists():
    items = {"params": params, "record": array_store.make_record(metadata or {}, rows)}
    try:
      with array_store.context():
        ocp.save_checkpointables(path, items)
    except Exception as error:  # from the writing threads: a full disk, a lost mount, anything
      raise InputError(f"{path}: cannot be written: {array_store.cause(error)}") from error
  elif digest(_record(path)[1]) != digest(rows):
    raise InputError(f"{path}: is the reference of another run; choose another workdir")
  return digest(rows)


def load_reference(directory: epath.PathLike, params: Params, expected_digest: str) -> Params:
  """Reads and verifies a constant tree.

  Args:
    directory: of this tree alone.
    params: abstract, with shardings, of any dtype: the saved arrays are cast.
    expected_digest: as `save_reference` returned it.

  Raises:
    InputError: it is missing, damaged, or not the one with the digest that the run began with.
  """
  path = array_store.absolute(directory)
  if (found := digest(_record(path)[1])) != expected_digest:
    raise InputError(
      f"{path}: is not the reference that this run began with (digest {found[:12]}, "
      f"not {expected_digest[:12]}); bring that one back from a copy"
    )
  return array_store.read_params(path, params)[0]


def reference_metadata(directory: epath.PathLike) -> dict[str, Any]:
  """Reads the metadata that `save_reference` was given.

  Raises:
    InputError: it cannot be read.
  """
  return _record(array_store.absolute(directory))[0]


def _record(path: epath.Path) -> tuple[dict[str, Any], Table]:
  try:
    return array_store.read_record(path)
  except array_store.DamagedError as error:
    raise InputError(f"{path}: cannot be read: {error}; bring it back from a copy") from error
