"""A directory of arrays with a sealed record: it reads back exactly as it was written, or an error says why not.

Orbax stores the items (trees of arrays). A JSON file beside them is the record: the caller's metadata, the table of the
arrays' shapes, dtypes and fingerprints, and a sha256 of both. Several hosts write together. Each reads its own parts by
itself, and then all exchange whether they succeeded, so none waits for a host that failed.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from alignjax.errors import InputError
from alignjax.system import hosts, reading
from alignjax.system.fingerprint import Table, describe, digest, fingerprint, flatten, path_name
from alignjax.types import Params


class DamagedError(Exception):
  """A directory does not read back as it was written; the text is the cause, in one line."""


def read(
  path: epath.Path, items: dict[str, Any], same: Sequence[str] = ("shape", "dtype")
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads and verifies items of one directory; returns them in their saved dtypes, and the metadata.

  Args:
    path: the directory.
    items: abstract trees by name, with the shardings to read them to; other items are not read.
    same: properties of the arrays that must agree with the saved ones, besides their paths: of "shape" and "dtype".

  Raises:
    InputError: it holds other arrays than `items`.
    DamagedError: it cannot be read, or an array is not what was saved.
  """
  metadata, arrays = read_record(path)
  saved = {name: row for name, row in arrays.items() if name.split("/")[0] in items}
  _require_same(path, saved, {name: describe(leaf) for name, leaf in flatten(items).items()}, same)
  loaded = {}
  failure = ""
  for name, tree in _placed(items, saved).items():
    # One at a time: in a joint load, the failure of one item is masked and leaves the others' coroutines behind. Every
    # item is loaded even after a failure: Orbax numbers its operations, and all hosts must count alike.
    try:
      with _alone():
        loaded[name] = ocp.load(path, tree, checkpointable_name=name)
    except Exception as error:  # Orbax, TensorStore, json and the file system each have their own
      failure = failure or cause(error)
  _agree(failure)
  prints = fingerprint(loaded)
  changed = [name for name, row in saved.items() if prints[name] != row["fingerprint"]]
  if changed:
    raise DamagedError(f"{listed(changed)}: changed since it was saved (fingerprints differ)")
  return loaded, metadata


def read_params(path: epath.Path, params: Params, fresh: Sequence[str] = ()) -> tuple[Params, dict[str, Any]]:
  """Reads and verifies the item `params` of one directory; returns it in the dtypes of `params`, and the metadata.

  Args:
    path: the directory.
    params: abstract.
    fresh: top-level names in `params` that the directory may lack; the result lacks them too.

  Raises:
    InputError: it is damaged, or holds other arrays than `params`.
  """
  try:
    if fresh:
      held = {name.split("/")[1] for name in read_record(path)[1] if name.startswith("params/")}
      params = {name: leaf for name, leaf in params.items() if name in held or name not in fresh}
    wanted = {"params": params}
    items, metadata = read(path, wanted, same=("shape",))
  except DamagedError as error:
    raise InputError(f"{path}: cannot be read: {error}; take another one, or a copy") from error

  def cast(x, to):
    if x.dtype == to.dtype:
      return x
    return x.astype(to.dtype)

  return jax.tree.map(cast, items, wanted)["params"], metadata


def make_record(
  metadata: Mapping[str, Any], arrays: Table, metrics: Mapping[str, float] | None = None
) -> dict[str, Any]:
  """Makes the item `record` of a directory, sealed; values that are not JSON fail here and not in a writing thread.

  Args:
    metadata: the caller's JSON.
    arrays: of `fingerprint.table`.
    metrics: None leaves the entry out.

  Raises:
    TypeError, ValueError: a value is not JSON, or not finite.
  """
  body = {"metadata": dict(metadata), "arrays": arrays}
  if metrics is not None:
    body["metrics"] = dict(metrics)
  body = json.loads(json.dumps(body, allow_nan=False))
  return body | {"sha256": digest(body)}


def metrics_of(path: epath.Path) -> dict[str, float] | None:
  """Reads the metrics in the record of a directory without Orbax; None if it has none or is damaged."""
  record = json_object(path / "record" / "data.json")
  if record is None or record.pop("sha256", None) != digest(record):
    return None
  return record.get("metrics")


