"""The thread that owns the devices: it drives the engines, one after the other, while there is work."""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import jax

from alignjax.serving.engine import Engine, Handed, Job, Piece

_TRIES = 3  # failures in a row after which the thread gives up
_TOGETHER = 0.004  # seconds without a new job, after which those that have come begin, if nothing else runs
_LONGEST_TOGETHER = 0.04  # seconds that the first of them waits for others
_LONGEST_WAIT = 60  # seconds that a client is told to wait
_log = logging.getLogger(__name__)


class FullError(Exception):
  """The queue has no room for a request.

  Attributes:
    seconds: after which it may have.
  """

  def __init__(self, seconds: int):
    super().__init__(f"the queue is full; try again in {seconds} s")
    self.seconds = seconds


class ClosedError(Exception):
  """The thread takes no jobs any more."""


def hand_over(pieces: Sequence[Handed]) -> None:
  """Gives each piece to its job, in the thread of the device."""
  for job, piece in pieces:
    job.receive(piece)


class Device:
  """Engines by name, and the thread that drives them. Its methods are for every thread.

  Attributes:
    engines: by name.
    queue: the most jobs that wait for a slot, over all engines.
    failures: exceptions that the engines have raised.
    broken: why the thread has given up; "" if it has not.
  """

  def __init__(
    self, engines: Mapping[str, Engine], queue: int, hand_over: Callable[[Sequence[Handed]], None] = hand_over
  ):
    """Makes the thread; `start` starts it.

    Args:
      engines: by name.
      queue: the most jobs that wait for a slot.
      hand_over: called in the thread with the pieces of a chunk; it must call `job.receive(piece)` for each, in order,
        in whatever thread.
    """
    self.engines = engines
    self.queue = queue
    self.failures = 0
    self.broken = ""
    self._hand_over = hand_over
    self._inbox: list[tuple[str, Job]] = []
    self._changed = threading.Condition()
    self._closing = False
    self._seconds = 1.0  # a job in a slot, by a moving average
    self._thread = threading.Thread(target=self._run, name="device", daemon=True)

  def start(self) -> None:
    """Starts the thread."""
    self._thread.start()

  def close(self) -> None:
    """Ends the thread after the chunk that it is at; jobs that are left get a failure."""
    with self._changed:
      self._closing = True
      self._changed.notify()
    if self._thread.is_alive():
      self._thread.join()

  @property
  def waiting(self) -> int:
    """Jobs without a slot."""
    return len(self._inbox) + sum(len(engine.waiting) for engine in self.engines.values())

  def submit(self, name: str, jobs: Sequence[Job]) -> None:
    """Queues jobs for an engine: all of them, or none.

    Raises:
      FullError: the queue has no room for them.
      ClosedError: the thread takes no jobs any more.
    """
    with self._changed:
      if self._closing or self.broken:
        raise ClosedError(self.broken or "the server is shutting down")
      waiting = self.waiting
      free = self.engines[name].rows - self.engines[name].busy
      if waiting + len(jobs) > self.queue + max(0, free):
        raise FullError(self._patience(name, waiting))
      self._inbox += [(name, job) for job in jobs]
      self._changed.notify()

  def _patience(self, name, waiting):
    """Returns the seconds after which the jobs that wait will have got a slot, about."""
    seconds = self._seconds * (waiting + 1) / self.engines[name].rows
    return min(max(1, math.ceil(seconds)), _LONGEST_WAIT)

  def _run(self):
    failed_in_a_row = 0
    while self._take():
      for engine in self.engines.values():
        if not (engine.waiting or engine.busy):
          continue
        try:
          with jax.set_mesh(engine.run.mesh):
            pieces = engine.advance()
          failed_in_a_row = 0
        except Exception as error:  # a server outlives what one request does to it
          _log.exception("decoding failed; the requests in its slots are answered with an error")
          failed_in_a_row += 1
          pieces = self._fail(engine, error)
          if failed_in_a_row >= _TRIES:
            self.broken = f"decoding failed {_TRIES} times in a row ({type(error).__name__})"
        self._note(pieces)
        self._hand_over(pieces)
    left = [job for engine in self.engines.values() for job in (*engine.waiting, *engine.jobs())]
    left += [job for _, job in self._inbox]
    self._hand_over([(job, Piece(failure=self.broken or "the server is shutting down")) for job in left])

  def _take(self) -> bool:
    """Moves new jobs to their engines, and waits for one if there is none; False if the thread shall end."""
    with self._changed:
      while not (self._closing or self.broken):
        is_busy = any(engine.waiting or engine.busy for engine in self.engines.values())
        if not is_busy and self._inbox:
          self._gather()
        for name, job in self._inbox:
          self.engines[name].waiting.append(job)
        if is_busy or self._inbox:
          self._inbox = []
          return True
        self._changed.wait()
      return False

  def _gather(self):
    """Waits for jobs that come at the same time as the first: those that begin together are decoded together."""
    end = time.monotonic() + _LONGEST_TOGETHER
    while self._changed.wait(_TOGETHER) and time.monotonic() < end and not self._closing:
      pass

  def _fail(self, engine, error):
    """Empties an engine whose program has failed; returns the last pieces of its jobs."""
    self.failures += 1
    jobs = engine.jobs()
    with jax.set_mesh(engine.run.mesh):
      engine.clear()
    return [(job, Piece(failure=f"decoding failed ({type(error).__name__})")) for job in jobs]

  def _note(self, pieces):
    """Takes the jobs that are done into the average of `_patience`."""
    now = time.monotonic()
    for job, piece in pieces:
      if piece.finish:
        self._seconds += 0.1 * (now - job.begun - self._seconds)
