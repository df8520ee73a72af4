"""A compiled program's text: its collectives, memory traffic and cycles, with the trips of its loops.

The body of a loop counts as often as it runs. If a loop's end depends on data, its body counts `turns` times;
`Totals.open_loops` is the number of such loops. What is not understood is counted too: `Totals.unread`.
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
_ELEMENT_TYPE = re.compile(r"\b([a-z]\w*)\[")
_NO_DATA = {"token", "opaque"}  # element types without bytes
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_ELEMENT = re.compile(r"%(([\w.\-]+)#(\d+))")  # how newer XLA writes what a get-tuple-element gives: %tuple#index
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"}
_CALLS = {"while", "conditional", "call", "opt-barrier"}


class Instruction(NamedTuple):
  """One line of a computation: `name = shape opcode(rest`.

  Attributes:
    name: of its result.
    shape: of the result, as text; of a tuple, that of all elements.
    opcode: such as "fusion".
    rest: the operands and the attributes, as text.
    root: True if it gives the computation's result.
  """

  name: str
  shape: str
  opcode: str
  rest: str
  root: bool

  @property
  def operands(self) -> list[str]:
    """The names of the instruction's arguments."""
    depth = 1
    end = 0
    for end, character in enumerate(self.rest):  # noqa: B007
      depth += (character == "(") - (character == ")")
      if not depth:
        break
    return re.findall(r"%([\w.\-]+(?:#\d+)?)", self.rest[:end])

  def called(self, key: str) -> str:
    """Returns the name of the computation that an attribute, such as "body", names; "" without that attribute."""
    match = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
    return match.group(1) if match else ""


@dataclasses.dataclass
class Totals:
  """The costs of a program or a part of it, on one device.

  Attributes:
    hbm: bytes read from and written to memory, by the shapes of operands and results: an upper bound.
    cycles: the compiler's own estimate, without collectives and kernels; 0 if it gives none.
    count: the number of collectives that run, by kind; `SLICES`: those between slices.
    wire: bytes that this device sends for them, as in a ring, by kind.
    kernels: the number of calls of Pallas kernels; their cycles are not counted.
    open_loops: the number of loops whose trips the text does not give.
    body: one turn of an outermost open loop, of several the one with the most traffic; None if there is no open loop.
    unread: the number of instructions that are not understood, each once: the text lacks a computation that one calls,
      or its shape is of an unknown form. Their costs are in no other number.
  """

  hbm: float = 0.0
  cycles: float = 0.0
  count: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  wire: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
  kernels: int = 0
  open_loops: int = 0
  body: "Totals | None" = None
  unread: int = 0

  def add(self, other: "Totals", times: int = 1) -> None:
    """Adds `other`, which runs so many times; its open loops, and what of it is not understood, count once."""
    self.hbm += other.hbm * times
    self.cycles += other.cycles * times
    self.kernels += other.kernels * times
    self.open_loops += other.open_loops
    self.unread += other.unread
    for kind in other.count:
      self.count[kind] += other.count[kind] * times
      self.wire[kind] += other.wire[kind] * times
    self.body = _largest(self.body, other.body)


def _largest(*parts: Totals | None) -> Totals | None:
  """Returns the part with the most traffic, of equals that with the most cycles, then the first; None if all are."""
  return max(filter(None, parts), key=lambda part: (part.hbm, part.cycles), default=None)


