"""Where time goes: a trace of some steps for XProf, TensorBoard or Perfetto, and what is compiled."""

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


class Compiles:
  """What this process compiles from now on, or takes ready from the persistent cache.

  Attributes:
    programs: how many; a run whose shapes stay the same compiles none after its first step and evaluation.
    seconds: for all of them.
  """

  def __init__(self):
    self.programs, self.seconds = 0, 0.0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, seconds: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      self.programs += 1
      self.seconds += seconds

  def close(self) -> None:
    """Stops counting."""
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def record(self) -> dict[str, float]:
    """The two as numbers of a log."""
    return {"programs_compiled": self.programs, "compile_seconds": round(self.seconds, 3)}
