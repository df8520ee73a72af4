"""What each operator, method and filter of a chat template costs, charged before it runs (see `jinja_account.py`)."""

import re
import string
from collections.abc import Iterable, Iterator
from typing import Any

from alignjax.data.jinja_account import (
  BITS,
  Account,
  Exhausted,
  as_text,
  bits,
  charge_depth,
  charge_entries,
  collected,
  current,
)

DIGITS = 1000  # width, precision, indent
SHALLOW = frozenset(  # filters that do not look inside an entry
  [
    *("batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr"),
    *("reverse", "select", "selectattr", "slice"),
  ]
)
_WRITES_TEXT = frozenset(("string", "upper", "lower", "trim", "capitalize", "title"))
_COPIES_TEXT = frozenset(("join", "indent", "replace", "center", "format", "e", "escape"))
_LISTS_PARTS = frozenset(("list", "title", "wordcount"))
_SIZED_BY_A_NUMBER = frozenset(("indent", "batch", "slice", "center", "round", "tojson", "join", "replace", "format"))
_WIDTH = re.compile(r"\d{4,}|\*")
_PERCENT = re.compile(r"%(?:\([^)]*\))?([^a-zA-Z%]*)")


def refuse(what: str) -> Any:
  """Raises Exhausted: `what` is not supported."""
  raise Exhausted(f"{what} is not supported in a chat template")


# Operators.


def charge_sum(left: Any, right: Any) -> None:
  """Charges `left + right`."""
  account = current()
  for side in (left, right):
    if isinstance(side, str):
      account.make(len(side))
    elif isinstance(side, list | tuple):
      account.step(len(side))


def charge_product(left: Any, right: Any) -> None:
  """Charges `left * right`: numbers are limited, and a repeated text or list costs its size."""
  account = current()
  _charge_repeated(account, left, right)
  _charge_repeated(account, right, left)
  if bits(left) + bits(right) > BITS:
    raise Exhausted(f"a number of more than {BITS} bits")


def _charge_repeated(account: Account, value: Any, times: Any) -> None:
  if not isinstance(times, int):
    return
  if isinstance(value, str):
    account.make(len(value) * max(times, 0))
  elif isinstance(value, list | tuple):
    account.step(len(value) * max(times, 0))


def check_power(left: Any, right: Any) -> None:
  """Raises Exhausted if `left ** right` is a large whole number."""
  if isinstance(left, int) and isinstance(right, int) and bits(left) * abs(right) > BITS:
    raise Exhausted(f"a number of more than {BITS} bits")


def charge_percent(pattern: str, values: Any) -> None:
  """Charges `pattern % values`: no field is wide, and each place has room for all values."""
  if any(_WIDTH.search(flags) for flags in _PERCENT.findall(pattern)):
    raise Exhausted(f"a field of more than {DIGITS} characters")
  current().make(len(pattern) + pattern.count("%") * (_written_size(values) + DIGITS))


def _written_size(values: Any) -> int:
  """A bound on the characters of what a pattern is filled with."""
  if isinstance(values, str):
    return len(values) + 8
  return charge_depth(values, written=True)


# Methods.


def charge_format(pattern: str, values: list[Any]) -> None:
  """Charges `pattern.format(*values)`: no field is wide, and each place has room for all values."""
  for _, name, width, _ in string.Formatter().parse(pattern):
    if (width and (_WIDTH.search(width) or "{" in width)) or (name and _WIDTH.search(name)):
      raise Exhausted(f"a field of more than {DIGITS} characters")
  current().make(len(pattern) + pattern.count("{") * (charge_depth(values, written=True) + DIGITS))


def charge_method(method: Any, args: tuple, values: list[Any]) -> tuple:
  """Charges a built-in method of a text, list or number.

  Args:
    method: bound.
    args: its positional arguments.
    values: all of its arguments, those by name included.

  Returns:
    The positional arguments; an iterator that `join` would consume has become a list.
  """
  instance = method.__self__
  if isinstance(instance, str):
    if method.__name__ == "join" and len(args) == 1:
      args = (collected(args[0]),)
    _charge_text_method(instance, method.__name__, args, values)
  elif isinstance(instance, list | tuple | dict | range):
    for value in values:
      charge_depth(value)
    if method.__name__ in ("count", "index"):
      charge_depth(instance)
    elif method.__name__ == "copy":
      charge_entries(instance)
  else:
    for value in values:
      charge_entries(value)
  return args


