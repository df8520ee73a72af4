"""One directory of arrays with a sealed record of them: what is read is what was written, or an error says why not.

The items (trees of arrays) are Orbax's; the record is a JSON file beside them: the caller's metadata, the table of the
arrays' shapes, dtypes and fingerprints, and a sha256 of both. Several hosts write together; each reads its own parts by
itself, and then all say whether they could: none waits for one that could not.
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
  """A directory that does not read back as it was written; its text is the cause, in one line."""


def read(
  path: epath.Path, items: dict[str, Any], same: Sequence[str] = ("shape", "dtype")
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The verified items of one directory, in their saved dtypes and on the asked shardings; and its metadata.

  Args:
    path: the directory.
    items: abstract trees by name; other items are not read.
    same: what must agree with the saved arrays, besides their paths.

  Raises:
    InputError: it holds other arrays than `items`.
    DamagedError: it cannot be read, or an array is not what was saved.
  """
  metadata, arrays = read_record(path)
  saved = {name: row for name, row in arrays.items() if name.split("/")[0] in items}
  _require_same(path, saved, {name: describe(leaf) for name, leaf in flatten(items).items()}, same)
  loaded, failure = {}, ""
  for name, tree in _placed(items, saved).items():
    # One by one: together, the failure of one is masked and leaves the others' coroutines behind. All of them, failure
    # or not: Orbax numbers what it does, and the hosts have to count alike.
    try:
      with _alone():
        loaded[name] = ocp.load(path, tree, checkpointable_name=name)
    except Exception as error:  # Orbax, TensorStore, json and the file system: each has its own
      failure = failure or cause(error)
  _agree(failure)
  prints = fingerprint(loaded)
  changed = [name for name, row in saved.items() if prints[name] != row["fingerprint"]]
  if changed:
    raise DamagedError(f"{listed(changed)}: changed since it was saved (fingerprints differ)")
  return loaded, metadata


def read_params(path: epath.Path, params: Params, fresh: Sequence[str] = ()) -> tuple[Params, dict[str, Any]]:
  """The verified item `params` of one directory, cast to the asked dtypes; and its metadata.

  Args:
    path: the directory.
    params: abstract.
    fresh: top-level names in `params` that it may lack.

  Raises:
    InputError: it is damaged, or holds other arrays than asked for.
  """
  try:
    if fresh:
      held = {name.split("/")[1] for name in read_record(path)[1] if name.startswith("params/")}
      params = {name: leaf for name, leaf in params.items() if name in held or name not in fresh}
    wanted = {"params": params}
    items, metadata = read(path, wanted, same=("shape",))
  except DamagedError as error:
    raise InputError(f"{path}: cannot be read: {error}; take another one, or a copy") from error
  cast = lambda x, to: x if x.dtype == to.dtype else x.astype(to.dtype)
  return jax.tree.map(cast, items, wanted)["params"], metadata


def make_record(
  metadata: Mapping[str, Any], arrays: Table, metrics: Mapping[str, float] | None = None
) -> dict[str, Any]:
  """The item `record` of a directory, sealed; what is not JSON fails here and not in a writing thread."""
  body = {"metadata": dict(metadata), "arrays": arrays} | ({} if metrics is None else {"metrics": dict(metrics)})
  body = json.loads(json.dumps(body, allow_nan=False))
  return body | {"sha256": digest(body)}


def metrics_of(path: epath.Path) -> dict[str, float] | None:
  """The metrics in the record of a directory, read without Orbax; None where it has none or is damaged."""
  record = json_object(path / "record" / "data.json")
  if record is None or record.pop("sha256", None) != digest(record):
    return None
  return record.get("metrics")


def json_object(path: epath.Path) -> dict[str, Any] | None:
  """The JSON object in a file; None where it is not there, or is something else."""
  try:
    found = json.loads(reading.read_bytes(path))
  except (OSError, ValueError, RecursionError):
    return None
  return found if isinstance(found, dict) else None


def read_record(path: epath.Path) -> tuple[dict[str, Any], Table]:
  """The metadata of a directory, and the table of its arrays.

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
  """Within, Orbax reads without waiting for other hosts."""
  context = ocp.Context()
  context.multiprocessing.primary_host = jax.process_index()
  context.multiprocessing.active_processes = {jax.process_index()}
  return context


def _agree(failure: str) -> None:
  """Raises DamagedError on every host where one of them has failed: all must turn to the same other directory."""
  if hosts.anywhere(bool(failure)):
    raise DamagedError(failure or "another host cannot read its part")


def _require_same(path: epath.Path, saved: Table, wanted: Table, same: Sequence[str]) -> None:
  both = [name for name in wanted if name in saved]
  typed = lambda row: f"{row['dtype']}{row['shape']}"
  problems = [
    *(f"it lacks {name}" for name in wanted if name not in saved),
    *(f"nothing here takes its {name}" for name in saved if name not in wanted),
    *(
      f"its {name} is {typed(saved[name])} and not {typed(wanted[name])}"
      for name in both
      if any(saved[name][key] != wanted[name][key] for key in same)
    ),
  ]
  if problems:
    raise InputError(
      f"{path}: holds other arrays than asked for: {listed(problems)}; "
      "use the config that it was made with, or another checkpoint"
    )


def _placed(items: dict[str, Any], saved: Table) -> dict[str, Any]:
  """The abstract items in their saved dtypes; a leaf without a sharding is replicated on the mesh of the others."""

  def own(leaf):
    # An uncommitted array is where it is by accident.
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None

  def place(path, leaf):
    row = saved[path_name(path)]
    dtype = leaf.dtype if str(leaf.dtype) == row["dtype"] else jnp.dtype(row["dtype"])
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=own(leaf) or default)

  shardings = [own(leaf) for leaf in jax.tree.leaves(items)]
  meshes = [s.mesh for s in shardings if isinstance(s, jax.NamedSharding)]
  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  default = jax.NamedSharding(meshes[0], jax.P()) if meshes else one
  return jax.tree_util.tree_map_with_path(place, items)


def absolute(directory: epath.PathLike) -> epath.Path:
  """A directory by the name that Orbax asks for."""
  return epath.Path(directory).expanduser().resolve()


def context() -> ocp.Context:
  """How Orbax writes these directories."""
  context = ocp.Context()
  context.array.saving.use_compression = False  # it gains 8 % on float32 and takes three quarters of the speed
  # A folder that cannot be made fails at once; made in the background, its threads would keep the process for minutes.
  context.async_options.create_directories_asynchronously = False
  context.checkpointables.registry = ocp.handlers.local_registry()
  context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="record")
  return context


def cause(error: BaseException) -> str:
  """What lies under an error, in one line, for Orbax wraps the reason in a page about handlers."""
  while error.__cause__ is not None:
    error = error.__cause__
  return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def listed(parts: Sequence[str], most: int = 4) -> str:
  """The first parts in one line, and how many more there are."""
  more = f" and {len(parts) - most} more" if len(parts) > most else ""
  return "; ".join(parts[:most]) + more
