"""The final answer of a text, and the comparison of two: exactly as numbers, else as texts."""

import re
from fractions import Fraction

LONGEST = 60  # characters of a number
_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
_SIGN = r"(?:(?<![\w.)\]}])[-−])?"  # after one of these characters it is an operator
_NUMBER = re.compile(rf"{_SIGN}\$?(?<![A-Za-z0-9_.]){_DIGITS}(?:\s*/\s*{_DIGITS})?")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{([0-9.,]+)\}\{([0-9.,]+)\}")
_DECORATION = re.compile(r"\\text\{[^{}]*\}|\\[,!;% ]|\\\(|\\\)|\\left|\\right|%|^\\?\$|\\?\$$")
_SPACES = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")  # "12 13" is not 1213


def reference(text: str) -> str:
  """Returns the final answer of a solution that is known to be right: its marked or boxed part, else all of it."""
  marked = after_mark(text)
  if marked is not None:
    return marked
  return last_boxed(text) or text.strip()


def after_mark(text: str) -> str | None:
  """Returns the rest of the line after the last "####"; None without one."""
  _, mark, rest = text.rpartition("####")
  if not mark:
    return None
  return rest.strip().partition("\n")[0]


def marked_number(text: str) -> str | None:
  """Returns the first number after the last "####", as written; all of `after_mark` if it has no number.

  None without "####".
  """
  marked = after_mark(text)
  if marked is None:
    return None
  match = _NUMBER.search(marked)
  return match.group() if match else marked


def last_number_of(text: str) -> str | None:
  """Returns the last number of a text, as written; None if it has none."""
  numbers = _NUMBER.findall(text)
  return numbers[-1] if numbers else None


def last_boxed(text: str) -> str | None:
  """Returns the content of the last \\boxed{...}; None if there is none, or its braces are not closed."""
  before, mark, _ = text.rpartition("\\boxed{")
  if not mark:
    return None
  start = len(before) + len(mark)
  depth = 1
  for place in range(start, len(text)):
    depth += {"{": 1, "}": -1}.get(text[place], 0)
    if not depth:
      return text[start:place].strip()
  return None


def number(text: str) -> Fraction | None:
  """Returns the exact value of a text that is a number; None if it is something else, or divides by 0.

  Units, LaTeX formatting and commas between thousands are dropped; fractions and powers of ten are read. A text of more
  than `LONGEST` characters is no number.
  """
  text = _plain(text)
  latex = _FRACTION.fullmatch(text)
  if latex:
    text = "{}{}/{}".format(*latex.groups())
  if len(text) > LONGEST or not _NUMBER.fullmatch(text):
    return None
  upper, _, lower = text.replace(",", "").replace("$", "").replace("−", "-").partition("/")
  divisor = Fraction(lower or 1)
  if not divisor:
    return None
  return Fraction(upper) / divisor


def equal(answer: str, right: str) -> bool:
  """Returns whether two final answers are the same number, or the same text if one is no number.

  Texts are compared without spaces, case and LaTeX formatting.
  """
  answer_number = number(answer)
  right_number = number(right)
  if answer_number is None or right_number is None:
    return _squeezed(answer) == _squeezed(right)
  return answer_number == right_number


def _plain(text: str) -> str:
  """Returns a text without units and LaTeX's formatting."""
  return _DECORATION.sub("", text.strip()).rstrip(".").strip()


def _squeezed(text: str) -> str:
  """Returns a text in the form in which texts are compared."""
  return _SPACES.sub("", _plain(text)).casefold()
