"""One step, compiled: its memory, work, traffic and collectives on each device, as the compiler reports them."""

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
    arguments: those of the step, by resident tree; "batch" is everything else.
    beside: resident trees that the step does not take.
    temporaries: of the program, its code included.
    output: results that do not reuse the memory of an argument.
    total: the sum of all these.
    capacity: of the device; 0: not known.
    host: bytes that a device keeps in the host's memory; not in the total.
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
    """True if the total is within the capacity, or that is not known."""
    return not self.capacity or self.total <= self.capacity

  @property
  def largest(self) -> str:
    """The name of the largest part."""
    parts = self.arguments | self.beside | {"temporaries": self.temporaries, "output": self.output}
    return max(parts, key=parts.__getitem__)


class Estimate(NamedTuple):
  """The compiler's estimate of a step.

  Attributes:
    step: its name.
    memory: of each device.
    flops: matmuls of each device, recomputation included.
    kernel_flops: the part of these that kernels compute.
    totals: of the program's text; None if it was too large to compile.
    seconds: lower bounds by the limiting resource: "compute", "hbm", "ici"; and "cycles", the compiler's estimate with
      the kernels' matmuls at the chip's peak; {} on CPUs.
    compile_seconds: wall time of tracing, lowering and compiling.
    cpu_seconds: the processors' time for it, which other work on the machine affects less.
    turns: the number of turns that a loop counts if its end depends on data.
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
    """The slowest of "compute", "hbm" and "ici"; "" if their times are not known."""
    if not self.seconds:
      return ""
    return max(("compute", "hbm", "ici"), key=self.seconds.__getitem__)

  @property
  def step_seconds(self) -> float:
    """The time of the slowest: a lower bound, reached if all three overlap; 0 if it is not known."""
    return self.seconds.get(self.bound, 0.0)

  def to_dict(self) -> dict[str, Any]:
    """Returns the estimate as JSON types."""
    record = {
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
      record |= _to_dict(self.totals) | {"open_loops": self.totals.open_loops, "turns_of_open_loops": self.turns}
      record["instructions_not_understood"] = self.totals.unread
      if self.totals.body:
        record["one_turn"] = _to_dict(self.totals.body)
    if self.seconds:
      record |= {"seconds": self.seconds, "bound": self.bound, "step_seconds": self.step_seconds}
    return record


def _to_dict(totals: hlo.Totals) -> dict[str, Any]:
  """Returns the traffic, collectives, cycles and kernels of a program as JSON types."""
  return {
    "hbm_bytes": totals.hbm,
    "collectives": {kind: {"count": totals.count[kind], "bytes": totals.wire[kind]} for kind in totals.count},
    "cycles": totals.cycles,
    "kernels": totals.kernels,
  }


def estimate(
  step: Step, batch: Any, program: Program, chip: Chip | None, devices: int, plain: Step | None = None
) -> tuple[Estimate, Any]:
  """Compiles a step for abstract arguments.

  Args:
    step: of the program.
    batch: abstract, from which it takes its arguments.
    program: gives the trees that are resident meanwhile.
    chip: of each device; None for a CPU.
    devices: how many there are.
    plain: the same step without kernels, by which their matmuls are counted; without it they are not.

  Returns:
    The estimate, also of a step that is too large to compile; and the abstract outputs of a step that gives the batch,
    None otherwise.

  Raises:
    InputError: the compiler fails.
  """
  start = time.monotonic()
  cpu_start = time.process_time()
  arguments = step.arguments(batch)
  traced = step.function.trace(*arguments)
  flops = matmul_flops(traced.jaxpr.jaxpr, step.turns) / devices
  kernel_flops = 0.0
  if plain and has_kernels(traced.jaxpr.jaxpr):
    all_flops = matmul_flops(plain.function.trace(*plain.arguments(batch)).jaxpr.jaxpr, step.turns) / devices
    kernel_flops = all_flops - flops
    flops = all_flops
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if chip else None
    compiled, needed = _compile(step.name, traced, options)
    compile_seconds = time.monotonic() - start
    cpu_seconds = time.process_time() - cpu_start
    totals = None
    if compiled:
      totals = hlo.analyse(_text(compiled, folder), step.turns)
    temporaries = _largest_temporaries(folder)
  bounds = {}
  if chip and totals:
    bounds = _bounds(flops, kernel_flops, totals, chip)
  outputs = None
  if step.gives_batch:
    outputs = _placed(jax.eval_shape(step.function, *arguments), compiled)
  result = Estimate(
    step=step.name,
    memory=_memory(step, arguments, program, compiled, needed, chip),
    flops=flops,
    kernel_flops=kernel_flops,
    totals=totals,
    seconds=bounds,
    compile_seconds=compile_seconds,
    cpu_seconds=cpu_seconds,
    turns=step.turns,
    temporaries=temporaries,
  )
  return result, outputs


def _compile(name: str, traced, options: dict[str, Any] | None) -> tuple[Any, int]:
  """Returns the compiled step and 0; or None and the bytes of memory that it needs, if these are too many."""
  try:
    return traced.lower().compile(compiler_options=options), 0
  except jax.errors.JaxRuntimeError as error:
    needed = _needed(str(error))
    if needed is None:
      raise InputError(f"{name}: the compiler fails: {str(error).splitlines()[0]}") from error
    return None, needed


def sharded_bytes(tree: Any, on_host: bool = False) -> int:
  """Counts the bytes of an abstract tree in one device's memory; with `on_host`, those that it keeps in the host's."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    if (leaf.sharding.memory_kind == HOST) == on_host:
      total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return total


