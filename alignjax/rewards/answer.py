"""Rewards that verify the final answer: 1 right, 0 wrong, None where the record has no answer.

The right answer is a column of the prompt's record, "answer" unless `answer_column` says otherwise. It is cut to what
follows its last "####", as in GSM8K, or to its last \\boxed{...}. Two answers are equal as numbers, exactly, where both
are numbers ("1,250.0" and "$1250"; "3/4" and "0.75"), otherwise as texts without their spaces and case.
"""

import importlib.util
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial

from alignjax.errors import InputError
from alignjax.rewards.isolation import isolated
from alignjax.rewards.protocol import Columns, Reward, column

Reader = Callable[[str], str | None]
LONGEST = 60  # characters of a number

_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
_SIGN = r"(?:(?<![\w.)\]}])[-−])?"  # after these it is an operator
_NUMBER = re.compile(rf"{_SIGN}\$?(?<![A-Za-z0-9_.]){_DIGITS}(?:\s*/\s*{_DIGITS})?")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{([0-9.,]+)\}\{([0-9.,]+)\}")
_DECORATION = re.compile(r"\\text\{[^{}]*\}|\\[,!;% ]|\\\(|\\\)|\\left|\\right|%|^\\?\$|\\?\$$")
_SPACES = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")  # "12 13" is not 1213


def gsm8k(*, answer_column: str = "answer") -> Reward:
  """Whether the first number after the last "####" is the right one; 0 without "####".

  Source: Cobbe et al. 2021 (arXiv:2110.14168), the data set's own form.
  """
  return verifier(marked_number, answer_column)


def boxed(*, answer_column: str = "answer") -> Reward:
  """Whether the last \\boxed{...} holds the right answer; 0 without one.

  Source: Hendrycks et al. 2021 (arXiv:2103.03874), the data set's own form.
  """
  return verifier(last_boxed, answer_column)


def last_number(*, answer_column: str = "answer") -> Reward:
  """Whether the last number of the completion is the right one: lenient, for models that know no form yet."""
  return verifier(last_number_of, answer_column)


def symbolic(*, answer_column: str = "answer", symbolic_limit_s: float = 10.0) -> Reward:
  """Whether the answer, in LaTeX or as an expression, is symbolically equal to the right one, by math-verify.

  It runs in a process of its own, which is killed where an expression takes longer than `symbolic_limit_s` seconds.

  Raises:
    InputError: math-verify is not installed.
  """
  if importlib.util.find_spec("math_verify") is None:
    raise InputError("reward symbolic needs the library math-verify: pip install 'alignjax[verify]'")
  from alignjax.rewards.symbolic import equal

  reward = isolated(partial(equal, answer_column=answer_column), symbolic_limit_s)
  reward.needs = (answer_column,)
  return reward


def verifier(said: Reader, answer_column: str) -> Reward:
  """The reward of what `said` reads out of a completion."""

  def reward(prompts, completions, token_ids, columns: Columns):
    right = [None if answer is None else reference(str(answer)) for answer in column(columns, answer_column)]
    pairs = zip(map(said, completions), right, strict=True)
    return [None if b is None else float(a is not None and equal(a, b)) for a, b in pairs]

  reward.needs = (answer_column,)
  return reward


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
