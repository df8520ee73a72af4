"""The platform that attention kernels are traced for, and each device's part of their work."""

from collections.abc import Callable

import jax

from alignjax.system import sharding


def platform() -> str:
  """Returns the platform that is traced for: "tpu", "gpu" or "cpu". Its devices need not be present."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not mesh.abstract_device:
    return jax.default_backend()
  return mesh.abstract_device.platform


def on_each_device(
  local: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array
) -> jax.Array:
  """Calls local(q, k, v, segment_ids) with each device's own rows and heads; outside of any mesh, with all.

  Args:
    local: returns an array laid out as q.
    q, k, v: [B, T, heads, H], each device holding whole rows of its heads.
    segment_ids: [B, T, ...].
  """
  if jax.sharding.get_abstract_mesh().empty:
    return local(q, k, v, segment_ids)
  heads = sharding.spec("batch", None, "attended", None)
  rows = sharding.spec("batch")
  mapped = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
  return mapped(q, k, v, segment_ids)
