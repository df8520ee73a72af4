"""Values as JSON between the tests and the code. Only plain values and numbers of objects are read, never code.

A value is itself if JSON has its type, else a list of a letter and the value's parts. Objects stay in their process;
the other side gets their number.
"""

import builtins
import importlib
import sys
from collections.abc import Callable
from typing import Any

DIRECT = (type(None), bool, str)
LISTS = {"l": list, "t": tuple, "s": set, "z": frozenset}
LETTERS: dict[type, str] = {kind: letter for letter, kind in LISTS.items()}
LIBRARY = {
  ("fractions", "Fraction"): lambda x: (x.numerator, x.denominator),
  ("decimal", "Decimal"): lambda x: (str(x),),
  ("datetime", "timedelta"): lambda x: (x.days, x.seconds, x.microseconds),
  ("datetime", "date"): lambda x: (x.year, x.month, x.day),
  ("datetime", "time"): lambda x: (x.hour, x.minute, x.second, x.microsecond),
  ("datetime", "datetime"): lambda x: (x.year, x.month, x.day, x.hour, x.minute, x.second, x.microsecond),
  ("collections", "OrderedDict"): lambda x: (dict(x),),
  ("collections", "Counter"): lambda x: (dict(x),),
  ("collections", "deque"): lambda x: (list(x), x.maxlen),
  ("uuid", "UUID"): lambda x: (str(x),),
  ("pathlib", "PosixPath"): lambda x: (str(x),),
  ("pathlib", "PurePosixPath"): lambda x: (str(x),),
}  # fmt: skip
NUMPY_KINDS = "biufc"
MUTABLE = (list, dict, set, bytearray)


class BadValueError(ValueError):
  """The other side sent something that is no value."""


def encode(value: Any, number_of: Callable[[Any], Any]) -> Any:
  """Encodes a value for `json.dumps`; an object that is no plain value becomes a number.

  Args:
    value: anything.
    number_of: gives the number of an object that is no plain value.
  """
  kind = type(value)
  if kind in DIRECT or (kind is int and -(2**62) < value < 2**62):
    return value
  if kind is int:
    return ["i", hex(value)]
  if kind is float:
    if -1e300 < value < 1e300:
      return value
    return ["f", value.hex()]
  if kind in LETTERS:
    return [LETTERS[kind], *(encode(item, number_of) for item in value)]
  if kind is dict:
    return ["d", *([encode(key, number_of), encode(item, number_of)] for key, item in value.items())]
  if kind in (bytes, bytearray):
    return ["b" if kind is bytes else "y", value.hex()]
  if kind is complex:
    return ["c", value.real.hex(), value.imag.hex()]
  if kind is range:
    return ["r", *(encode(part, number_of) for part in (value.start, value.stop, value.step))]
  if value is Ellipsis or value is NotImplemented:
    return ["e", repr(value)]
  return _library(value, kind, number_of) or number_of(value)


def decode(said: Any, object_of: Callable[[list], Any]) -> Any:
  """Decodes what `encode` wrote.

  Args:
    said: of `json.loads`.
    object_of: gives the object of a number.

  Raises:
    BadValueError: `encode` writes no value like this.
  """
  if not isinstance(said, list):
    if isinstance(said, dict):
      raise BadValueError("a JSON object")
    return said
  letter, *rest = said or [None]
  try:
    if letter in LISTS:
      return LISTS[letter](decode(item, object_of) for item in rest)
    if letter in _READ:
      return _READ[letter](rest, object_of)
    return object_of(said)
  except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
    raise BadValueError(f"{type(error).__name__} in what was sent: {str(error)[:100]}") from error


def _library(value: Any, kind: type, number_of: Callable[[Any], Any]) -> list | None:
  """Returns a value of the standard library, a named tuple, or a value of NumPy, by its parts; None for others."""
  name = (kind.__module__, kind.__qualname__)
  if name in LIBRARY and getattr(sys.modules.get(name[0]), name[1], None) is kind:
    if getattr(value, "tzinfo", None) is not None:
      return None
    return ["v", *name, *(encode(part, number_of) for part in LIBRARY[name](value))]
  if name == ("collections", "defaultdict"):
    return ["v", *name, encode(value.default_factory, number_of), encode(dict(value), number_of)]
  if kind.__bases__ == (tuple,) and isinstance(fields := getattr(kind, "_fields", None), tuple):
    return ["p", kind.__name__, list(fields), *(encode(item, number_of) for item in value)]
  if name[0] == "numpy" and hasattr(value, "dtype") and value.dtype.kind in NUMPY_KINDS:
    return ["n", value.dtype.str, list(value.shape), value.tobytes().hex(), name[1] == "ndarray"]
  return None


def _from_library(rest: list, object_of: Callable[[list], Any]) -> Any:
  module, name, *parts = rest
  if (module, name) not in LIBRARY and name != "defaultdict":
    raise BadValueError(f"{module}.{name} is no plain value")
  if name == "defaultdict":
    module = "collections"
  return getattr(importlib.import_module(module), name)(*(decode(part, object_of) for part in parts))


def _named_tuple(rest: list, object_of: Callable[[list], Any]) -> tuple:
  from collections import namedtuple

  name, fields, *items = rest
  key = (str(name), tuple(map(str, fields)))
  if key not in _TUPLES:
    _TUPLES[key] = namedtuple(*key)
  return _TUPLES[key](*(decode(item, object_of) for item in items))


def _numpy(rest: list, object_of: Callable[[list], Any]) -> Any:
  import numpy as np

  text, shape, data, is_array = rest
  dtype = np.dtype(str(text))
  if dtype.kind not in NUMPY_KINDS:
    raise BadValueError(f"NumPy's {dtype}")
  array = np.frombuffer(bytes.fromhex(data), dtype).reshape([int(size) for size in shape]).copy()
  if is_array:
    return array
  return array[()]


def _constant(rest: list, object_of: Callable[[list], Any]) -> Any:
  return {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}[rest[0]]


def is_builtin(kind: type) -> bool:
  """Returns whether a class is one of `builtins`, by name."""
  return kind.__module__ == "builtins" and getattr(builtins, kind.__qualname__, None) is kind


_TUPLES: dict[tuple, type] = {}
_READ = {
  "i": lambda rest, _: int(rest[0], 16),
  "f": lambda rest, _: float.fromhex(rest[0]),
  "d": lambda rest, object_of: {decode(key, object_of): decode(item, object_of) for key, item in rest},
  "b": lambda rest, _: bytes.fromhex(rest[0]),
  "y": lambda rest, _: bytearray.fromhex(rest[0]),
  "c": lambda rest, _: complex(*map(float.fromhex, rest)),
  "r": lambda rest, object_of: range(*(decode(part, object_of) for part in rest)),
  "e": _constant,
  "v": _from_library,
  "p": _named_tuple,
  "n": _numpy,
}  # fmt: skip
