"""Fingerprints depend on the bits and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax.system.fingerprint import _bit_sums, digest, fingerprint, table


def sharded(x, devices):
  mesh = jax.make_mesh((devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices])
  return jax.device_put(x, NamedSharding(mesh, P("x")))


def test_same_on_any_mesh_without_a_gather():
  x = jax.random.normal(jax.random.key(0), (64, 24))
  prints = {fingerprint({"x": sharded(x, n)})["x"] for n in (1, 2, 4, 8)}
  assert len(prints | {fingerprint({"x": np.asarray(x)})["x"]}) == 1
  program = _bit_sums.lower({"x": sharded(x, 8)}).compile().as_text()
  assert "all-gather" not in program


def test_many_sharded_arrays_do_not_wait_for_each_other():
  # As 100 programs they would: XLA hangs, and ends the process, when more than 32 of them wait on one CPU device.
  tree = {str(i): sharded(np.full(64, i, np.float32), 8) for i in range(100)}
  assert len(set(fingerprint(tree).values())) == 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "bool"])
def test_every_bit_and_place_counts(dtype):
  x = np.asarray(jnp.zeros((5, 7), dtype))
  seen = {fingerprint({"x": x})["x"]}
  for i in range(x.nbytes):
    for bit in range(1 if dtype == "bool" else 8):
      changed = x.copy()
      changed.reshape(-1).view(np.uint8)[i] ^= 1 << bit
      seen.add(fingerprint({"x": changed})["x"])
  assert len(seen) == 1 + x.nbytes * (1 if dtype == "bool" else 8)


def test_one_ulp_and_a_swap_and_minus_zero_are_seen():
  x = np.linspace(0, 1, 1000, dtype=np.float32)
  ulp, swap, sign = x.copy(), x.copy(), x.copy()
  ulp[500] = np.nextafter(ulp[500], np.float32(2))
  swap[[3, 4]] = swap[[4, 3]]
  sign[0] = -0.0
  assert len({fingerprint({"x": v})["x"] for v in (x, ulp, swap, sign)}) == 4


def test_keys_scalars_and_paths():
  tree = {"run": {"key": jax.random.key(3), "step": jnp.int32(7)}, "list": [jnp.ones(2)]}
  assert sorted(fingerprint(tree)) == ["list/0", "run/key", "run/step"]
  other = tree | {"run": {"key": jax.random.key(4), "step": jnp.int32(7)}}
  assert fingerprint(tree)["run/key"] != fingerprint(other)["run/key"]
  assert digest(table(tree)) != digest(table(other))


def test_digest_tells_shapes_and_dtypes_apart():
  zeros = [np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), np.zeros((2, 3), np.int32)]
  assert len({digest(table({"x": z})) for z in zeros}) == 3
