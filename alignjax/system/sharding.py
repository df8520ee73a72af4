"""One mesh of four axes, and the table that lays every array out on it.

`data` holds replicas, `fsdp` shards rows of the batch and the parameters' embed axis, `sequence` shards the tokens of a
row and that same axis, `tensor` shards heads, feed-forward and vocabulary. Between slices of TPUs, whose network is
slow, goes `data` alone. Axes are Auto: the compiler partitions, a few constraints steer it.
"""

import collections
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alignjax.errors import InputError
from alignjax.types import Batch, Params, TrainState

# logical axis -> mesh axis (or axes); None is replicated. A name that is not here is an error, never "replicated".
RULES: dict[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "layers": None,
  "embed": ("sequence", "fsdp"),
  "looked_up": "sequence",  # an embedding, on its way from there to its row
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "rank": None,
  "mlp": "tensor",
  "vocab": "tensor",
  "tokens": "sequence",  # of a row, in a matmul
  "stream": ("sequence", "tensor"),  # tokens between the layers
  "attended": ("tensor", "sequence"),  # heads while each sees all tokens of a row
  "replica": "data",  # rows that every shard of the parameters works on
}


def make_mesh(
  data: int | None = None,
  fsdp: int = -1,
  tensor: int = 1,
  sequence: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh with axes (data, fsdp, sequence, tensor); one size may be -1, which takes the devices that remain.

  Neighbours on a TPU's links are neighbours on it; GPUs go by their number, CPU devices as they come.

  Args:
    data: None takes 1, or as many as there are slices of TPUs.
    fsdp: of each replica.
    tensor: likewise.
    sequence: likewise.
    devices: all if None.

  Raises:
    InputError: the sizes do not multiply to the number of devices, a replica does not fit in a slice, or slices are not
      of one size.
  """
  devices = list(jax.devices() if devices is None else devices)
  held = collections.Counter(getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu")
  slices = len(held) or 1
  if len({*held.values()}) > 1:
    counts = ", ".join(str(held[one]) for one in sorted(held))
    raise InputError(f"mesh: the {slices} slices hold {counts} devices; take slices of one size")
  sizes = {"data": slices if data is None else data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
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
  """The PartitionSpec of an array whose dimensions carry these logical axes.

  Raises:
    KeyError: an axis that `RULES` does not name.
  """
  return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Asks the compiler to lay `x` out by its logical axes; outside of any mesh, `x` itself."""
  layout = spec(*axes)
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, layout)


def ways(axis: str | None, mesh: Mesh | None = None) -> int:
  """How many parts a mesh (None: the current one; outside of any, 1) makes of a logical axis."""
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  return 1 if mesh.empty else math.prod(mesh.shape[name] for name in _names(axis))


def dividing(size: int, *axes: str) -> str | None:
  """The first of some logical axes whose parts have the same size, of a dimension of this size; None: none of them."""
  return next((axis for axis in axes if size % ways(axis) == 0), None)