def _memory(step: Step, arguments: Any, program: Program, compiled: Any, needed: int, chip: Chip | None) -> Memory:
  """Returns the memory of each device while the step runs with these arguments; see `_compile` for the others."""
  sizes = {name: sharded_bytes(tree) for name, tree in program.resident.items()}
  sizes = {name: size for name, size in sizes.items() if size}
  read = {name: size for name, size in sizes.items() if name in step.reads}
  beside = {name: size for name, size in sizes.items() if name not in step.reads}
  host = sharded_bytes(program.resident, on_host=True)
  if compiled is None:
    read["batch"] = max(sharded_bytes(arguments) - sum(read.values()), 0)
    temporaries = max(needed - sum(read.values()), 0)
    output = 0
  else:
    m = compiled.memory_analysis()
    read["batch"] = max(m.argument_size_in_bytes - sum(read.values()), 0)
    temporaries = m.temp_size_in_bytes + m.generated_code_size_in_bytes
    output = m.output_size_in_bytes - m.alias_size_in_bytes
    host += m.host_temp_size_in_bytes + m.host_output_size_in_bytes - m.host_alias_size_in_bytes
  total = sum(read.values()) + sum(beside.values()) + temporaries + output
  capacity = chip.capacity if chip else 0
  return Memory(read, beside, temporaries, output, total, capacity, host)


def _needed(message: str) -> int | None:
  """Reads the bytes that a program needs from the compiler's error message; None if that is about something else."""
  match = _OUT_OF_MEMORY.search(message)
  if not match:
    return None
  number, unit = filter(None, match.groups())
  return int(float(number) * {"G": 2**30, "M": 2**20}[unit])


def _text(compiled, folder: str) -> str:
  """Returns the scheduled program; as dumped if possible, since a large one of a TPU cannot be read from `compiled`."""
  for path in sorted(glob.glob(f"{folder}/*after_codegen.txt")):
    with open(path) as file:
      return file.read()
  return compiled.as_text()


def _largest_temporaries(folder: str, count: int = 4) -> list[str]:
  """Returns the largest buffers of the memory report, as "448 MiB f32[2,4096,14336] ..."."""
  for path in sorted(glob.glob(f"{folder}/*memory-usage-report.txt")):
    with open(path) as file:
      rows = re.findall(r"^ +[\d.]+\w+\( *\d+%\); +([\d.]+)(\w+); +\d+; +\d+; (.*)$", file.read(), re.MULTILINE)
    return [f"{size} {unit} {shapes[:80]}" for size, unit, shapes in rows[:count]]
  return []


def _bounds(flops: float, kernel_flops: float, totals: hlo.Totals, chip: Chip) -> dict[str, float]:
  """Returns the `seconds` of an Estimate."""
  bounds = {
    "compute": flops / chip.flops,
    "hbm": totals.hbm / chip.hbm,
    "ici": sum(size for kind, size in totals.wire.items() if kind != hlo.SLICES) / chip.ici,
  }
  if not (chip.clock and totals.cycles):
    return bounds
  return bounds | {"cycles": totals.cycles / chip.clock + kernel_flops / chip.flops}


def _placed(shapes: Any, compiled) -> Any:
  """Abstract outputs with the shardings of the compiled program; without one, they stay as they are."""
  if compiled is None:
    return shapes

  def place(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(place, shapes, compiled.output_shardings)
