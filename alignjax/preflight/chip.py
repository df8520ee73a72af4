"""Chips by their datasheets, and the devices of a topology, which need not be present."""

import contextlib
import importlib.metadata
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax

from alignjax.errors import InputError


class Chip(NamedTuple):
  """One device of a kind of chip.

  Attributes:
    kind: as JAX names it.
    flops: bfloat16 matmuls, FLOP/s.
    hbm: bytes/s of its memory.
    ici: bytes/s that it can send to its neighbours, over all links.
    capacity: bytes of memory that a program can use, as the compiler reports them.
    clock: Hz, of the compiler's cycles; 0: not known.
  """

  kind: str
  flops: float
  hbm: float
  ici: float
  capacity: int
  clock: float = 0.0


_GIB = 2**30
# Peak, memory and interconnect: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; if a chip is two devices (tpu7x),
# half of them. Capacity: as libtpu 0.0.51 reports it if a program does not fit.
CHIPS = {
  "v5e": Chip("TPU v5 lite", 197e12, 819e9, 200e9, int(15.75 * _GIB), 1.5e9),
  "v5p": Chip("TPU v5", 459e12, 2765e9, 600e9, int(95.73 * _GIB), 1.75e9),
  "v6e": Chip("TPU v6 lite", 918e12, 1600e9, 400e9, int(31.24 * _GIB), 1.75e9),
  "tpu7x": Chip("TPU7x", 1153e12, 3690e9, 300e9, int(94.74 * _GIB)),
}
# libtpu looks for the machine that it runs on and for other processes that use it; a preflight has neither.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5p-8",  # any: the topology does not depend on it
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(topology: str, slices: int = 1) -> tuple[Chip | None, Sequence[jax.Device]]:
  """Returns the chip (None for a CPU) and the devices of a topology, "v5e:4x4" or "cpu:8", in so many slices.

  It makes JAX use CPUs alone in this process, so that a TPU of this machine stays free.

  Args:
    topology: a key of `CHIPS` and a shape, or cpu and a number of devices.
    slices: of that topology; 1 for CPUs.

  Raises:
    InputError: the topology does not exist, or libtpu is not installed.
  """
  name, _, shape = topology.partition(":")
  if slices < 1 or (slices > 1 and name == "cpu"):
    raise InputError(f"--slices={slices} of --topology={topology}: use 1 or more slices of TPUs; CPU devices have none")
  jax.config.update("jax_platforms", "cpu")  # a TPU of this machine stays free
  if name == "cpu":
    return None, _cpus(topology, shape)
  if name not in CHIPS:
    raise InputError(f"--topology={topology}: use {', '.join(f'{chip}:SHAPE' for chip in CHIPS)} or cpu:N, as v5e:4x4")
  os.environ.update(_ENVIRONMENT)
  from jax.experimental import topologies

  several = {"num_slices": slices} if slices > 1 else {}
  try:
    tpus = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
  except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
    remedy = "try v5e:4x4, v5p:2x2x4 or v6e:8x8"
    if "libtpu" in str(error).lower() and "lockfile" not in str(error):
      remedy = "pip install 'alignjax[compile]'"
    raise InputError(f"--topology={topology}: {str(error).splitlines()[0]}; {remedy}") from error
  return CHIPS[name], sorted(tpus, key=lambda device: (getattr(device, "slice_index", 0) or 0, device.id))


def compiler(chip: Chip | None) -> str:
  """Returns the compiler for a chip, by package and version: another version compiles the same program differently."""
  package = "libtpu" if chip else "jaxlib"
  return f"{package} {importlib.metadata.version(package)}"


def _cpus(topology: str, count: str) -> Sequence[jax.Device]:
  """Returns the devices of "cpu:COUNT"."""
  if not count.isdecimal() or not int(count):
    raise InputError(f"--topology={topology}: cpu:N wants a number of devices, as cpu:8")
  with contextlib.suppress(RuntimeError):  # raised if JAX has been initialised
    now = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # declared when JAX is imported
    jax.config.update("jax_num_cpu_devices", max(int(count), now))
  if (available := jax.device_count()) < int(count):
    raise InputError(f"--topology={topology}: there are {available} CPU devices; set JAX_NUM_CPU_DEVICES={count}")
  return jax.devices()[: int(count)]
