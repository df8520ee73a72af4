"""The final answer of a text, and whether two are equal: as numbers, exactly, else as texts."""

import re
from fractions import Fraction

LONGEST = 60  # characters of a number
_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
_SIGN = r"(?:(?<![\w.)\]}])[-−])?"  # after these it is an operator
_NUMBER = re.compile(rf"{_SIGN}\$?(?<![A-Za-z0-9_.]){_DIGITS}(?:\s*/\s*{_DIGITS})?")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{([0-9.,]+)\}\{([0-9.,]+)\}")
_DECORATION = re.compile(r"\\text\{[^{}]*\}|\\[,!;% ]|\\\(|\\\)|\\left|\\right|%|^\\?\$|\\?\$$")
_SPACES = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")  # "12 13" is not 1213


def reference(text: str) -> str:
  """The final answer of a solution that is known to be right: what is marked or boxed, else all of it."""
  marked = after_mark(text)
  return marked if marked is not None else last_boxed(text) or text.strip()


def after_mark(text: str) -> str | None:
  """What follows the last "####" in its line."""
  _, mark, rest = text.rpartition("####")
  return rest.strip().partition("\n")[0] if mark else None


def marked_number(text: str) -> str | None:
  """The first number after the last "####", or what stands there instead."""
  marked = after_mark(text)
  found = _NUMBER.search(marked) if marked is not None else None
  return found.group() if found else marked


def last_number_of(text: str) -> str | None:
  """The last number of a text."""
  found = _NUMBER.findall(text)
  return found[-1] if found else None


def last_boxed(text: str) -> str | None:
  """The content of the last \\boxed{...} whose braces are balanced; None where the last one is not closed."""
  start = text.rfind("\\boxed{")
  if start < 0:
    return None
  start, depth = start + len("\\boxed{"), 1
  for place in range(start, len(text)):
    depth += {"{": 1, "}": -1}.get(text[place], 0)
    if not depth:
      return text[start:place].strip()
  return None


def number(text: str) -> Fraction | None:
  """The number that a text is, exactly; None if it is something else."""
  text = _plain(text)
  latex = _FRACTION.fullmatch(text)
  if latex:
    text = "{}{}/{}".format(*latex.groups())
  if len(text) > LONGEST or not _NUMBER.fullmatch(text):
    return None
  upper, _, lower = text.replace(",", "").replace("$", "").replace("−", "-").partition("/")
  divisor = Fraction(lower or 1)
  return Fraction(upper) / divisor if divisor else None


def equal(said: str, right: str) -> bool:
  """Whether two final answers are the same number, or else the same text."""
  a, b = number(said), number(right)
  if a is None or b is None:
    return _squeezed(said) == _squeezed(right)
  return a == b


def _plain(text: str) -> str:
  """A text without units and what LaTeX adds for the eye."""
  return _DECORATION.sub("", text.strip()).rstrip(".").strip()


def _squeezed(text: str) -> str:
  return _SPACES.sub("", _plain(text)).casefold()
