"""Reports a run while it trains: files for machines, one line for people.

`metrics.jsonl` holds the numbers that the run determines. After any number of kills it is byte for byte that of an
uninterrupted run, because it is cut back to the checkpoint that the run continues from. Numbers that depend on the
clock go to `timing.jsonl`.
"""

import collections
import contextlib
import functools
import importlib
import json
import math
import os
import re
import secrets
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import jax
from etils import epath

from alignjax.data.loader import Dataset
from alignjax.errors import InputError
from alignjax.system import output, reading


class Logger(NamedTuple):
  """Writes metrics to another place than the files, such as wandb.

  Attributes:
    write: (step, metrics) -> None.
    close: ends the logging; nothing is written afterwards.
  """

  write: Callable[[int, Mapping[str, float]], None]
  close: Callable[[], None]


class MetricWriter:
  """Appends to `metrics.jsonl` and `timing.jsonl` in `workdir`; only the first process writes.

  Args:
    workdir: any path that `etils.epath` reads; made if missing.
    resume_step: lines after this step are dropped, because the run will write them again; 0 begins anew.
    loggers: names in `LOGGERS` that get the metrics too.

  Raises:
    InputError: an unknown logger, or one that is not installed or fails to start; a file in `workdir` that this class
      did not write.
  """

  def __init__(self, workdir: epath.PathLike, *, resume_step: int = 0, loggers: Sequence[str] = ()):
    self._files: dict[str, TextIO] = {}
    self._loggers: dict[str, Logger] = {}
    if jax.process_index() != 0:
      return
    workdir = epath.Path(workdir).expanduser()
    with output.failing(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
    for name in loggers:
      if name not in LOGGERS:
        raise InputError(f"logger {name!r} is not known; choose from {', '.join(LOGGERS)}")
      self._loggers[name] = _begin(name, workdir, resume_step)
    self._workdir = workdir
    for name in ("metrics.jsonl", "timing.jsonl"):
      _cut(workdir / name, resume_step)
      with output.failing(workdir / name):
        self._files[name] = (workdir / name).open("a")

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds a line of metrics to metrics.jsonl, and hands them to the loggers.

    A number that is not finite becomes "nan", "inf" or "-inf", which JSON can hold. A logger that fails gets no more
    metrics, and the run goes on.
    """
    self._append("metrics.jsonl", {"step": step, **metrics})
    for name, logger in list(self._loggers.items()):
      self._log(name, functools.partial(logger.write, step, metrics))

  def write_timing(self, step: int, rates: Mapping[str, float]) -> None:
    """Adds a line of rates to timing.jsonl: they depend on the clock; with the time of day in seconds since 1970."""
    self._append("timing.jsonl", {"step": step, "time": round(time.time(), 3), **rates})

  def flush(self) -> None:
    """Puts every line on disk; call it before the checkpoint of their step, else a kill in between would lose them."""
    for name, file in self._files.items():
      with output.failing(self._workdir / name):
        file.flush()
        if hasattr(file, "fileno"):  # a file in a bucket has none
          os.fsync(file.fileno())

  def close(self) -> None:
    """Flushes and closes the files and the loggers."""
    try:
      self.flush()
    finally:
      for file in self._files.values():
        with contextlib.suppress(OSError):  # a full disk: `flush` has reported it
          file.close()
      for name, logger in list(self._loggers.items()):
        self._log(name, logger.close)
      self._files.clear()
      self._loggers.clear()

  def _log(self, name: str, call: Callable[[], None]) -> None:
    """Calls a logger; if that fails, the run continues without it, because metrics.jsonl has everything."""
    try:
      call()
    except Exception as error:  # of another library: a network, a full disk, a server that is gone
      self._loggers.pop(name)
      print(f"logger {name}: {_cause(error)}; it gets no more, metrics.jsonl has everything", file=sys.stderr)

  def _append(self, name: str, row: Mapping[str, Any]) -> None:
    if name in self._files:
      line = json.dumps({key: _plain(value) for key, value in row.items()}) + "\n"
      with output.failing(self._workdir / name):
        self._files[name].write(line)


class Progress:
  """Shows the progress of a stage in one line: step, ETA, tokens/s, loss.

  A terminal shows one line, which is updated in place; any other stream gets a new line every `every_s` seconds.

  Args:
    stage: the first word of the line.
    total: the number of the last step.
    start: the step that the run continues from.
    stream: standard error if None.
    every_s: seconds between two lines if there is no terminal.
    clock: returns seconds.
  """

  def __init__(
    self,
    stage: str,
    total: int,
    *,
    start: int = 0,
    stream: TextIO | None = None,
    every_s: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._stage = stage
    self._total = total
    self._clock = clock
    self._stream = stream or sys.stderr
    self._in_place = self._stream.isatty()
    self._every_s = every_s
    if self._in_place:
      self._every_s = 0.1
    # The first mark is set when the first step ends, so the rates do not include compilation.
    self._marks: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=32)  # time, step, tokens so far
    self._shown_at = -math.inf
    self._line = f"{stage} {start}/{total}  compiling"
    if start < total:
      self._show()

  def update(
    self, step: int, loss: float, tokens: int, seconds: Mapping[str, float] = types.MappingProxyType({})
  ) -> None:
    """Records a finished step, and shows it if a line is due.

    Args:
      step: its number.
      loss: for the line.
      tokens: of this step, without padding.
      seconds: of its parts by name, shown as shares; {}: none are shown.
    """
    tokens_so_far = tokens
    if self._marks:
      tokens_so_far += self._marks[-1][2]
    self._marks.append((self._clock(), step, tokens_so_far))
    rates = self.rates()
    parts = [f"{self._stage} {step}/{self._total}", f"{step / self._total:.0%}"]
    if rates:
      parts.append(f"ETA {_duration((self._total - step) * rates['seconds_per_step'])}")
      parts.append(f"{_short(rates['tokens_per_s'])} tokens/s")
    if rates and seconds:
      parts.append(" ".join(f"{name} {part / sum(seconds.values()):.0%}" for name, part in seconds.items()))
    self._line = "  ".join([*parts, f"loss {loss:.4f}"])
    if step == self._total or len(self._marks) == 1 or self._clock() - self._shown_at >= self._every_s:
      self._show()

  def rates(self) -> dict[str, float]:
    """Computes {"seconds_per_step", "tokens_per_s"} over the last (up to 32) steps; {} before the second step."""
    if len(self._marks) < 2:
      return {}
    first_time, first_step, first_tokens = self._marks[0]
    last_time, last_step, last_tokens = self._marks[-1]
    seconds = max(last_time - first_time, 1e-9)
    return {
      "seconds_per_step": seconds / (last_step - first_step),
      "tokens_per_s": (last_tokens - first_tokens) / seconds,
    }

  def note(self, step: int, values: Mapping[str, float]) -> None:
    """Prints a line of values that stays, such as an evaluation's.

    The time since the last step does not count in the rates.
    """
    if self._marks:
      pause = self._clock() - self._marks[-1][0]
      self._marks = collections.deque(((then + pause, s, n) for then, s, n in self._marks), self._marks.maxlen)
    self.say(step, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))

  def say(self, step: int, text: str) -> None:
    """Prints a line that stays: the stage, the step and this text."""
    self._print(f"{self._stage} {step}/{self._total}  {text}\n")
    self._shown_at = -math.inf

  def close(self) -> None:
    """Leaves the last line in place."""
    if self._in_place:
      self._print(self._line + "\n")

  def _show(self) -> None:
    self._shown_at = self._clock()
    if self._in_place:
      self._print(self._line)
    else:
      self._print(self._line + "\n")

  def _print(self, text: str) -> None:
    if jax.process_index() != 0:
      return
    if self._in_place:
      text = f"\r\x1b[K{text}"
    self._stream.write(text)
    self._stream.flush()


def read(path: epath.PathLike) -> list[dict[str, Any]]:
  """Reads the rows of a metrics or timing file, without a last line that is still being written.

  Raises:
    InputError: it is no text file, or a line is not a JSON object with an integer "step".
    OSError: it cannot be read.
  """
  path = epath.Path(path).expanduser()
  return [_row(line, f"{path}:{number}") for number, line in enumerate(_lines(path), 1)]


def evaluations(workdir: epath.Path) -> list[dict[str, Any]]:
  """Reads those rows of a run's metrics that an evaluation wrote, in the first process; [] in the others.

  Only the first process says something about them. Errors are those of `read`.
  """
  if jax.process_index() != 0:
    return []
  return [row for row in read(workdir / "metrics.jsonl") if any(name.startswith("eval/") for name in row)]


def forward_flops_per_token(weights: int, layers: int, heads: int, head_dim: int, attended: float) -> float:
  """Computes the floating-point operations of one token's forward pass; a training step costs three times that.

  The backward pass costs two of the three.

  Args:
    weights: entries of the matrices that a token is multiplied with: with the unembedding, without the embedding table.
    layers, heads, head_dim: of the model.
    attended: positions that a token attends to, on average: (T + 1) / 2 for a causal row of T.

  Source: Chowdhery et al. 2022, appendix B (arXiv:2204.02311), where `attended` is T.
  """
  return 2 * weights + 4 * layers * heads * head_dim * attended


def mfu(flops_per_token: float, tokens_per_s: float, peak: float) -> float:
  """Computes the model FLOPs utilisation: the model's own operations as a share of the peak, in [0, 1].

  Args:
    flops_per_token: of the whole step, forward and backward.
    tokens_per_s: of all devices together.
    peak: FLOP/s of the same devices.
  """
  return flops_per_token * tokens_per_s / peak


def _cut(path: epath.Path, step: int) -> None:
  """Keeps the lines up to `step` (none at 0), in one rename."""
  if not path.exists():
    return
  lines = []
  if step:
    lines = _lines(path)
  kept = [line for number, line in enumerate(lines, 1) if _row(line, f"{path}:{number}")["step"] <= step]
  output.write(path, "".join(f"{line}\n" for line in kept))


def _lines(path: epath.Path) -> list[str]:
  return reading.read_text(path).split("\n")[:-1]  # after the last newline is a part of a line, or nothing


def _row(line: str, where: str) -> dict[str, Any]:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise InputError(f"{where}: not JSON ({error}); remove this line") from error
  if not isinstance(row, dict) or not isinstance(row.get("step"), int):
    raise InputError(f'{where}: not an object with an integer "step"; remove this line')
  return row


def _plain(value: Any) -> int | float | str:
  """Returns the number as JSON can hold it: one that is not finite as a string."""
  if not isinstance(value, int):
    value = float(value)
  if not math.isfinite(value):
    return repr(value)
  return value


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}"


def _short(number: float) -> str:
  for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if number >= size:
      return f"{number / size:.3g}{letter}"
  return f"{number:.3g}"


def _begin(name: str, workdir: epath.Path, resume_step: int) -> Logger:
  try:
    return LOGGERS[name](workdir, resume_step)
  except InputError:
    raise
  except Exception as error:  # of another library: no login, no network, a version with another interface
    raise InputError(
      f"run.loggers={name}: does not begin: {_cause(error)}; see to it, or leave it out of run.loggers"
    ) from error


def _cause(error: Exception) -> str:
  """Returns an error in one line."""
  text = " ".join(str(error).split())
  if not text:
    return type(error).__name__
  return f"{type(error).__name__}: {text[:300]}"


def check_loggers(loggers: str) -> None:
  """Raises InputError if one of the loggers, such as "wandb,mlflow", is not installed; only process 0 checks.

  Args:
    loggers: names in `LOGGERS`, separated by commas; "": none.
  """
  for name in filter(None, loggers.split(",")):
    if jax.process_index() == 0:
      _package(name)


def _package(logger: str) -> Any:
  """Imports the package of a logger.

  Raises:
    InputError: it is not installed, or cannot be imported.
  """
  name = PACKAGES[logger]
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise InputError(
      f"run.loggers={logger}: {name} cannot be imported ({error}); pip install 'alignjax[{logger}]'"
    ) from error


def _identity(workdir: epath.Path, logger: str, resume_step: int, make: Callable[[], str]) -> str:
  """Gives a run its id for a logger, kept in the run directory: a continued run has the same, a new run another."""
  file = workdir / f"{logger}_id"
  if not resume_step or not file.exists():
    output.write(file, make())
  return reading.read_text(file)


def _tensorboard(workdir: epath.Path, resume_step: int) -> Logger:
  purge_step = None
  if resume_step:
    purge_step = resume_step + 1
  writer = _package("tensorboard").SummaryWriter(str(workdir / "tensorboard"), purge_step=purge_step)

  def write(step, metrics):
    for name, value in metrics.items():
      writer.add_scalar(name, value, step)

  return Logger(write, writer.close)


def _wandb(workdir: epath.Path, resume_step: int) -> Logger:
  wandb = _package("wandb")
  name = _identity(workdir, "wandb", resume_step, lambda: secrets.token_hex(4))
  run = wandb.init(project="alignjax", dir=str(workdir), id=name, resume="allow")
  return Logger(lambda step, metrics: run.log(dict(metrics), step=step), run.finish)


def _trackio(workdir: epath.Path, resume_step: int) -> Logger:
  trackio = _package("trackio")
  name = _identity(workdir, "trackio", resume_step, lambda: f"{workdir.name}-{secrets.token_hex(4)}")
  run = trackio.init(project="alignjax", name=name, resume="allow", embed=False)
  return Logger(lambda step, metrics: run.log(dict(metrics), step=step), run.finish)


def _mlflow(workdir: epath.Path, resume_step: int) -> Logger:
  """Logs to MLFLOW_TRACKING_URI, or to a database in the run directory."""
  mlflow = _package("mlflow")
  client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workdir / 'mlflow.db'}")

  def begin() -> str:
    experiment = client.get_experiment_by_name("alignjax")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("alignjax")
    return client.create_run(experiment_id, run_name=workdir.name).info.run_id

  run = _identity(workdir, "mlflow", resume_step, begin)
  client.update_run(run, status="RUNNING")
  # mlflow keeps every value of a step: values that a killed run logged after its checkpoint are not logged again.
  known = client.get_run(run).data.metrics
  last = {key: max(metric.step for metric in client.get_metric_history(run, key)) for key in known}

  def write(step, metrics):
    now = int(time.time() * 1000)
    values = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in metrics.items()}
    fresh = {key: value for key, value in values.items() if step > last.get(key, -1)}
    client.log_batch(run, [mlflow.entities.Metric(key, float(value), now, step) for key, value in fresh.items()])

  return Logger(write, lambda: client.set_terminated(run))


PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
LOGGERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}


def data_metrics(dataset: Dataset) -> dict[str, float]:
  """Computes the metrics of what the data set lost and wastes, for the run's first line of metrics.

  Returns {"data/dropped/REASON", "data/examples", "data/cut", "data/padding_share"}.
  """
  report = dataset.report
  dropped = {f"data/dropped/{reason}": float(count) for reason, count in report["dropped"].items()}
  counts = {f"data/{name}": float(report[name]) for name in ("examples", "cut", "padding_share")}
  return counts | dropped
