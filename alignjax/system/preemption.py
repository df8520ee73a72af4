"""An orderly end when the job is told to stop."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from alignjax import errors


class Preemption:
  """Notes a request to stop: a context manager around the loop, which asks `requested` at each step.

  In one process, SIGTERM or Ctrl-C is noted, and the loop saves and leaves. A second Ctrl-C
  interrupts at once. So does the first one while the first step compiles, because there is nothing to save yet.
  In several processes, JAX's distributed service catches SIGTERM, and all agree on the step at which they stop.
  """

  def __init__(self):
    self._noted = False
    self._watches = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Preemption":
    # Only the main thread can set handlers.
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
    """True if the loop should save at this step and leave: the same answer in every process."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    self._watch(signal.SIGINT)  # watched from the end of the first step on
    return self._noted

  def _watch(self, signum: int) -> None:
    if self._watches and signum not in self._previous:
      self._previous[signum] = signal.signal(signum, self._note)

  def _note(self, signum: int, frame) -> None:
    if signum == signal.SIGINT:
      if self._noted:
        handler = self._previous[signum]
        if not callable(handler):
          handler = signal.default_int_handler
        handler(signum, frame)
      errors.note_interrupt("stopping when this step is saved; Ctrl-C again leaves at once")
    self._noted = True