def json_object(path: epath.Path) -> dict[str, Any] | None:
  """Reads the JSON object in a file; None if the file is missing or holds something else."""
  try:
    value = json.loads(reading.read_bytes(path))
  except (OSError, ValueError, RecursionError):
    return None
  if not isinstance(value, dict):
    return None
  return value


def read_record(path: epath.Path) -> tuple[dict[str, Any], Table]:
  """Reads the metadata of a directory, and the table of its arrays.

  Raises:
    DamagedError: it cannot be read, or is not what was saved.
  """
  failure = ""
  try:
    reading.check(path / "record" / "data.json")
    with _alone():
      record = ocp.load_checkpointables(path, {"record": None})["record"]
    seal = record.pop("sha256")
    metadata, arrays = record["metadata"], record["arrays"]
    if digest(record) != seal:
      failure = "its record changed since it was saved (sha256 differs)"
  except Exception as error:  # as in read
    failure = f"its record: {cause(error)}"
  _agree(failure)
  return metadata, arrays


def _alone() -> ocp.Context:
  """Returns a context in which Orbax reads without waiting for other hosts."""
  context = ocp.Context()
  context.multiprocessing.primary_host = jax.process_index()
  context.multiprocessing.active_processes = {jax.process_index()}
  return context


def _agree(failure: str) -> None:
  """Raises DamagedError on every host if one of them has failed: all must fall back to the same other directory."""
  if hosts.anywhere(bool(failure)):
    raise DamagedError(failure or "another host cannot read its part")


def _require_same(path: epath.Path, saved: Table, wanted: Table, same: Sequence[str]) -> None:
  """Raises InputError if the saved arrays and the wanted ones differ in their paths, or in a property in `same`."""
  problems = [f"it lacks {name}" for name in wanted if name not in saved]
  problems += [f"nothing here takes its {name}" for name in saved if name not in wanted]
  for name in wanted:
    if name in saved and any(saved[name][key] != wanted[name][key] for key in same):
      problems.append(f"its {name} is {_type_of(saved[name])} and not {_type_of(wanted[name])}")
  if problems:
    raise InputError(
      f"{path}: holds other arrays than asked for: {listed(problems)}; "
      "use the config that it was made with, or another checkpoint"
    )


def _type_of(row: Mapping[str, Any]) -> str:
  """Returns the dtype and shape of a table's row, such as "float32[2, 3]"."""
  return f"{row['dtype']}{row['shape']}"


def _placed(items: dict[str, Any], saved: Table) -> dict[str, Any]:
  """Puts the abstract items in their saved dtypes.

  A leaf without a sharding is replicated on the mesh of the others.
  """
  default: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  for sharding in map(_sharding_of, jax.tree.leaves(items)):
    if isinstance(sharding, jax.NamedSharding):
      default = jax.NamedSharding(sharding.mesh, jax.P())
      break

  def place(path, leaf):
    row = saved[path_name(path)]
    dtype = leaf.dtype
    if str(dtype) != row["dtype"]:
      dtype = jnp.dtype(row["dtype"])
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=_sharding_of(leaf) or default)

  return jax.tree_util.tree_map_with_path(place, items)


def _sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
  """Returns the sharding that a leaf asks for.

  None if it has none, or is an uncommitted array, whose device is arbitrary.
  """
  if not getattr(leaf, "committed", True):
    return None
  return getattr(leaf, "sharding", None)


def absolute(directory: epath.PathLike) -> epath.Path:
  """Returns the absolute path of a directory, which Orbax requires; ~ is the home folder."""
  return epath.Path(directory).expanduser().resolve()


def context() -> ocp.Context:
  """Makes the context in which Orbax writes these directories."""
  context = ocp.Context()
  context.array.saving.use_compression = False  # it saves 8 % of float32's size and takes three quarters of the speed
  # A folder that cannot be made fails at once. Made in the background, its threads would keep the process for minutes.
  context.async_options.create_directories_asynchronously = False
  context.checkpointables.registry = ocp.handlers.local_registry()
  context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="record")
  return context


def cause(error: BaseException) -> str:
  """Returns the root cause of an error in one line: Orbax wraps it in a page about handlers."""
  while error.__cause__ is not None:
    error = error.__cause__
  return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def listed(parts: Sequence[str], most: int = 4) -> str:
  """Joins the first `most` parts in one line, and says how many more there are."""
  line = "; ".join(parts[:most])
  if len(parts) > most:
    line += f" and {len(parts) - most} more"
  return line
