"""What one rendering of a chat template may use up: steps, characters and seconds, all from one account.

An operation is charged before it runs, so that no single operation is large. `jinja_limits.py` has the
environment that charges, `jinja_charges.py` the charge of each operator, method and filter.
"""

import contextvars
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jinja2

STEPS = 1_000_000  # iterations, calls and list entries of one rendering, plus one for each character of its input
ROOM = 64_000_000  # characters that one rendering may make, plus ...
ROOM_PER_CHARACTER = 64  # ... for each character of the dialogue
SECONDS = 10.0  # processor time of this thread
BITS = 4096  # of a whole number


class Exhausted(jinja2.TemplateError):
  """A rendering that uses more than a dialogue of its size can need."""


class Account:
  """What one rendering has left.

  Args:
    characters: the size of its input, see `size_of`; a larger input gets more steps and room.
  """

  def __init__(self, characters: int = 0):
    self.steps = STEPS + characters
    self.room = ROOM + ROOM_PER_CHARACTER * characters
    self._until = time.thread_time() + SECONDS
    self._ticks = 0

  def step(self, count: int = 1) -> None:
    """Takes steps.

    Raises:
      Exhausted: none are left, or the time is over.
    """
    self.steps -= count
    if self.steps < 0:
      raise Exhausted(f"it takes more than {STEPS} steps and one for each of the dialogue's characters")
    self._ticks += 1
    if not self._ticks % 64 and time.thread_time() > self._until:
      raise Exhausted(f"it takes more than {SECONDS:g} seconds")

  def make(self, characters: int) -> None:
    """Takes room for characters that are about to be made.

    Raises:
      Exhausted: there is no room for them.
    """
    self.room -= characters
    if self.room < 0:
      raise Exhausted(f"it makes more than {ROOM} characters and {ROOM_PER_CHARACTER} for each of the dialogue's")


_ACCOUNT: contextvars.ContextVar[Account] = contextvars.ContextVar("account")


@contextmanager
def opened(characters: int = 0) -> Iterator[None]:
  """Opens an account for an input of some characters: inside, `current` returns it."""
  token = _ACCOUNT.set(Account(characters))
  try:
    yield
  finally:
    _ACCOUNT.reset(token)


def current() -> Account:
  """The account of the rendering that is in progress, or a fresh one outside of any."""
  return _ACCOUNT.get(None) or Account()


def size_of(value: Any) -> int:
  """Counts the characters and entries of a JSON value."""
  if isinstance(value, str):
    return len(value)
  if isinstance(value, Mapping):
    return sum(len(key) + size_of(item) + 1 for key, item in value.items())
  if isinstance(value, list | tuple):
    return sum(size_of(item) + 1 for item in value)
  return 1


def bits(value: Any) -> int:
  """The bits of a whole number; 0 for any other value."""
  if isinstance(value, int):
    return value.bit_length()
  return 0


def charge_depth(value: Any, written: bool = False) -> int:
  """Takes a step for each entry of a value at any depth; a list that occurs twice in it counts twice.

  Args:
    value: about to be traversed.
    written: as text: its characters are charged too, and functions and the like are refused.

  Returns:
    A bound on the characters of its text.

  Raises:
    TemplateError: a part has no text of its own, only an address.
  """
  account = current()
  size = 0
  waiting = [value]
  while waiting:
    part = waiting.pop()
    account.step()
    if isinstance(part, str):
      size += 2 * len(part) + 8
    elif bits(part) > 64:
      size += BITS // 3
    elif isinstance(part, int | float | None | jinja2.Undefined):
      size += 32
    elif isinstance(part, dict):
      waiting += itertools.chain.from_iterable(part.items())
      account.step(len(part))
    elif isinstance(part, list | tuple | type({}.items()) | type({}.keys()) | type({}.values())):
      account.step(len(part))
      waiting += part
    elif isinstance(part, range):
      size += 64
    elif written:
      raise jinja2.TemplateError(f"it writes a {type(part).__name__}, which has no text")
  if written:
    account.make(size)
  return size


def charge_entries(value: Any) -> None:
  """Takes steps for an operation that visits the entries of a value, at one level."""
  if isinstance(value, list | tuple | dict | range):
    current().step(len(value))


def charge_result(value: Any) -> None:
  """Takes room for a text that was made, or steps for the entries of a list or object."""
  if isinstance(value, str):
    current().make(len(value))
  else:
    charge_entries(value)


def as_text(value: Any) -> str:
  """The text of a plain value, charged; other values are refused, because their text holds an address."""
  if isinstance(value, str):
    return value
  if not isinstance(value, int | float | None):
    charge_depth(value, written=True)
  return str(value)


def collected(values: Any) -> list:
  """Collects an iterable into a list, one step for each entry."""
  account = current()
  entries = []
  for value in values:
    account.step()
    entries.append(value)
  return entries


def metered(values: Iterator[Any]) -> Iterator[Any]:
  """Passes on the values of a lazy filter, one step for each."""
  account = current()
  for value in values:
    account.step()
    yield value
