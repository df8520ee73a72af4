"""The state of the process that the run shares with all rewards; changes by a reward are undone."""

import contextlib
import os
import sys
from typing import Any

_STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}


class ProcessState:
  """The working directory, the environment, the standard streams and the recursion limit at its creation.

  A context manager, which closes the files that it keeps open; it puts nothing back by itself: call `put_back`.
  """

  def __init__(self):
    self._folder = self._opened(".")
    self._environment = dict(os.environ)
    self._limit = sys.getrecursionlimit()
    self._streams: dict[str, Any] = {name: getattr(sys, name) for name in _STREAMS}
    self._open = {name: not getattr(stream, "closed", True) for name, stream in self._streams.items()}
    self._numbers = {number: self._duplicate(number) for number in _STREAMS.values()}

  def __enter__(self) -> "ProcessState":
    return self

  def __exit__(self, *raised: Any) -> None:
    for number in (self._folder, *self._numbers.values()):
      if number is not None:
        os.close(number)

  def put_back(self) -> list[str]:
    """Undoes changes of the state; returns the names of what was changed."""
    changed = []
    if self._folder is not None and not self._is_same(os.stat, ".", self._folder):
      os.fchdir(self._folder)
      changed.append("the working directory")
    if dict(os.environ) != self._environment:
      os.environ.clear()
      os.environ.update(self._environment)
      changed.append("the environment")
    if sys.getrecursionlimit() != self._limit:
      with contextlib.suppress(RecursionError):  # the stack is too deep for the old limit
        sys.setrecursionlimit(self._limit)
      changed.append("the recursion limit")
    return changed + [name for name in _STREAMS if self._put_back_stream(name)]

  def _put_back_stream(self, name: str) -> bool:
    """Undoes a change of a stream; whether there was one."""
    number = _STREAMS[name]
    original = self._numbers[number]
    stream = self._streams[name]
    changed = False
    reused = False
    if original is not None and not self._is_same(os.fstat, number, original):
      changed = True
      try:
        os.fstat(number)
        reused = True  # by another file, which keeps the number
      except OSError:
        os.dup2(original, number)
    if original is not None and (reused or (self._open[name] and stream.closed)):
      if reused:
        number = os.dup(original)
      stream = open(number, "r" if name == "stdin" else "w", closefd=False)  # noqa: SIM115
    if getattr(sys, name) is not stream:
      setattr(sys, name, stream)
      changed = True
    return changed

  @staticmethod
  def _is_same(stat: Any, place: Any, original: int) -> bool:
    """Returns whether a place (a path or a file's number) is still the file that was open."""
    try:
      return os.path.samestat(stat(place), os.fstat(original))
    except OSError:
      return False

  @staticmethod
  def _opened(path: str) -> int | None:
    """Returns the number of an opened folder; None if it cannot be opened."""
    try:
      return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # it was deleted, or may not be read
      return None

  @staticmethod
  def _duplicate(number: int) -> int | None:
    """Another number of an open file; None if it is closed."""
    try:
      return os.dup(number)
    except OSError:
      return None