def analyse(text: str, turns: int = 1) -> Totals:
  """Adds up the totals of a program's text, as XLA dumps it after scheduling.

  Args:
    text: of the whole program.
    turns: of a loop whose end depends on data.
  """
  devices = 1
  if partitions := re.search(r"num_partitions=(\d+)", text):
    devices = int(partitions.group(1))
  computations, entry = parse(text)
  return _Reader(computations, entry, devices, turns).total()


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Parses a program's text: returns its computations by name, and the name of the first to run.

  Each element of a tuple that a computation uses is a line of it.
  """
  computations: dict[str, list[Instruction]] = {}
  current = None
  entry = ""
  for line in text.splitlines():
    if not line.startswith(" ") and line.rstrip().endswith("{"):
      if head := _HEAD.match(line):
        is_entry, name = head.groups()
        current = computations.setdefault(name, [])
        if is_entry:
          entry = name
    elif line.rstrip() == "}":  # alone: a kernel's text has braces too
      current = None
    elif current is not None and (match := _INSTRUCTION.match(line)):
      root, name, shape, opcode, rest = match.groups()
      current.append(Instruction(name, shape, opcode, rest, bool(root)))
  return {name: _with_elements(lines) for name, lines in computations.items()}, entry


def _with_elements(instructions: list[Instruction]) -> list[Instruction]:
  """Returns a computation, and after each tuple a get-tuple-element for every element that others call %tuple#index."""
  used: dict[str, dict[str, int]] = {}
  for instruction in instructions:
    for name, whole, index in _ELEMENT.findall(instruction.rest):
      used.setdefault(whole, {})[name] = int(index)
  complete = []
  for instruction in instructions:
    complete.append(instruction)
    for name, index in used.get(instruction.name, {}).items():
      shape = _element_shapes(instruction.shape)[index]
      rest = f"%{instruction.name}), index={index}"
      complete.append(Instruction(name, shape, "get-tuple-element", rest, False))
  return complete


def _element_shapes(shape: str) -> list[str]:
  """Returns the shapes of a tuple's elements: "(s32[]{:T(128)}, (f32[8]{0}, u32[]))" has two."""
  shapes = [""]
  depth = 0
  for character in shape.strip()[1:-1]:
    depth += (character in "([{") - (character in ")]}")
    if character == "," and not depth:
      shapes.append("")
    else:
      shapes[-1] += character
  return [element.strip() for element in shapes]


def num_bytes(shape: str, in_hbm: bool = False) -> float:
  """Counts the bytes of a shape, or of all in a tuple; `in_hbm` only those in HBM (S(1) is the chip's own memory)."""
  total = 0.0
  for kind, sizes, layout in _SHAPE.findall(shape):
    if not (in_hbm and "S(1)" in layout):
      total += math.prod(int(size) for size in sizes.split(",") if size) * _BITS[kind] / 8
  return total


def has_known_shape(shape: str) -> bool:
  """Returns whether `num_bytes` knows every part of a shape, or the part has no bytes."""
  kinds = [kind for kind in _ELEMENT_TYPE.findall(shape) if kind not in _NO_DATA]
  return len(kinds) == len(_SHAPE.findall(shape))


