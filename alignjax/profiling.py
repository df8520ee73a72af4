"""A trace of some steps of a run, for XProf, TensorBoard or Perfetto."""

import jax
from etils import epath

WARM_UP = 3  # steps that are not traced: they compile and fill the input's buffers


class Trace:
  """Traces `steps` steps of a process, behind the first few, into a folder; none if `steps` is 0.

  Args:
    folder: where the trace is written.
    steps: how many.
    start: the step before the first.
  """

  def __init__(self, folder: epath.Path, steps: int, start: int):
    self._folder, self._first, self._end = folder, start + WARM_UP + 1, start + WARM_UP + 1 + steps
    self._running = False

  def before(self, step: int) -> None:
    """Begins or ends the trace where it is time to."""
    if self._first <= step < self._end and not self._running:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    elif step >= self._end:
      self.close()

  def close(self) -> None:
    """Ends the trace, if there is one, and says where it lies."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      print(f"profile: {self._folder}", flush=True)
