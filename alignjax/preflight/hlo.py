"""A compiled program's text: its collectives, memory traffic and cycles, with the trips of its loops.

The bodies of loops count as often as they run. Where a loop's end depends on data its body counts `turns` times, which
`Totals.open_loops` says.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
SLICES = "between-slices"  # over the data centre's network
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32}
_BITS |= {"s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s64": 64, "u64": 64, "f64": 64}
_SHAPE = re.compile(rf"\b({'|'.join(_BITS)})\[([\d,]*)\](\{{[^}}]*\}})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_ELEMENT = re.compile(r"%(([\w.\-]+)#(\d+))")  # how newer XLA writes what a get-tuple-element gives: %tuple#index
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"}
_CALLS = {"while", "conditional", "call", "opt-barrier"}


class Instruction(NamedTuple):
  """One line of a computation: `name = shape opcode(rest`."""

  name: str
  shape: str
  opcode: str
  rest: str
  root: bool

  @property
  def operands(self) -> list[str]:
    """Names of the values it takes."""
    depth, end = 1, 0
    for end, character in enumerate(self.rest):  # noqa: B007
      depth += (character == "(") - (character == ")")
      if not depth:
        break
    return re.findall(r"%([\w.\-]+(?:#\d+)?)", self.rest[:end])

  def called(self, key: str) -> str | None:
    """The computation that an attribute names."""
    found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
    return found.group(1) if found else None


@dataclasses.dataclass
class Totals:
  """Of a program or a part of it, on one device.

  Attributes:
    hbm: bytes read from and written to memory, by the shapes of operands and results: an upper bound.
    cycles: the compiler's own estimate, without collectives and kernels; 0 where it gives none.
    count: collectives that run, by kind; `SLICES`: what goes to another slice.
    wire: bytes that this device sends for them, as by a ring, by kind.
    kernels: calls of Pallas kernels, whose cycles nobody counts.
    open_loops: loops whose trips the text does not say.
    body: of the outermost of these, one turn; None without.
  """

  hbm: float = 0.0
  cycles: float = 0.0
  count: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  wire: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  kernels: int = 0
  open_loops: int = 0
  body: "Totals | None" = None

  def add(self, other: "Totals", times: int = 1) -> None:
    """Adds `other`, as often as it runs."""
    self.hbm += other.hbm * times
    self.cycles += other.cycles * times
    self.kernels += other.kernels * times
    self.open_loops += other.open_loops
    for kind in other.count:
      self.count[kind] += other.count[kind] * times
      self.wire[kind] += other.wire[kind] * times
    if other.body and (self.body is None or other.body.hbm > self.body.hbm):
      self.body = other.body


def analyse(text: str, turns: int = 1) -> Totals:
  """The totals of a program's text, as XLA dumps it after scheduling."""
  partitions = re.search(r"num_partitions=(\d+)", text)
  return _Reader(*parse(text), int(partitions.group(1)) if partitions else 1, turns).total()


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """The computations by name, and the name of the first to run; every element of a tuple that they use is a line."""
  computations: dict[str, list[Instruction]] = {}
  current, entry = None, ""
  for line in text.splitlines():
    if not line.startswith(" ") and line.rstrip().endswith("{"):
      if head := _HEAD.match(line):
        current = computations.setdefault(head.group(2), [])
        entry = head.group(2) if head.group(1) else entry
    elif line.rstrip() == "}":  # alone: a kernel's text has braces too
      current = None
    elif current is not None and (found := _INSTRUCTION.match(line)):
      current.append(Instruction(*found.group(2, 3, 4, 5), bool(found.group(1))))
  return {name: _with_elements(lines) for name, lines in computations.items()}, entry


def _with_elements(lines: list[Instruction]) -> list[Instruction]:
  """A computation's lines, and behind each tuple a get-tuple-element for what others call %tuple#index."""
  used: dict[str, dict[str, int]] = {}
  for i in lines:
    for name, whole, index in _ELEMENT.findall(i.rest):
      used.setdefault(whole, {})[name] = int(index)
  found = []
  for i in lines:
    found.append(i)
    for name, index in used.get(i.name, {}).items():
      shape, rest = _element_shapes(i.shape)[index], f"%{i.name}), index={index}"
      found.append(Instruction(name, shape, "get-tuple-element", rest, False))
  return found


def _element_shapes(shape: str) -> list[str]:
  """The shapes in a tuple's: "(s32[]{:T(128)}, (f32[8]{0}, u32[]))" has two."""
  found, depth = [""], 0
  for character in shape.strip()[1:-1]:
    depth += (character in "([{") - (character in ")]}")
    if character == "," and not depth:
      found.append("")
    else:
      found[-1] += character
  return [part.strip() for part in found]


