"""One step, compiled: its memory, work, traffic and collectives on each device, by the compiler's account."""

import glob
import math
import re
import tempfile
import time
from typing import Any, NamedTuple

import jax

from alignjax.errors import InputError
from alignjax.preflight import hlo
from alignjax.preflight.chip import Chip
from alignjax.preflight.flops import has_kernels, matmul_flops
from alignjax.preflight.steps import Program, Step
from alignjax.training.offload import HOST

_OUT_OF_MEMORY = re.compile(r"\(([\d.]+)([GM])\) exceeds available|Used ([\d.]+)([GM]) of [\d.]+[GM] hbm")


class Memory(NamedTuple):
  """Bytes on each device while a step runs.

  Attributes:
    arguments: what the step takes, by tree; "batch" is all that is none.
    beside: resident trees that it does not take.
    temporaries: of the program, its code included; output that takes no argument's place is in `output`.
    output: see there.
    total: the sum.
    capacity: of the device; 0 where nothing is known.
    host: of what a device keeps in the host's memory; in no sum.
  """

  arguments: dict[str, int]
  beside: dict[str, int]
  temporaries: int
  output: int
  total: int
  capacity: int
  host: int = 0

  @property
  def fits(self) -> bool:
    """Whether the total is within the capacity."""
    return not self.capacity or self.total <= self.capacity

  @property
  def largest(self) -> str:
    """What dominates."""
    parts = self.arguments | self.beside | {"temporaries": self.temporaries, "output": self.output}
    return max(parts, key=parts.__getitem__)


class Estimate(NamedTuple):
  """What the compiler says of a step.

  Attributes:
    step: its name.
    memory: of each device.
    flops: matmuls of each device, recomputation included.
    kernel_flops: of these, what kernels do.
    totals: of the program's text; None where it was too large to compile.
    seconds: lower bounds by what would limit: "compute", "hbm", "ici"; and "cycles", the compiler's, with the kernels'
      matmuls at the chip's peak; {} on CPUs.
    compile_seconds: wall time of tracing, lowering and compiling.
    cpu_seconds: the processors' time for it, which says more where other work runs beside.
    turns: how often a loop counted whose end the data decide.
    temporaries: the largest of them, as the compiler reports them.
  """

  step: str
  memory: Memory
  flops: float
  kernel_flops: float
  totals: hlo.Totals | None
  seconds: dict[str, float]
  compile_seconds: float
  cpu_seconds: float
  turns: int
  temporaries: list[str]

  @property
  def bound(self) -> str:
    """Which of compute, HBM and interconnect takes longest."""
    return max(("compute", "hbm", "ici"), key=self.seconds.__getitem__) if self.seconds else ""

  @property
  def step_seconds(self) -> float:
    """The longest of the three: nothing is faster, if all overlap."""
    return self.seconds[self.bound] if self.seconds else 0.0

  def to_dict(self) -> dict[str, Any]:
    """As JSON types."""
    found = {
      "step": self.step,
      "fits": self.memory.fits,
      "memory": self.memory._asdict() | {"largest": self.memory.largest},
      "flops": self.flops,
      "kernel_flops": self.kernel_flops,
      "compile_seconds": round(self.compile_seconds, 1),
      "compile_cpu_seconds": round(self.cpu_seconds, 1),
      "largest_temporaries": self.temporaries,
    }
    if self.totals:
      of = lambda totals: {
        "hbm_bytes": totals.hbm,
        "collectives": {kind: {"count": totals.count[kind], "bytes": totals.wire[kind]} for kind in totals.count},
        "cycles": totals.cycles,
        "kernels": totals.kernels,
      }
      found |= of(self.totals) | {"open_loops": self.totals.open_loops, "turns_of_open_loops": self.turns}
      found |= {"one_turn": of(self.totals.body)} if self.totals.body else {}
    if self.seconds:
      found |= {"seconds": self.seconds, "bound": self.bound, "step_seconds": self.step_seconds}
    return found


