"""What the kernels of attention share: the platform that they are traced for, and each device's part of the work."""

from collections.abc import Callable

import jax

from alignjax.system import sharding


def platform() -> str:
  """Of what is being traced: "tpu", "gpu" or "cpu". Its devices need not be there."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return device.platform if device else jax.default_backend()


def on_each_device(
  local: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array
) -> jax.Array:
  """local(q, k, v, segment_ids) of each device's own rows and heads; outside of any mesh, of all."""
  if not jax.sharding.get_abstract_mesh().empty:
    heads, rows = sharding.spec("batch", None, "attended", None), sharding.spec("batch")
    local = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
  return local(q, k, v, segment_ids)
