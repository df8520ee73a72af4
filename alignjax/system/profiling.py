"""The use of time: a trace of some steps for XProf, TensorBoard or Perfetto, and the count of compilations."""

import jax
from etils import epath

WARM_UP = 3  # steps that are not traced, because they compile and fill the input's buffers


class Trace:
  """Traces `steps` steps of a process after its first `WARM_UP`; none if `steps` is 0.

  Args:
    folder: the folder of the trace.
    steps: the number of traced steps.
    start: the step before the first step of this process.
  """

  def __init__(self, folder: epath.Path, steps: int, start: int):
    self._folder = folder
    self._first = start + WARM_UP + 1
    self._end = self._first + steps
    self._running = False

  def before(self, step: int) -> None:
    """Begins or ends the trace if `step` is its first, or after its last."""
    if self._first <= step < self._end and not self._running:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    elif step >= self._end:
      self.close()

  def close(self) -> None:
    """Ends the trace, if there is one, and prints its folder."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      print(f"profile: {self._folder}", flush=True)


class Compiles:
  """Counts the programs that this process compiles from now on, or loads from the persistent cache.

  Attributes:
    programs: their number; a run with constant shapes compiles none after its first step and evaluation.
    seconds: the time for all of them.
  """

  def __init__(self):
    self.programs = 0
    self.seconds = 0.0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      self.programs += 1
      self.seconds += duration_secs

  def close(self) -> None:
    """Stops counting."""
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def record(self) -> dict[str, float]:
    """Returns both numbers for a log."""
    return {"programs_compiled": self.programs, "compile_seconds": round(self.seconds, 3)}
