"""Where a number may lie: one range per setting, declared beside its definition, and one check.

A field of a config section, an option, a hyper-parameter, a keyword of a loss and a flag of the command line are
declared with a type of this module: `clip_norm: Annotated[NonNegative, "0 does not clip"] = 1.0`. The text, where there
is one, ends the error's line. No type holds NaN, an infinity, or what becomes either in float32.
"""

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np

from alignjax.errors import InputError

LARGEST_WHOLE = 2**31 - 1  # what an int32 holds: steps and sizes are counted in those
LARGEST = float(np.finfo(np.float32).max)  # what is traced is float32


@dataclasses.dataclass(frozen=True)
class Range:
  """An interval of numbers, and single values beside it (-1 for "the rest")."""

  low: float = -LARGEST
  high: float = LARGEST
  open_low: bool = False
  open_high: bool = False
  also: tuple[float, ...] = ()

  def holds(self, value: float) -> bool:
    """Whether a number lies inside, as it is and as the float32 that it becomes: 1e-50 is not more than 0."""
    if value in self.also:
      return True
    if isinstance(value, int):
      return self._inside(value)
    with np.errstate(over="ignore", under="ignore"):
      single = float(np.float32(value))
    tiny = self.open_low and self.low == 0 and single < float(np.finfo(np.float32).tiny)  # devices flush these to 0
    return self._inside(value) and self._inside(single) and not tiny

  def _inside(self, value: float) -> bool:
    above = value > self.low if self.open_low else value >= self.low
    below = value < self.high if self.open_high else value <= self.high
    return above and below

  @property
  def bounded(self) -> bool:
    """Whether the upper end is more than what a number can hold at all."""
    return self.high not in (LARGEST, LARGEST_WHOLE)

  def __str__(self) -> str:
    """ "at least 0", "more than 0 and at most 1" """
    low = f"{'more than' if self.open_low else 'at least'} {self.low:g}" if self.low > -LARGEST else ""
    high = f"{'less than' if self.open_high else 'at most'} {_shown(self.high)}" if self.bounded else ""
    single = [f"{value:g}" for value in self.also]
    return " or ".join([*single, " and ".join(filter(None, (low, high))) or "finite"])


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
Seed = Annotated[int, _whole(0, 2**32 - 1)]


def check(name: str, value: Any, kind: Any) -> None:
  """Raises InputError where the value of the setting `name` is no number of the type `kind` of this module."""
  base, declared, note = _parts(kind)
  right = (int, np.integer) if base is int else (int, float, np.integer, np.floating)
  if isinstance(value, bool) or not isinstance(value, right):
    raise InputError(f"{name}={_shown(value)}: must be a {'whole ' if base is int else ''}number, {declared}")
  value = value.item() if isinstance(value, np.generic) else value
  if declared.holds(value):
    return
  limits = str(declared)
  if isinstance(value, float) and not math.isfinite(value):
    limits = "finite" if limits == "finite" else f"finite, {limits}"
  elif not declared.bounded and value > 1:
    limits = f"at most {declared.high:.0f}" if base is int else f"at most {declared.high:g}, as float32 is"
  elif value and not isinstance(value, int) and abs(value) < 1e-30:
    limits += " in float32"
  raise InputError(f"{name}={_shown(value)}: must be {limits}{f' ({note})' if note else ''}")


def check_all(section: str, values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
  """Raises InputError as `check` for each of `kinds` that `values` has, named SECTION.KEY."""
  for name, kind in kinds.items():
    if name in values:
      check(f"{section}.{name}" if section else name, values[name], kind)


def check_record(section: str, record: Any) -> None:
  """Raises InputError as `check` for the fields of a dataclass or named tuple that are declared with a range."""
  kinds = kinds_of(type(record))
  check_all(section, {name: getattr(record, name) for name in kinds}, kinds)


def read(name: str, kind: Any, text: str) -> int | float:
  """The number that a flag's text says.

  Raises:
    InputError: it is none, or lies outside of the range.
  """
  base, declared, _ = _parts(kind)
  try:
    value = base(text)
  except ValueError as error:
    limits = f"a {'whole ' if base is int else ''}number, {declared}"
    raise InputError(f"{name}={_shown(text)}: must be {limits}") from error
  check(name, value, kind)
  return value


@functools.cache
def kinds_of(cls: type) -> dict[str, Any]:
  """The fields of a dataclass or named tuple that are declared with a range, and their types."""
  hints = typing.get_type_hints(cls, include_extras=True)
  return {name: hint for name, hint in hints.items() if has_range(hint)}


def keyword_kinds(function: Callable) -> dict[str, Any]:
  """The keyword-only parameters of a function that are declared with a range, and their types."""
  parameters = inspect.signature(function).parameters.values()
  found = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
  return {name: annotation for name, annotation in found.items() if has_range(annotation)}


def has_range(kind: Any) -> bool:
  """Whether a type is one of this module's."""
  return any(isinstance(part, Range) for part in getattr(kind, "__metadata__", ()))


def _parts(kind: Any) -> tuple[type, Range, str]:
  """The type of the number, its range, and what the end of an error's line says."""
  declared = next(part for part in kind.__metadata__ if isinstance(part, Range))
  notes = [part for part in kind.__metadata__ if isinstance(part, str)]
  return kind.__origin__, declared, notes[-1] if notes else ""


def _shown(value: Any) -> str:
  """A value for an error's line, which a number of thousands of digits would not fit."""
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value) if abs(value) < 10**24 else f"a number of more than {int(value.bit_length() * 0.3)} digits"
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
