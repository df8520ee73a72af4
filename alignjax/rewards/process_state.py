"""What all rewards and the run share, for they run in one process: put back where a reward has changed it."""

import contextlib
import os
import sys
from typing import Any

_STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}


class ProcessState:
  """The working directory, the environment, the standard streams and the recursion limit, as they were."""

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
    """Undoes what has changed, and names it."""
    changed = []
    if self._folder is not None and not self._is_same(os.stat, ".", self._folder):
      os.fchdir(self._folder)
      changed.append("the working directory")
    if dict(os.environ) != self._environment:
      os.environ.clear()
      os.environ.update(self._environment)
      changed.append("the environment")
    if sys.getrecursionlimit() != self._limit:
      with contextlib.suppress(RecursionError):  # too deep now for the old one
        sys.setrecursionlimit(self._limit)
      changed.append("the recursion limit")
    return changed + [name for name in _STREAMS if self._put_back_stream(name)]

  def _put_back_stream(self, name: str) -> bool:
    number = _STREAMS[name]
    kept = self._numbers[number]
    stream = self._streams[name]
    changed = taken = False
    if kept is not None and not self._is_same(os.fstat, number, kept):
      changed = True
      try:
        os.fstat(number)
        taken = True  # by another file, which keeps it
      except OSError:
        os.dup2(kept, number)
    if kept is not None and (taken or (self._open[name] and stream.closed)):
      place = os.dup(kept) if taken else number
      stream = open(place, "w" if number else "r", closefd=False)  # noqa: SIM115
    if getattr(sys, name) is not stream:
      setattr(sys, name, stream)
      changed = True
    return changed

  @staticmethod
  def _is_same(stat: Any, place: Any, kept: int) -> bool:
    try:
      return os.path.samestat(stat(place), os.fstat(kept))
    except OSError:
      return False

  @staticmethod
  def _opened(path: str) -> int | None:
    try:
      return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # it was deleted, or may not be read
      return None

  @staticmethod
  def _duplicate(number: int) -> int | None:
    try:
      return os.dup(number)
    except OSError:
      return None
