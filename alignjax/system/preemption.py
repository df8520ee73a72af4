"""Leaving in good order when the job is told to stop."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from alignjax import errors


class Preemption:
  """Whether the job was told to stop: a context manager around the loop, which asks at each step.

  In one process, SIGTERM or Ctrl-C is noted, and the loop gets to save and leave; a second Ctrl-C
  interrupts at once, and so does the first one while the first step compiles: there is nothing to save yet.
  In several, JAX's distributed service catches SIGTERM and makes all of them agree on the step at which they stop.
  """

  def __init__(self):
    self._noted = False
    self._watches = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Preemption":
    # Signals reach the main thread alone: in another one the process's own handlers stay.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._watches = True
      self._watch(signal.SIGTERM)
    return self

  def __exit__(self, *_) -> None:
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)
    self._previous = {}
    self._watches = False

  def requested(self, step: int) -> bool:
    """Whether to save at this step and leave: the same answer in every process."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    self._watch(signal.SIGINT)  # from the first step's end on
    return self._noted

  def _watch(self, signum: int) -> None:
    if self._watches and signum not in self._previous:
      self._previous[signum] = signal.signal(signum, self._note)

  def _note(self, signum: int, frame) -> None:
    if signum == signal.SIGINT:
      if self._noted:
        previous = self._previous[signum]
        (previous if callable(previous) else signal.default_int_handler)(signum, frame)
      errors.note_interrupt("stopping when this step is saved; Ctrl-C again leaves at once")
    self._noted = True