def estimate(
  step: Step, batch: Any, program: Program, chip: Chip | None, devices: int, plain: Step | None = None
) -> tuple[Estimate, Any]:
  """Compiles a step for abstract arguments; what it says, and the abstract outputs of a step that gives the batch.

  `plain` is the same step without kernels, by which their matmuls are counted; left out, they count for nothing.
  """
  began, arguments = (time.monotonic(), time.process_time()), step.arguments(batch)
  traced = step.function.trace(*arguments)
  flops = whole = matmul_flops(traced.jaxpr.jaxpr, step.turns) / devices
  if plain and has_kernels(traced.jaxpr.jaxpr):
    whole = matmul_flops(plain.function.trace(*plain.arguments(batch)).jaxpr.jaxpr, step.turns) / devices
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if chip else None
    try:
      compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      needed = _needed(str(error))
      if needed is None:
        raise InputError(f"{step.name}: the compiler fails: {str(error).splitlines()[0]}") from error
      compiled = None
    took = time.monotonic() - began[0], time.process_time() - began[1]
    text = _text(compiled, folder) if compiled else ""
    temporaries = _largest_temporaries(folder)
  memory = _memory(step, arguments, program, compiled, None if compiled else needed, chip)
  totals = hlo.analyse(text, step.turns) if text else None
  bounds = _bounds(whole, whole - flops, totals, chip) if chip and totals else {}
  shapes = jax.eval_shape(step.function, *arguments) if step.gives_batch else None
  found = Estimate(step.name, memory, whole, whole - flops, totals, bounds, *took, step.turns, temporaries)
  return found, _placed(shapes, compiled) if shapes else None


def sharded_bytes(tree: Any, on_host: bool = False) -> int:
  """Bytes of an abstract tree in one device's memory; or of what it keeps in the host's."""
  size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(size(leaf) for leaf in jax.tree.leaves(tree) if (leaf.sharding.memory_kind == HOST) == on_host)


def _memory(step, arguments, program, compiled, needed, chip) -> Memory:
  sizes = {name: sharded_bytes(tree) for name, tree in program.resident.items()}
  sizes = {name: size for name, size in sizes.items() if size}
  taken = {name: size for name, size in sizes.items() if name in step.reads}
  beside = {name: size for name, size in sizes.items() if name not in step.reads}
  capacity, host = chip.capacity if chip else 0, sharded_bytes(program.resident, on_host=True)
  if compiled is None:
    taken["batch"] = max(sharded_bytes(arguments) - sum(taken.values()), 0)
    temporaries, output = max(needed - sum(taken.values()), 0), 0
  else:
    m = compiled.memory_analysis()
    taken["batch"] = max(m.argument_size_in_bytes - sum(taken.values()), 0)
    temporaries = m.temp_size_in_bytes + m.generated_code_size_in_bytes
    output = m.output_size_in_bytes - m.alias_size_in_bytes
    host += m.host_temp_size_in_bytes + m.host_output_size_in_bytes - m.host_alias_size_in_bytes
  total = sum(taken.values()) + sum(beside.values()) + temporaries + output
  return Memory(taken, beside, temporaries, output, total, capacity, host)


def _needed(message: str) -> int | None:
  """Bytes that a program would have needed, from the compiler's complaint; None for another one."""
  if not (found := _OUT_OF_MEMORY.search(message)):
    return None
  number, unit = (part for part in found.groups() if part)
  return int(float(number) * {"G": 2**30, "M": 2**20}[unit])


def _text(compiled, folder: str) -> str:
  """The scheduled program: as dumped, for a TPU's large ones can not be read back."""
  for path in sorted(glob.glob(f"{folder}/*after_codegen.txt")):
    with open(path) as file:
      return file.read()
  return compiled.as_text()


def _largest_temporaries(folder: str, count: int = 4) -> list[str]:
  """The largest buffers of the memory report, as "448 MiB f32[2,4096,14336] ..."."""
  for path in sorted(glob.glob(f"{folder}/*memory-usage-report.txt")):
    with open(path) as file:
      rows = re.findall(r"^ +[\d.]+\w+\( *\d+%\); +([\d.]+)(\w+); +\d+; +\d+; (.*)$", file.read(), re.MULTILINE)
    return [f"{size} {unit} {shapes[:80]}" for size, unit, shapes in rows[:count]]
  return []


def _bounds(flops: float, of_kernels: float, totals: hlo.Totals, chip: Chip) -> dict[str, float]:
  bounds = {
    "compute": flops / chip.flops,
    "hbm": totals.hbm / chip.hbm,
    "ici": sum(size for kind, size in totals.wire.items() if kind != hlo.SLICES) / chip.ici,
  }
  if not (chip.clock and totals.cycles):
    return bounds
  return bounds | {"cycles": totals.cycles / chip.clock + of_kernels / chip.flops}


def _placed(shapes: Any, compiled) -> Any:
  """Outputs as the compiled program lays them out; without one, scalars whole and rows as a batch's."""
  if compiled is None:
    return shapes
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, shapes, compiled.output_shardings)
