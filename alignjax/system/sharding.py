"""One mesh of four axes, and the table that lays every array out on it.

`data` holds replicas. `fsdp` shards rows of the batch and the parameters' embed axis. `sequence` shards the tokens of a
row and that same axis. `tensor` shards heads, feed-forward and vocabulary. Only `data` crosses slices of TPUs, because
the network between them is slow. Axes are Auto: the compiler partitions, a few constraints steer it.
"""

import collections
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from alignjax.errors import InputError
from alignjax.types import Batch, Params, TrainState

# logical axis -> mesh axis (or axes); None is replicated. An unknown name is an error, never "replicated".
RULES: dict[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "layers": None,
  "embed": ("sequence", "fsdp"),
  "looked_up": "sequence",  # an embedding between its lookup and its row
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "rank": None,
  "mlp": "tensor",
  "vocab": "tensor",
  "tokens": "sequence",  # tokens of a row in a matmul
  "stream": ("sequence", "tensor"),  # tokens between the layers
  "attended": ("tensor", "sequence"),  # heads in attention, where each sees all tokens of a row
  "replica": "data",  # rows that every shard of the parameters processes
}


def make_mesh(
  data: int | None = None,
  fsdp: int = -1,
  tensor: int = 1,
  sequence: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Makes a mesh with axes (data, fsdp, sequence, tensor); one size may be -1, which takes the devices that remain.

  Devices that are linked on a TPU are neighbours on the mesh; GPUs are ordered by number, CPU devices as given.

  Args:
    data: number of replicas; None takes 1, or the number of TPU slices.
    fsdp: size within each replica.
    tensor: size within each replica.
    sequence: size within each replica.
    devices: all if None.

  Raises:
    InputError: the sizes do not multiply to the number of devices, a replica does not fit in a slice, or slices are not
      of one size.
  """
  if devices is None:
    devices = jax.devices()
  devices = list(devices)
  tpus = [device for device in devices if device.platform == "tpu"]
  slice_sizes = collections.Counter(getattr(device, "slice_index", 0) for device in tpus)
  slices = len(slice_sizes) or 1
  if len({*slice_sizes.values()}) > 1:
    counts = ", ".join(str(slice_sizes[number]) for number in sorted(slice_sizes))
    raise InputError(f"mesh: the {slices} slices hold {counts} devices; take slices of one size")
  if data is None:
    data = slices
  sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
  for name, size in sizes.items():
    if isinstance(size, bool) or not isinstance(size, int):
      raise InputError(f"mesh.{name}={size!r}: must be a whole number, -1 for the devices that remain")
  asked = " x ".join(f"{name}={size}" for name, size in sizes.items() if name != "sequence" or size > 1)
  free = [name for name, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(free) == 1 and known > 0 and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices) or min(sizes.values()) < 1:
    raise InputError(
      f"mesh: {asked} does not cover {len(devices)} devices; make the product equal, or set one size to -1"
    )
  if sizes["data"] % slices:
    raise InputError(
      f"mesh: {asked} would put a replica across {slices} slices, between which the network is slow; "
      f"set mesh.data to {slices} or a multiple of it"
    )
  within = (sizes["data"] // slices, *list(sizes.values())[1:])
  if slices > 1:
    placed = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
  else:
    placed = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
  return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * 4)


def spec(*axes: str | None) -> PartitionSpec:
  """Returns the PartitionSpec of an array whose dimensions have these logical axes.

  Raises:
    KeyError: `RULES` does not name an axis.
  """
  return PartitionSpec(*map(_rule, axes))


def _rule(axis: str | None) -> str | tuple[str, ...] | None:
  if axis is None:
    return None
  return RULES[axis]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Asks the compiler to lay `x` out by its logical axes; outside of any mesh, returns `x` itself."""
  layout = spec(*axes)
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, layout)


def ways(axis: str | None, mesh: Mesh | AbstractMesh | None = None) -> int:
  """Counts the parts that a mesh makes of a logical axis; 1 outside of any mesh.

  Args:
    axis: a logical axis; None is not split.
    mesh: the current one if None.
  """
  if mesh is None:
    mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  return math.prod(mesh.shape[name] for name in _names(axis))


def dividing(size: int, *axes: str) -> str | None:
  """Returns the first of some logical axes that divides a dimension of this size into equal parts; None: none does."""
  return next((axis for axis in axes if size % ways(axis) == 0), None)