def group_size(rest: str, devices: int) -> int:
  """Returns the number of devices in a group of a collective; all `devices` if its text names no groups.

  Args:
    rest: of the collective's `Instruction`.
    devices: those of the program.
  """
  if groups := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", groups.group(1)))
    return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([^']+)'", groups.group(2)))
  if groups := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
    return int(groups.group(2))
  if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return len(groups.group(1).split(","))
  return devices


def sent(kind: str, out: float, group: int) -> float:
  """Computes the bytes that a device sends in a collective, as in a ring.

  Args:
    kind: one of `COLLECTIVES`.
    out: the bytes of the result on each device.
    group: the number of devices that take part.
  """
  share = (group - 1) / group
  if kind == "collective-permute":
    return out
  return {"all-reduce": 2 * out * share, "reduce-scatter": out * (group - 1)}.get(kind, out * share)


class _Reader:
  """Adds up the costs of computations, each once.

  Attributes:
    known: the totals of (computation, whether it is fused).
    scope: the computation in progress; of fusions, the one that calls them.
    channels: the collectives that have been counted, by scope and channel.
    named: each computation's instructions by name.
  """

  def __init__(self, computations, entry, devices, turns):
    self.computations = computations
    self.entry = entry
    self.devices = devices
    self.turns = turns
    self.known: dict[tuple[str, bool], Totals] = {}
    self.scope = ""
    self.channels: set[tuple[str, str, str]] = set()
    self.named = {name: {i.name: i for i in body} for name, body in computations.items()}

  def total(self) -> Totals:
    """Returns the totals of the program."""
    return self.totals_of(self.entry, fused=False)

  def totals_of(self, name: str, fused: bool) -> Totals:
    """Returns the totals of a computation; a fused one has no memory traffic of its own.

    The call of one that the text lacks is an instruction that is not understood.
    """
    if name not in self.computations:
      return Totals(unread=1)
    if (name, fused) not in self.known:
      totals = Totals()
      self.known[name, fused] = totals
      outer_scope = self.scope
      if not fused:
        self.scope = name
      for instruction in self.computations[name]:
        self._add_instruction(totals, name, instruction, fused)
      self.scope = outer_scope
    return self.known[name, fused]

  def _add_instruction(self, totals: Totals, where: str, i: Instruction, fused: bool) -> None:
    """Adds an instruction of the computation `where`, with the computations that it calls."""
    self._add_collective(totals, where, i)
    if not fused:
      totals.unread += not has_known_shape(i.shape)
      totals.hbm += self._traffic(where, i)
      totals.kernels += i.opcode == "custom-call" and '"tpu_custom_call"' in i.rest
      if match := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
        cycles = int(match.group(1))
        if cycles < 1e12:  # above: the compiler's "not known"
          totals.cycles += cycles
    if i.opcode == "while":
      self._add_loop(totals, where, i, fused)
    elif i.opcode == "fusion":
      totals.add(self.totals_of(i.called("calls"), fused=True))
    elif i.opcode == "conditional":
      names = re.findall(r"%([\w.\-]+)", i.rest.partition("branch_computations={")[2].partition("}")[0])
      names += filter(None, (i.called("true_computation"), i.called("false_computation")))
      branches = [self.totals_of(name, fused) for name in names]
      costliest = _largest(*branches) or Totals(unread=1)
      totals.add(costliest)
      totals.unread += sum(branch.unread for branch in branches if branch is not costliest)
    elif i.opcode in ("call", "async-start"):
      totals.add(self.totals_of(i.called("to_apply") or i.called("calls"), fused))

  def _add_loop(self, totals: Totals, where: str, loop: Instruction, fused: bool) -> None:
    """Adds the body of a loop as often as it runs."""
    body = self.totals_of(loop.called("body"), fused)
    trips = self.trips(where, loop)
    if trips is not None:
      totals.add(body, trips)
      return
    outermost = _largest(totals.body, body)
    totals.add(body, self.turns)
    totals.open_loops += 1
    totals.body = outermost

  def _add_collective(self, totals: Totals, where: str, i: Instruction) -> None:
    """Adds an instruction's count and bytes sent, if it is a collective."""
    if i.opcode == "send" and "xla_megascale_runtime" in i.rest:
      totals.count[SLICES] += 1
      totals.wire[SLICES] += num_bytes(self._shape(where, i.operands[0]))
    kind = i.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
      return
    if channel := re.search(r"channel_id=(\d+)", i.rest):
      fused = where != self.scope
      key = (self.scope, "fused" if fused else where, channel.group(1))
      if fused and key in self.channels:
        return  # TPUs spread one collective over several fusions, each of which repeats it
      self.channels.add(key)
    out = num_bytes(i.shape)
    if i.opcode in ("all-gather-start", "collective-permute-start"):  # a tuple that contains the operands
      out = max(out - sum(num_bytes(self._shape(where, name)) for name in i.operands), 0)
    size = sent(kind, out, group_size(i.rest, self.devices))
    if kind == "all-reduce" and "all-reduce-scatter" in where:  # a reduce-scatter, as TPUs write it
      kind = "reduce-scatter"
      size = size / 2
    totals.count[kind] += 1
    totals.wire[kind] += size

  def _shape(self, where: str, name: str) -> str:
    """Returns the shape of a value; "" if the text does not have it."""
    instruction = self.named[where].get(name)
    return instruction.shape if instruction else ""

  def _traffic(self, where: str, i: Instruction) -> float:
    """Counts the bytes of HBM that an instruction reads and writes.

    Slices and updates in place count the part that they touch.
    """
    if i.opcode in _FREE | _CALLS or i.opcode.endswith("-done"):
      return 0.0
    inputs = [self._shape(where, name) for name in i.operands]
    if i.opcode == "fusion":
      return self._fusion_traffic(i, inputs)
    if i.opcode in ("dynamic-slice", "slice"):
      return 2 * num_bytes(i.shape, True)
    if i.opcode == "dynamic-update-slice":
      return 2 * num_bytes(inputs[1], True)
    size = num_bytes(i.shape, True) + sum(num_bytes(shape, True) for shape in inputs)
    if i.opcode.endswith("-start"):  # its shape repeats its operands
      return size / 2
    return size

  def _fusion_traffic(self, i: Instruction, inputs: list[str]) -> float:
    """Counts the `_traffic` of a fusion whose operands have these shapes."""
    name = i.called("calls")
    parameters = self._parameters(name)
    total = 0.0
    in_place = 0.0
    for number, shape in enumerate(inputs):
      size = num_bytes(shape, True)
      if size and number in parameters:
        read, kept = self._reads(name, parameters[number])
        size = min(size, read)
        in_place += kept
      total += size
    return total + max(0.0, num_bytes(i.shape, True) - in_place)

  def _parameters(self, name: str) -> dict[int, str]:
    """Returns the names of a computation's parameters by number."""
    parameters = {}
    for i in self.computations.get(name, ()):
      if i.opcode == "parameter":
        number = re.match(r"\d+", i.rest)
        assert number is not None, i.rest
        parameters[int(number.group())] = i.name
    return parameters

  def _reads(self, where: str, name: str, depth: int = 0) -> tuple[float, float]:
    """Counts the bytes of a value that this computation reads (infinite: all), and those that an update leaves."""
    everything = (math.inf, 0.0)
    total = 0.0
    kept = 0.0
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
        inner_read, inner_kept = self._reads(where, i.name, depth + 1)
      elif i.opcode == "fusion":
        inner = i.called("calls")
        parameter = self._parameters(inner).get(operands.index(name))
        if not parameter:
          return everything
        inner_read, inner_kept = self._reads(inner, parameter, depth + 1)
      else:
        return everything
      if inner_read == math.inf:
        return everything
      total += inner_read
      kept += inner_kept
    return total, kept

  def trips(self, where: str, loop: Instruction) -> int | None:
    """Counts a loop's turns, if its condition compares a counter with a constant; None if it depends on data."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known.group(1))
    condition, body = (self.named.get(loop.called(key), {}) for key in ("condition", "body"))
    root = next((i for i in condition.values() if i.root), None)
    if root is None or root.opcode not in ("compare", "fusion"):
      return None
    operands = [condition[name] for name in root.operands if name in condition]
    limits = [_constant(i) for i in operands if i.opcode == "constant"]
    counters = [i for i in operands if i.opcode == "get-tuple-element"]
    if len(limits) != 1 or limits[0] is None or len(counters) != 1 or not re.match(r"[su]32\[\]", counters[0].shape):
      return None
    place = re.search(r"index=(\d+)", counters[0].rest)
    assert place is not None, counters[0].rest
    index = int(place.group(1))
    return max(1, -(-(limits[0] - self._start(where, loop, index)) // self._stride(body, index)))

  def _start(self, where: str, loop: Instruction, index: int) -> int:
    """Returns the counter's first value; 0 if the text does not give it."""
    named = self.named[where]
    arguments = named.get(loop.operands[0])
    if not arguments or arguments.opcode != "tuple":
      return 0
    value = named.get(arguments.operands[index])
    while value and value.opcode in ("copy", "bitcast"):
      value = named.get(value.operands[0])
    return (value and _constant(value)) or 0

  def _stride(self, body: dict[str, Instruction], index: int) -> int:
    """Returns the increment of the counter in a turn; 1 if the text does not give it."""
    root = next((i for i in body.values() if i.root), None)
    if root is None or index >= len(root.operands):
      return 1
    step = body.get(root.operands[index])
    if step is None or step.opcode != "add":
      return 1
    addends = (_constant(body[name]) for name in step.operands if name in body)
    return next(filter(None, addends), 1)


def _constant(i: Instruction) -> int | None:
  """Returns the value of a whole constant; None for other instructions."""
  if i.opcode != "constant":
    return None
  match = re.match(r"(-?\d+)\)", i.rest)
  return match and int(match.group(1))
