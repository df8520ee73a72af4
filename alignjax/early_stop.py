"""When a run ends before its last step: its held-out signal has not improved for some evaluations.

What is remembered goes into every checkpoint, so that a continued run ends where it would have; the best step is saved
and stays, and is what the run gives (`result` in the last checkpoint's metadata).
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignjax.errors import InputError


class Metric(NamedTuple):
  """A metric of the evaluations, and which of its values is the best: "max" or "min"."""

  name: str
  mode: str


def start(early_stop: str, patience: int, keep_best: str, evaluates: bool) -> "Watch | None":
  """The watch of a run's config before its first evaluation; None where it has none.

  Raises:
    InputError: nothing is evaluated while it trains, or another metric's best is to be kept.
  """
  if not (watched := metric("run.early_stop", early_stop)):
    return None
  if not evaluates:
    raise InputError(f"run.early_stop={early_stop}: set run.eval_every, and data.eval or data.holdout")
  if keep_best not in ("", early_stop):
    raise InputError(f"run.early_stop={early_stop} keeps the best by this metric; leave run.keep_best empty")
  return Watch(watched, patience)


def metric(key: str, spec: str) -> Metric | None:
  """ "eval/loss:min", which the config's `key` holds, as a Metric; None for "".

  Raises:
    InputError: it has no such form.
  """
  if not spec:
    return None
  name, _, mode = spec.rpartition(":")
  if not name or mode not in ("min", "max"):
    raise InputError(f"{key}={spec!r}: write METRIC:min or METRIC:max, e.g. eval/loss:min")
  return Metric(name, mode)


def check(key: str, watched: Metric, evaluate: Callable[[int | None], Mapping[str, float]]) -> None:
  """Raises InputError where the evaluations of a run lack the metric that the config's `key` holds.

  Args:
    key: "run.keep_best" or "run.early_stop".
    watched: the metric.
    evaluate: an evaluation of so many batches, of all for None. One batch is asked first, to know before a long
      training; it may lack what only some records have, so where it does all are.
  """
  if watched.name in evaluate(1) or watched.name in (evaluation := evaluate(None)):
    return
  near = difflib.get_close_matches(watched.name, list(evaluation), n=1)
  nearest = f"; the nearest is {near[0]}" if near else ""
  raise InputError(
    f"{key}={':'.join(watched)}: evaluations have no {watched.name}; they have {', '.join(sorted(evaluation))}{nearest}"
  )


class Watch(NamedTuple):
  """What the evaluations so far have shown.

  Attributes:
    metric: that is watched.
    patience: evaluations in a row without an improvement that end the run.
    best: the best value; None before the first that is finite.
    step: of `best`, the newest of equals.
    waited: evaluations since the last improvement.
  """

  metric: Metric
  patience: int
  best: float | None = None
  step: int = 0
  waited: int = 0

  def after(self, step: int, evaluation: Mapping[str, float]) -> "Watch":
    """With an evaluation more: an equal value is the best now, but no improvement; nor is one that is not finite, or
    that is not there, such as a mean of scores where every reward failed (`check` finds a metric that never is).
    """
    value = float(evaluation.get(self.metric.name, math.nan))
    sign = 1 if self.metric.mode == "max" else -1
    if math.isfinite(value) and (self.best is None or sign * value > sign * self.best):
      return self._replace(best=value, step=step, waited=0)
    # Of equals the checkpoints keep the newest.
    return self._replace(step=step if value == self.best else self.step, waited=self.waited + 1)

  @property
  def over(self) -> bool:
    """Whether the run ends."""
    return self.waited >= self.patience

  def metadata(self, ended: bool) -> dict[str, Any]:
    """What a checkpoint records: "watch", which `recall` takes, and of a run that has ended the step it gives."""
    state = {"metric": list(self.metric), "best": self.best, "step": self.step, "waited": self.waited}
    return {"watch": state} | ({"result": self.step} if ended and self.best is not None else {})

  def recall(self, record: Mapping[str, Any] | None) -> "Watch":
    """Itself as of a checkpoint; unchanged where that watched nothing, or another metric."""
    if not record or tuple(record["metric"]) != self.metric:
      return self
    return self._replace(**{name: record[name] for name in ("best", "step", "waited")})