def _names(axis: str | None) -> tuple[str, ...]:
  """The mesh axes over which a logical axis is split."""
  rule = _rule(axis)
  if rule is None:
    return ()
  if isinstance(rule, str):
    return (rule,)
  return rule


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
  """Gathers a weight for a matmul: whole over fsdp, otherwise laid out by its logical axes; so is its gradient.

  Without it, the TPU compiler would send partial sums of the product around, in many small steps.
  """
  return _gather(axes, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(axes, x):
  x = constrain(x, *axes)  # so it is sent in the dtype that it has here
  return constrain(x, *(None if axis == "embed" else axis for axis in axes))


def _gather_forward(axes, x):
  return _gather(axes, x), None


def _gather_backward(axes, _, gradient):
  return (constrain(gradient, *axes),)


_gather.defvjp(_gather_forward, _gather_backward)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: rows over (data, fsdp), everything else replicated."""
  return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that puts a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def host_share(mesh: Mesh) -> tuple[int, int]:
  """Returns (k, n): this host has the k-th of n equal parts of a batch's rows; hosts that split weights share a part.

  Raises:
    InputError: parts overlap, or differ in size.
  """
  shards = ways("batch", mesh)
  rows_of_host: dict[int, set[int]] = {}
  placement: Mapping[jax.Device, Any] = batch_sharding(mesh).devices_indices_map((shards,))
  for device, (rows,) in placement.items():
    rows_of_host.setdefault(device.process_index, set()).add(rows.start or 0)
  parts = sorted({tuple(sorted(rows)) for rows in rows_of_host.values()})
  if sum(map(len, parts)) != shards or len({len(rows) for rows in parts}) > 1:
    raise InputError(
      f"mesh: hosts hold overlapping rows with sequence x tensor = {ways('stream', mesh)}; let it divide the devices "
      "of a host, or be a multiple of these"
    )
  mine = rows_of_host.get(jax.process_index(), parts[0])
  return parts.index(tuple(sorted(mine))), len(parts)


def to_mesh(rows: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
  """Makes the global batch on the mesh from the rows of each host: its `host_share`; all that data gives is rows."""
  layout = batch_sharding(mesh)
  return Batch({name: jax.make_array_from_process_local_data(layout, x) for name, x in rows.items()})


def local_rows(x: jax.Array) -> np.ndarray:
  """Returns the rows of a batch's array that this host has, in order; the inverse of `to_mesh`."""
  shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def rows_multiple(mesh: Mesh, microbatches: int, minibatches: int = 1, completions: int = 1) -> int:
  """Returns the number by which rows of data must be divisible for an equal split; arguments as in `check_rows`."""
  at_once = ways("batch", mesh) * microbatches
  sampled = at_once * minibatches  # must divide the rows times their completions
  return math.lcm(at_once, sampled // math.gcd(sampled, completions))


def check_rows(
  rows: int, length: int, microbatches: int, mesh: Mesh, minibatches: int = 1, completions: int = 1
) -> None:
  """Raises InputError if the rows of a batch cannot be split over minibatches, microbatches and devices.

  Args:
    rows: rows of a batch: data.rows times the completions of each.
    length: tokens of a row.
    microbatches: parts of an optimizer step.
    mesh: the devices.
    minibatches: optimizer steps of a pass over an online batch.
    completions: completions of each prompt of an online batch.
  """
  shards = ways("batch", mesh)
  cuts = ways("tokens", mesh)
  if length % cuts:
    raise InputError(f"mesh.sequence={cuts} does not divide rows of {length} tokens; change one of them")
  parts = {
    f"data x fsdp = {shards} devices": shards,
    f"optimizer.microbatches={microbatches}": microbatches,
    f"algorithm.minibatches={minibatches}": minibatches,
  }
  if rows // completions % rows_multiple(mesh, microbatches, minibatches, completions):
    product = f"data.rows={rows // completions}"
    remedy = f"use a multiple of {math.prod(parts.values())}"
    if completions > 1:
      product += f" x algorithm.num_generations={completions}"
      remedy = "change one of them"
    if rows < shards:
      remedy += ", or split rows with mesh.sequence"
    split = " times ".join(name for name, count in parts.items() if count > 1)
    raise InputError(f"{product} is not divisible by {split}; {remedy}")


def weight_shardings(weights, mesh: Mesh) -> Params:
  """Returns NamedShardings for a table of `Weight(shape, axes, init)`.

  Raises:
    InputError: a mesh axis does not divide its dimension.
  """

  def sharding(path, weight):
    layout = spec(*weight.axes)
    for size, axis in zip(weight.shape, weight.axes, strict=True):
      if size % ways(axis, mesh):
        sizes = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in _names(axis) if mesh.shape[name] > 1)
        raise InputError(
          f"model: {jax.tree_util.keystr(path, simple=True, separator='.')} {weight.shape} has a "
          f"dimension of {size}, which {sizes} does not divide; change one of them"
        )
    return NamedSharding(mesh, layout)

  return jax.tree_util.tree_map_with_path(sharding, weights, is_leaf=lambda w: hasattr(w, "axes"))


def state_shardings(
  state: TrainState, tx: optax.GradientTransformation, params: Params, mesh: Mesh, moments: Params | None = None
) -> TrainState:
  """Returns the shardings of a TrainState: moments and synced trees as their parameters, scalars replicated.

  Args:
    state: the (abstract) state.
    tx: the optimizer that made its opt_state.
    params: shardings of `state.params`.
    mesh: everything else is replicated on it.
    moments: shardings of the moments; None: those of the parameters.
  """
  whole: Any = replicated(mesh)  # in place of an array

  def place(leaf, param, sharding):
    if _is_hole(leaf):
      return leaf
    if leaf.shape == param.shape:
      return sharding
    return whole

  opt_state = optax.tree_map_params(
    tx,
    place,
    state.opt_state,
    state.params,
    moments or params,
    transform_non_params=lambda _: whole,
    is_leaf=_is_hole,
  )
  return TrainState(
    step=whole,
    params=params,
    opt_state=opt_state,
    key=whole,
    skipped=whole,
    skipped_in_a_row=whole,
    running=dict.fromkeys(state.running, whole),
    synced=dict.fromkeys(state.synced, params),
  )


def _is_hole(leaf) -> bool:
  """True for a place whose moments another part of the optimizer has."""
  return isinstance(leaf, optax.MaskedNode)