def _names(axis):
  """The mesh axes that a logical axis goes over."""
  rule = None if axis is None else RULES[axis]
  return () if rule is None else (rule,) if isinstance(rule, str) else rule


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
  """A weight as a matmul takes it: whole over fsdp, otherwise laid out by its logical axes, as its gradient is.

  Left to itself, the TPU compiler would send partial sums of the product around instead, in many small steps.
  """
  return _gather(axes, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(axes, x):
  x = constrain(x, *axes)  # it travels in the dtype that it has here
  return constrain(x, *(None if axis == "embed" else axis for axis in axes))


_gather.defvjp(lambda axes, x: (_gather(axes, x), None), lambda axes, _, gradient: (constrain(gradient, *axes),))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over (data, fsdp), everything else replicated."""
  return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def host_share(mesh: Mesh) -> tuple[int, int]:
  """(k, n): this host holds the k-th of n equal parts of a batch's rows; hosts that split the weights hold the same.

  Raises:
    InputError: parts that overlap, or of different sizes.
  """
  shards = ways("batch", mesh)
  held: dict[int, set[int]] = {}
  for device, (rows,) in batch_sharding(mesh).devices_indices_map((shards,)).items():
    held.setdefault(device.process_index, set()).add(rows.start or 0)
  parts = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(map(len, parts)) != shards or len({len(rows) for rows in parts}) > 1:
    raise InputError(
      f"mesh: hosts hold overlapping rows with sequence x tensor = {ways('stream', mesh)}; let it divide the devices "
      "of a host, or be a multiple of these"
    )
  mine = held.get(jax.process_index(), parts[0])
  return parts.index(tuple(sorted(mine))), len(parts)


def to_mesh(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
  """The global batch on the mesh, from the rows that this host holds: its `host_share`."""
  rows = batch_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(rows, x) for name, x in batch.items()}


def local_rows(x: jax.Array) -> np.ndarray:
  """The rows of a batch's array that this host holds, in order: what `to_mesh` takes."""
  shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def rows_multiple(mesh: Mesh, microbatches: int, minibatches: int = 1, completions: int = 1) -> int:
  """What divides the rows of data that minibatches, microbatches and devices can share; arguments: `check_rows`."""
  at_once = ways("batch", mesh) * microbatches
  sampled = at_once * minibatches  # divides the rows times their completions
  return math.lcm(at_once, sampled // math.gcd(sampled, completions))


def check_rows(
  rows: int, length: int, microbatches: int, mesh: Mesh, minibatches: int = 1, completions: int = 1
) -> None:
  """Raises InputError where the rows of a batch can not be split over minibatches, microbatches and devices.

  Args:
    rows: of a batch: data.rows times the completions of each.
    length: of a row, in tokens.
    microbatches: parts of an optimizer step.
    mesh: of the devices.
    minibatches: optimizer steps of a pass over an online batch.
    completions: of each of its prompts.
  """
  shards, cuts = ways("batch", mesh), ways("tokens", mesh)
  if length % cuts:
    raise InputError(f"mesh.sequence={cuts} does not divide rows of {length} tokens; change one of them")
  parts = {
    f"data x fsdp = {shards} devices": shards,
    f"optimizer.microbatches={microbatches}": microbatches,
    f"algorithm.minibatches={minibatches}": minibatches,
  }
  if rows // completions % rows_multiple(mesh, microbatches, minibatches, completions):
    times = f" x algorithm.num_generations={completions}" if completions > 1 else ""
    split = " times ".join(name for name, count in parts.items() if count > 1)
    remedy = "change one of them" if times else f"use a multiple of {math.prod(parts.values())}"
    remedy += ", or split rows with mesh.sequence" if rows < shards else ""
    raise InputError(f"data.rows={rows // completions}{times} is not divisible by {split}; {remedy}")


def weight_shardings(weights, mesh: Mesh) -> Params:
  """NamedShardings for a table of `Weight(shape, axes, init)`.

  Raises:
    InputError: a dimension that its mesh axis does not divide.
  """

  def one(path, weight):
    layout = spec(*weight.axes)
    for size, axis in zip(weight.shape, weight.axes, strict=True):
      if size % ways(axis, mesh):
        sizes = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in _names(axis) if mesh.shape[name] > 1)
        raise InputError(
          f"model: {jax.tree_util.keystr(path, simple=True, separator='.')} {weight.shape} has a "
          f"dimension of {size}, which {sizes} does not divide; change one of them"
        )
    return NamedSharding(mesh, layout)

  return jax.tree_util.tree_map_with_path(one, weights, is_leaf=lambda w: hasattr(w, "axes"))


def state_shardings(
  state: TrainState, tx: optax.GradientTransformation, params: Params, mesh: Mesh, moments: Params | None = None
) -> TrainState:
  """Shardings of a TrainState: moments and synced trees as their parameters, scalars replicated.

  Args:
    state: the (abstract) state.
    tx: the optimizer that made its opt_state.
    params: shardings of `state.params`.
    mesh: where everything else is replicated.
    moments: shardings of the moments, where they are not those of the parameters.
  """
  whole = replicated(mesh)
  is_hole = lambda leaf: isinstance(leaf, optax.MaskedNode)  # where another part of the optimizer has the moments

  def place(leaf, param, sharding):
    if is_hole(leaf):
      return leaf
    return sharding if leaf.shape == param.shape else whole

  opt_state = optax.tree_map_params(
    tx,
    place,
    state.opt_state,
    state.params,
    moments or params,
    transform_non_params=lambda _: whole,
    is_leaf=is_hole,
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
