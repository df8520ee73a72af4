"""The mesh, the rules table, and what they declare against what the compiler does."""

import contextlib
import dataclasses
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alignjax.errors import InputError
from alignjax.model import decoder
from alignjax.runs.checkpoint import Checkpointer
from alignjax.system import sharding
from alignjax.training.optim import OptimizerConfig, make_optimizer
from alignjax.training.step import create_state
from tests import short_run


def test_mesh_axes_are_auto_and_one_size_may_be_free():
  mesh = sharding.make_mesh(data=2, tensor=2)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
  assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_keeps_the_order_of_the_devices():
  devices = [jax.devices()[i] for i in (3, 0, 7, 1, 6, 2, 5, 4)]
  assert list(sharding.make_mesh(devices=devices).devices.flat) == devices


@pytest.mark.parametrize(
  "sizes",
  [{"fsdp": 3}, {"data": 3}, {"data": -1, "fsdp": -1}, {"data": 16}, {"fsdp": 0}, {"data": -2, "fsdp": -4}],
)
def test_a_mesh_that_does_not_cover_the_devices_is_an_input_error(sizes):
  with pytest.raises(InputError, match="does not cover 8 devices"):
    sharding.make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What of a device decides its place in a mesh."""

  id: int
  slice_index: int
  coords: tuple[int, int, int]
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"
  core_on_chip: int = 0
  process_index: int = 0


def chips(slices, platform="tpu"):
  """Slices of 4 x 2 chips each, in no order."""
  places = [(s, (x, y, 0)) for s in range(slices) for y in range(2) for x in range(4)]
  found = [Chip(number, *place, platform) for number, place in enumerate(places)]
  return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    ({"data": 2}, (2, 8, 1, 1)),
    ({}, (2, 8, 1, 1)),  # as many replicas as slices
    ({"data": 2, "tensor": 4}, (2, 2, 1, 4)),
    ({"data": 2, "tensor": 2, "sequence": 4}, (2, 1, 4, 2)),
    ({"data": 4, "tensor": 2}, (4, 2, 1, 2)),
    ({"data": -1, "fsdp": 4}, (4, 4, 1, 1)),
  ],
)
def test_only_data_crosses_slices(sizes, shape):
  mesh = sharding.make_mesh(**sizes, devices=chips(slices=2))
  assert mesh.devices.shape == shape
  slices = [{chip.slice_index for chip in replica.flat} for replica in mesh.devices]
  assert slices == [{number // (shape[0] // 2)} for number in range(shape[0])]


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 1, "tensor": 8}, {"data": 2}])
def test_a_mesh_that_shards_over_slices_is_an_input_error(sizes):
  with pytest.raises(InputError, match=r"a replica across 4 slices.*set mesh\.data to 4 or a multiple"):
    sharding.make_mesh(**sizes, devices=chips(slices=4))


def test_slices_of_several_sizes_are_an_input_error():
  rest = [chip for chip in chips(slices=2) if chip.slice_index == 1 or chip.coords[0] < 2]
  with pytest.raises(InputError, match=r"^mesh: the 2 slices hold 4, 8 devices; take slices of one size$"):
    sharding.make_mesh(data=2, devices=rest)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_slices_of_a_real_topology_are_kept_apart():
  code = (
    "from alignjax.preflight import chip; from alignjax.system.sharding import make_mesh; "
    "mesh = make_mesh(data=4, tensor=2, devices=chip.devices('v5e:2x4', slices=2)[1]); "
    "print([sorted({device.slice_index for device in replica.flat}) for replica in mesh.devices])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
  assert done.stdout.split("\n")[-2] == "[[0], [0], [1], [1]]"


def test_hosts_of_other_devices_are_no_slices():
  mesh = sharding.make_mesh(data=1, devices=chips(slices=2, platform="gpu"))
  assert [chip.id for chip in mesh.devices.flat] == list(range(16))


def test_an_unknown_logical_axis_is_an_error_and_not_replicated():
  with pytest.raises(KeyError, match="emded"):
    sharding.spec("vocab", "emded")
  with pytest.raises(KeyError, match="rows"):
    sharding.constrain(jnp.zeros(8), "rows")


def test_every_axis_of_every_weight_is_in_the_rules(config):
  for variant in ({"tied": False}, {"head": "scalar"}):
    table = decoder.make(dataclasses.replace(config, **variant)).weights()
    for weight in jax.tree.leaves(table, is_leaf=lambda x: hasattr(x, "axes")):
      assert len(sharding.spec(*weight.axes)) == len(weight.shape)


def test_constrain_outside_of_a_mesh_is_the_identity():
  x = jnp.zeros(7)
  assert sharding.constrain(x, "batch") is x
  assert sharding.ways("batch") == 1


def test_a_gathered_weight_is_whole_over_fsdp_and_its_gradient_is_not():
  weight = jnp.arange(128.0).reshape(16, 8)
  with jax.set_mesh(sharding.make_mesh(fsdp=4, tensor=2)):
    placed = jax.device_put(weight, PartitionSpec("tensor", "fsdp"))
    gathered = jax.jit(lambda w: sharding.gather(w, "vocab", "embed"))(placed)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(jnp.square(sharding.gather(w, "vocab", "embed")))))(placed)
  assert gathered.sharding.spec == PartitionSpec("tensor")
  assert gradient.sharding.spec == PartitionSpec("tensor", "fsdp")
  np.testing.assert_array_equal(gathered, weight)
  np.testing.assert_array_equal(gradient, 2 * weight)


def test_rows_are_sharded_over_data_and_fsdp(mesh, sft_batch):
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  with jax.set_mesh(mesh):
    assert sharding.ways("batch") == shards
  tokens = sharding.to_mesh(sft_batch, mesh).rows["tokens"]
  assert {shard.data.shape for shard in tokens.addressable_shards} == {(16 // shards, 32)}
  np.testing.assert_array_equal(tokens, sft_batch["tokens"])


def on_hosts_of_4(*sizes, slices=2):
  """A mesh of the chips of some slices, in their order, four to a host."""
  devices = [dataclasses.replace(chip, process_index=number // 4) for number, chip in enumerate(chips(slices))]
  return Mesh(np.array(devices).reshape(sizes), ("data", "fsdp", "sequence", "tensor"), axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize(
  ("sizes", "parts"),
  [
    ((1, 16, 1, 1), 4),
    ((2, 2, 1, 4), 4),
    ((1, 2, 1, 8), 2),
    ((1, 1, 1, 16), 1),
    ((4, 2, 1, 2), 4),
    ((1, 2, 8, 1), 2),
    ((1, 4, 2, 2), 4),
    ((1, 2, 4, 2), 2),
  ],
)
def test_hosts_that_split_the_weights_or_rows_alone_share_their_rows(sizes, parts):
  assert sharding.host_share(on_hosts_of_4(*sizes)) == (0, parts)


@pytest.mark.parametrize("sizes", [(1, 4, 1, 6), (1, 4, 3, 2)])
def test_hosts_whose_rows_overlap_are_an_input_error(sizes):
  with pytest.raises(InputError, match="overlapping rows with sequence x tensor = 6"):
    sharding.host_share(on_hosts_of_4(*sizes, slices=3))


def test_rows_that_do_not_split_over_devices_and_microbatches_are_an_input_error(eight_devices):
  sharding.check_rows(32, 100, 4, eight_devices)
  with pytest.raises(InputError, match=r"data\.rows=24 .* multiple of 16"):
    sharding.check_rows(24, 100, 2, eight_devices)
  with pytest.raises(InputError, match=r"data\.rows=4 .* multiple of 8, or split rows with mesh\.sequence"):
    sharding.check_rows(4, 100, 1, eight_devices)
  with pytest.raises(InputError, match=r"mesh\.sequence=8 does not divide rows of 100 tokens"):
    sharding.check_rows(32, 100, 4, sharding.make_mesh(fsdp=1, sequence=8))


@pytest.mark.parametrize(
  ("field", "size", "message"),
  [
    ("vocab", 97, r"embed \(97, 32\) has a dimension of 97, which mesh\.tensor=2"),
    ("embed", 33, r"has a dimension of 33, which mesh\.fsdp=2"),
    ("kv_heads", 1, r"layers\.k .* dimension of 1, which mesh\.tensor=2"),
    ("mlp", 49, r"layers\.\w+ .* dimension of 49, which mesh\.tensor=2"),
  ],
)
def test_a_dimension_that_the_mesh_does_not_divide_names_the_weight(config, field, size, message):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  model = decoder.make(dataclasses.replace(config, **{field: size}))
  with pytest.raises(InputError, match=message):
    model.abstract(mesh)


def test_moments_of_what_is_trained_first_lie_as_their_parameters_and_are_saved(eight_devices, tmp_path):
  spec = {"layers": {"q": PartitionSpec(None, "fsdp")}, "value": {"score": PartitionSpec("fsdp")}}
  layout = jax.tree.map(lambda s: NamedSharding(eight_devices, s), spec)
  params = {"layers": {"q": jnp.ones((2, 16, 4))}, "value": {"score": jnp.ones((16, 1))}}
  tx = make_optimizer(OptimizerConfig(), ("value",))
  create = lambda: create_state(params, tx, jax.random.key(0))
  abstract = jax.eval_shape(create)
  shardings = sharding.state_shardings(abstract, tx, layout, eight_devices)
  state = jax.jit(create, out_shardings=shardings)()
  first, rest = (part.inner_state for part in state.opt_state[1])
  assert first.mu["value"]["score"].sharding.spec == spec["value"]["score"]
  assert rest.nu["layers"]["q"].sharding.spec == spec["layers"]["q"]
  assert [len(jax.tree.leaves(part)) for part in (first, rest)] == [3, 3]
  filled = state.replace(opt_state=jax.tree.map(lambda x: x + 3, state.opt_state))
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  with contextlib.closing(Checkpointer(tmp_path, save_every=1)) as checkpoints:
    checkpoints.save(1, filled, {"beta": jnp.float32(1)}, metadata={})
    found = checkpoints.restore(like, {"beta": jnp.float32(0)}).state
  assert jax.tree.structure(found) == jax.tree.structure(filled)
  jax.tree.map(np.testing.assert_array_equal, found.opt_state, filled.opt_state)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_every_optimizer_state_has_shardings_of_its_own_shape(config, eight_devices, name):
  run = short_run.make("sft", config, eight_devices, OptimizerConfig(name=name, weight_decay=0.1))
  abstract = jax.eval_shape(lambda: create_state(run.model.init(jax.random.key(0)), run.tx, jax.random.key(1)))
  for leaf, layout in zip(jax.tree.leaves(abstract), jax.tree.leaves(run.shardings), strict=True):
    layout.shard_shape(leaf.shape)  # raises where a dimension is not divided