def _charge_text_method(text: str, name: str, args: tuple, values: list[Any]) -> None:
  account = current()
  if name == "join":
    if len(args) == 1:
      parts = args[0]
      account.make(sum(len(part) for part in parts if isinstance(part, str)) + len(text) * len(parts))
    else:
      account.make(len(text))
  elif name == "replace" and len(args) >= 2:
    old, new = args[:2]
    if isinstance(old, str) and isinstance(new, str):
      account.make(len(text) + text.count(old) * len(new))
  elif name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
    widest = max([8, *(value for value in values if isinstance(value, int))])
    if name == "expandtabs":
      widest *= text.count("\t")
    account.make(len(text) + widest)
  elif name in ("split", "rsplit", "splitlines"):
    account.step(_most_parts(text, values))
    account.make(len(text))
  else:
    account.make(len(text))


def _most_parts(text: str, values: list[Any]) -> int:
  """A bound on the parts of a text that is split, with the arguments of the method."""
  separator = next(iter(values), None)
  if isinstance(separator, str) and separator:
    return text.count(separator) + 1
  if len(text) > 1000:
    return 1 + len(text) // 2
  return 1


# Filters.


def charge_filter(name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
  """Charges a filter for what it may make of its arguments; the first is the value that is filtered."""
  account = current()
  value = next(iter(args), "")
  options = [*args[1:], *kwargs.values()]
  for option in options:
    _charge_option(name, option)
  _charge_input(name, value)
  if name == "format":
    if isinstance(value, str):
      charge_percent(value, options)
  elif name == "join":
    if hasattr(value, "__len__"):
      account.make(len(value) * _longest(options))
  elif name == "replace":
    text = as_text(value)
    old = next(iter(args[1:2]), kwargs.get("old", ""))
    account.make(len(text) + _most_places(text, old) * _longest(options))
  elif name == "indent":
    account.make((as_text(value).count("\n") + 1) * max([4, *_widths(options)]))
  elif name == "tojson":
    account.make(_json_size(value, options))
  elif name == "sum" and any(isinstance(option, list | tuple) for option in options):
    refuse("a sum of lists")


def _charge_option(name: str, option: Any) -> None:
  """Charges an argument of a filter besides its value; a large number is refused if it sizes the result."""
  if isinstance(option, int) and not isinstance(option, bool) and not -DIGITS <= option <= DIGITS:
    if name in _SIZED_BY_A_NUMBER:
      raise Exhausted(f"{name} with {_shown(option)}")
  elif not isinstance(option, str | int | float | None):
    charge_depth(option)


def _shown(number: int) -> str:
  if bits(number) < 64:
    return str(number)
  return "a number of many digits"


def _charge_input(name: str, value: Any) -> None:
  """Charges a filter for reading its value."""
  if isinstance(value, str):
    current().make(len(value))
    if name in _LISTS_PARTS:
      current().step(len(value))
  elif name in SHALLOW or name == "tojson":
    charge_entries(value)
  elif not isinstance(value, int | float | None):
    size = charge_depth(value, written=name in _WRITES_TEXT)
    if name in _COPIES_TEXT:
      current().make(size)


def _longest(options: list[Any]) -> int:
  """The characters of the longest text among some options."""
  return max((len(option) for option in options if isinstance(option, str)), default=0)


def _most_places(text: str, old: Any) -> int:
  """A bound on how often `old` occurs in a text; a value that is no text is written as some text first."""
  if isinstance(old, str):
    return text.count(old)
  return len(text) + 1


def _json_size(value: Any, options: list[Any]) -> int:
  """A bound on the characters of a value as JSON."""
  widths = _widths(_flat(options))
  widest = max(widths, default=0)
  if widest > 16:
    raise Exhausted("tojson with a wide indent or separator")
  size = 3 * charge_depth(value)
  if widths:
    size += _sum_of_depths(value) * widest
  return size


def _widths(options: Iterable[Any]) -> list[int]:
  """How wide each option may make an indent or a separator: the length of a text, or a number; True is a switch."""
  widths = []
  for option in options:
    if isinstance(option, str):
      widths.append(len(option))
    elif isinstance(option, int) and option is not True:
      widths.append(option)
  return widths


def _flat(options: list[Any]) -> Iterator[Any]:
  """The options, and in place of a list its entries."""
  for option in options:
    if isinstance(option, list | tuple):
      yield from option
    else:
      yield option


def _sum_of_depths(value: Any) -> int:
  """Sums the depths of all parts of a JSON value: how many indents its text can have."""
  total = 0
  waiting = [(value, 1)]
  while waiting:
    part, depth = waiting.pop()
    total += depth
    if isinstance(part, dict):
      part = list(part.values())
    if isinstance(part, list | tuple):
      waiting += ((item, depth + 1) for item in part)
  return total
