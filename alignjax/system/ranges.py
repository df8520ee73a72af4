"""The ranges of numbers: one range per setting, declared with its definition, and one check.

A field of a config section, an option, a hyper-parameter, a keyword of a loss and a flag of the command line are
declared with a type of this module: `clip_norm: Annotated[NonNegative, "0 does not clip"] = 1.0`. The text, if there
is one, ends the error's line. No type allows NaN, an infinity, or a number that becomes either in float32.
"""

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np

from alignjax.errors import InputError

LARGEST_WHOLE = 2**31 - 1  # of int32, in which steps and sizes are counted
LARGEST = float(np.finfo(np.float32).max)  # traced numbers are float32


@dataclasses.dataclass(frozen=True)
class Range:
  """An interval of numbers, and single values in addition (-1 for "the rest")."""

  low: float = -LARGEST
  high: float = LARGEST
  open_low: bool = False
  open_high: bool = False
  also: tuple[float, ...] = ()

  def holds(self, value: float) -> bool:
    """True if a number is inside, both exactly and rounded to float32: 1e-50 is not more than 0."""
    if value in self.also:
      return True
    if isinstance(value, int):
      return self._inside(value)
    with np.errstate(over="ignore", under="ignore"):
      single = float(np.float32(value))
    tiny = self.open_low and self.low == 0 and single < float(np.finfo(np.float32).tiny)  # devices flush these to 0
    return self._inside(value) and self._inside(single) and not tiny

  def _inside(self, value: float) -> bool:
    is_open_end = (self.open_low and value == self.low) or (self.open_high and value == self.high)
    return self.low <= value <= self.high and not is_open_end

  @property
  def bounded(self) -> bool:
    """True if the upper end is a limit of its own, and not that of the number's type."""
    return self.high not in (LARGEST, LARGEST_WHOLE)

  def __str__(self) -> str:
    """ "at least 0", "more than 0 and at most 1" """
    limits = []
    if self.low > -LARGEST:
      words = "more than" if self.open_low else "at least"
      limits.append(f"{words} {self.low:g}")
    if self.bounded:
      words = "less than" if self.open_high else "at most"
      limits.append(f"{words} {_shown(self.high)}")
    interval = " and ".join(limits) or "finite"
    return " or ".join([*(f"{value:g}" for value in self.also), interval])


def _whole(low: int, high: int = LARGEST_WHOLE, **more: Any) -> Range:
  return Range(low, high, **more)


Finite = Annotated[float, Range()]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, open_high=True)]
ShareAboveZero = Annotated[float, Range(0, 1, open_low=True)]
OpenShare = Annotated[float, Range(0, 1, open_low=True, open_high=True)]
FlipShare = Annotated[float, Range(0, 0.5, open_high=True), "a share of flipped labels"]
OpenFlipShare = Annotated[float, Range(0, 0.5, open_low=True, open_high=True), "its logarithm is taken; try 0.001"]
Whole = Annotated[int, _whole(0)]
Count = Annotated[int, _whole(1)]
Several = Annotated[int, _whole(2)]
AxisSize = Annotated[int, _whole(1, also=(-1,)), "-1 takes the devices that remain"]
Port = Annotated[int, _whole(0, 65535)]
Seed = Annotated[int, _whole(0, 2**32 - 1)]


def check(name: str, value: Any, kind: Any) -> None:
  """Raises InputError if the value of the setting `name` is no number of the type `kind` of this module."""
  base, declared, note = _parts(kind)
  allowed = [int, np.integer]
  if base is float:
    allowed += [float, np.floating]
  if isinstance(value, bool) or not isinstance(value, tuple(allowed)):
    raise InputError(f"{name}={_shown(value)}: must be {_described(base, declared)}")
  if isinstance(value, np.generic):
    value = value.item()
  if declared.holds(value):
    return
  limits = _violated(value, base, declared)
  if note:
    limits += f" ({note})"
  raise InputError(f"{name}={_shown(value)}: must be {limits}")


def _described(base: type, declared: Range) -> str:
  """Describes the numbers of a type for an error's line."""
  noun = "number"
  if base is int:
    noun = "whole number"
  return f"a {noun}, {declared}"


def _violated(value: int | float, base: type, declared: Range) -> str:
  """Names the limits that exclude a value, for an error's line."""
  limits = str(declared)
  if isinstance(value, float) and not math.isfinite(value):
    return f"finite, {limits}".removesuffix(", finite")
  if not declared.bounded and value > 1:
    if base is int:
      return f"at most {declared.high:.0f}"
    return f"at most {declared.high:g}, as float32 is"
  if value and not isinstance(value, int) and abs(value) < 1e-30:
    return f"{limits} in float32"
  return limits


def check_all(section: str, values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
  """Raises InputError as `check` for each of `kinds` that `values` has; the error names it SECTION.KEY."""
  prefix = f"{section}." if section else ""
  for name, kind in kinds.items():
    if name in values:
      check(f"{prefix}{name}", values[name], kind)


def check_record(section: str, record: Any) -> None:
  """Raises InputError as `check` for the fields of a dataclass or named tuple that are declared with a range."""
  kinds = kinds_of(type(record))
  check_all(section, {name: getattr(record, name) for name in kinds}, kinds)


def read(name: str, kind: Any, text: str) -> int | float:
  """Parses the text of a flag as a number.

  Raises:
    InputError: it is no number, or outside of the range.
  """
  base, declared, _ = _parts(kind)
  try:
    value = base(text)
  except ValueError as error:
    raise InputError(f"{name}={_shown(text)}: must be {_described(base, declared)}") from error
  check(name, value, kind)
  return value


_kinds: dict[type, Mapping[str, Any]] = {}  # by record; every config asks for those of each of its sections


def kinds_of(cls: type) -> Mapping[str, Any]:
  """The fields of a dataclass or named tuple that are declared with a range, and their types; found once a class."""
  if cls not in _kinds:
    hints = typing.get_type_hints(cls, include_extras=True)
    _kinds[cls] = types.MappingProxyType({name: hint for name, hint in hints.items() if has_range(hint)})
  return _kinds[cls]


def keyword_kinds(function: Callable) -> dict[str, Any]:
  """The keyword-only parameters of a function that are declared with a range, and their types."""
  try:
    parameters = inspect.signature(function, eval_str=True).parameters.values()
  except NameError:  # an annotation of the user's own that means nothing here
    parameters = inspect.signature(function).parameters.values()
  annotations = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
  return {name: annotation for name, annotation in annotations.items() if has_range(annotation)}


def has_range(kind: Any) -> bool:
  """True for a type of this module."""
  return any(isinstance(part, Range) for part in getattr(kind, "__metadata__", ()))


def _parts(kind: Any) -> tuple[type, Range, str]:
  """Returns (type of the number, its range, end of an error's line) of a type of this module."""
  declared = next(part for part in kind.__metadata__ if isinstance(part, Range))
  notes = [part for part in kind.__metadata__ if isinstance(part, str)]
  return kind.__origin__, declared, next(reversed(notes), "")


def _shown(value: Any) -> str:
  """Shows a value in an error's line, shortened: a number may have thousands of digits."""
  if isinstance(value, int) and not isinstance(value, bool):
    if abs(value) < 10**24:
      return str(value)
    return f"a number of more than {int(value.bit_length() * 0.3)} digits"
  text = repr(value)
  if len(text) > 60:
    return f"{text[:57]}..."
  return text