def num_bytes(shape: str, in_hbm: bool = False) -> float:
  """Bytes of a shape, or of all in a tuple; of those in HBM alone if asked (S(1) is the chip's own memory)."""
  total = 0.0
  for kind, sizes, layout in _SHAPE.findall(shape):
    if not (in_hbm and "S(1)" in layout):
      total += math.prod(int(size) for size in sizes.split(",") if size) * _BITS[kind] / 8
  return total


def group_size(rest: str, devices: int) -> int:
  """How many devices a collective is over."""
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found.group(1)))
    return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([^']+)'", found.group(2)))
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
    return int(found.group(2))
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return len(found.group(1).split(","))
  return devices


def sent(kind: str, out: float, group: int) -> float:
  """Bytes that a device sends in a collective whose result has `out` bytes on it."""
  share = (group - 1) / group
  if kind == "collective-permute":
    return out
  return {"all-reduce": 2 * out * share, "reduce-scatter": out * (group - 1)}.get(kind, out * share)


class _Reader:
  """Adds up computations, each once."""

  def __init__(self, computations, entry, devices, turns):
    self.computations, self.entry, self.devices, self.turns = computations, entry, devices, turns
    self.known: dict[tuple[str, bool], Totals] = {}
    self.scope, self.channels = "", set()
    self.named = {name: {i.name: i for i in body} for name, body in computations.items()}

  def total(self) -> Totals:
    return self.of(self.entry, fused=False)

  def of(self, name: str, fused: bool) -> Totals:
    if (name, fused) not in self.known:
      self.known[name, fused] = totals = Totals()
      outside, self.scope = self.scope, self.scope if fused else name
      for instruction in self.computations.get(name, ()):
        self._one(totals, name, instruction, fused)
      self.scope = outside
    return self.known[name, fused]

  def _one(self, totals: Totals, where: str, i: Instruction, fused: bool) -> None:
    self._collective(totals, where, i)
    if not fused:
      totals.hbm += self._traffic(where, i)
      if found := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
        cycles = int(found.group(1))
        totals.cycles += cycles if cycles < 1e12 else 0  # the compiler's "not known"
      totals.kernels += i.opcode == "custom-call" and '"tpu_custom_call"' in i.rest
    if i.opcode == "while":
      body, trips = self.of(i.called("body"), fused), self.trips(where, i)
      totals.add(body, self.turns if trips is None else trips)
      if trips is None:
        totals.open_loops += 1
        totals.body = body
    elif i.opcode == "fusion":
      totals.add(self.of(i.called("calls"), fused=True))
    elif i.opcode == "conditional":
      branches = re.findall(r"%([\w.\-]+)", i.rest.partition("branch_computations={")[2].partition("}")[0])
      branches += filter(None, (i.called("true_computation"), i.called("false_computation")))
      if found := [self.of(branch, fused) for branch in branches]:
        totals.add(max(found, key=lambda t: (t.hbm, t.cycles)))
    elif i.opcode in ("call", "async-start"):
      for called in filter(None, (i.called("to_apply"), i.called("calls"))):
        totals.add(self.of(called, fused))

  def _collective(self, totals: Totals, where: str, i: Instruction) -> None:
    if i.opcode == "send" and "xla_megascale_runtime" in i.rest:
      totals.count[SLICES] += 1
      totals.wire[SLICES] += num_bytes(self._shape(where, i.operands[0]))
    kind = i.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
      return
    if channel := re.search(r"channel_id=(\d+)", i.rest):
      key = self.scope, where if where == self.scope else "fused", channel.group(1)
      if key in self.channels and where != self.scope:
        return  # TPUs spread one collective over several fusions, each of which repeats it
      self.channels.add(key)
    out = num_bytes(i.shape)
    if i.opcode in ("all-gather-start", "collective-permute-start"):  # a tuple with what came in
      out = max(out - sum(num_bytes(self._shape(where, name)) for name in i.operands), 0)
    group = group_size(i.rest, self.devices)
    size = sent(kind, out, group)
    if kind == "all-reduce" and "all-reduce-scatter" in where:  # the TPU's way to write a reduce-scatter
      kind, size = "reduce-scatter", size / 2
    totals.count[kind] += 1
    totals.wire[kind] += size

  def _shape(self, where: str, name: str) -> str:
    found = self.named[where].get(name)
    return found.shape if found else ""

  def _traffic(self, where: str, i: Instruction) -> float:
    """Bytes of HBM that an instruction reads and writes; slices and updates in place count what they touch."""
    if i.opcode in _FREE | _CALLS or i.opcode.endswith("-done"):
      return 0.0
    inputs = [self._shape(where, name) for name in i.operands]
    if i.opcode == "fusion":
      return self._fusion(i, inputs)
    if i.opcode in ("dynamic-slice", "slice"):
      return 2 * num_bytes(i.shape, True)
    if i.opcode == "dynamic-update-slice":
      return 2 * num_bytes(inputs[1], True)
    size = num_bytes(i.shape, True) + sum(num_bytes(shape, True) for shape in inputs)
    return size / 2 if i.opcode.endswith("-start") else size  # its shape repeats its operands

  def _fusion(self, i: Instruction, inputs: list[str]) -> float:
    name = i.called("calls")
    parameters = self._parameters(name)
    total, in_place = 0.0, 0.0
    for number, shape in enumerate(inputs):
      whole = num_bytes(shape, True)
      if whole and number in parameters:
        read, written = self._reads(name, parameters[number])
        whole, in_place = min(whole, read), in_place + written
      total += whole
    return total + max(0.0, num_bytes(i.shape, True) - in_place)

  def _parameters(self, name: str) -> dict[int, str]:
    number = lambda i: int(re.match(r"\d+", i.rest).group())
    return {number(i): i.name for i in self.computations.get(name, ()) if i.opcode == "parameter"}

  def _reads(self, where: str, name: str, depth: int = 0) -> tuple[float, float]:
    """How much of a value this computation reads (infinite: all), and how much it leaves alone in an update of it."""
    everything = (math.inf, 0.0)
    total = kept = 0.0
    for i in self.computations[where]:
      operands = i.operands
      if name not in operands:
        if i.root and i.name == name:
          return everything
        continue
      if i.opcode in ("dynamic-slice", "slice") and operands[0] == name:
        total += num_bytes(i.shape)
        continue
      if i.opcode == "dynamic-update-slice" and operands[0] == name:
        kept += num_bytes(i.shape) - num_bytes(self._shape(where, operands[1]))
        continue
      if depth > 8:
        return everything
      if i.opcode == "bitcast":
        found = self._reads(where, i.name, depth + 1)
      elif i.opcode == "fusion":
        inner = i.called("calls")
        parameter = self._parameters(inner).get(operands.index(name))
        found = self._reads(inner, parameter, depth + 1) if parameter else everything
      else:
        return everything
      if found[0] == math.inf:
        return everything
      total, kept = total + found[0], kept + found[1]
    return total, kept

  def trips(self, where: str, loop: Instruction) -> int | None:
    """How often a loop runs, if its condition compares a counter with a constant; None where data decide."""
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(found.group(1))
    condition, body = (self.named[loop.called(key)] for key in ("condition", "body"))
    root = next((i for i in condition.values() if i.root), None)
    if root is None or root.opcode not in ("compare", "fusion"):
      return None
    operands = [condition[name] for name in root.operands if name in condition]
    limits = [_constant(i) for i in operands if i.opcode == "constant"]
    counters = [i for i in operands if i.opcode == "get-tuple-element"]
    if len(limits) != 1 or limits[0] is None or len(counters) != 1 or not re.match(r"[su]32\[\]", counters[0].shape):
      return None
    index = int(re.search(r"index=(\d+)", counters[0].rest).group(1))
    return max(1, -(-(limits[0] - self._start(where, loop, index)) // self._stride(body, index)))

  def _start(self, where: str, loop: Instruction, index: int) -> int:
    """The counter's first value."""
    named = self.named[where]
    tuple_ = named.get(loop.operands[0])
    value = named.get(tuple_.operands[index]) if tuple_ and tuple_.opcode == "tuple" else None
    while value and value.opcode in ("copy", "bitcast"):
      value = named.get(value.operands[0])
    return (_constant(value) or 0) if value else 0

  def _stride(self, body: dict[str, Instruction], index: int) -> int:
    """What a turn adds to the counter."""
    root = next((i for i in body.values() if i.root), None)
    operands = root.operands if root else []
    step = body.get(operands[index]) if index < len(operands) else None
    added = [_constant(body[name]) for name in step.operands if name in body] if step and step.opcode == "add" else []
    return next((value for value in added if value), 1)


def _constant(i: Instruction) -> int | None:
  found = re.match(r"(-?\d+)\)", i.rest) if i.opcode == "constant" else None
  return int(found.group(1)) if found else None
