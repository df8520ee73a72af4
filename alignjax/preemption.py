"""Leaving in good order when the job is told to stop."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
  """Whether the job was told to stop: a context manager around the loop, which asks at each step.

  In one process, SIGTERM or Ctrl-C is noted, and the loop gets to save and leave; a second Ctrl-C
  interrupts at once. In several, JAX's distributed service catches SIGTERM and makes all of them
  agree on the step at which they stop.
  """

  def __init__(self):
    self._noted = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Preemption":
    # Signals reach the main thread alone: in another one the process's own handlers stay.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *_) -> None:
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)
    self._previous = {}

  def requested(self, step: int) -> bool:
    """Whether to save at this step and leave: the same answer in every process."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._noted

  def _note(self, signum: int, _) -> None:
    if self._noted and signum == signal.SIGINT:
      raise KeyboardInterrupt
    self._noted = True
