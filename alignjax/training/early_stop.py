"""Ends a run before its last step: if a held-out metric has not improved for some evaluations (`Watch`), or if its
steps have nothing to learn from (`Signal`).

Both go into every checkpoint, so that a continued run ends at the same step. The best step is saved and kept, and is
the result of the run (`result` in the last checkpoint's metadata).
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from alignjax.errors import InputError

MODES: tuple[Literal["max", "min"], ...] = ("max", "min")


class Metric(NamedTuple):
  """A metric of the evaluations, and which of its values is best.

  Attributes:
    name: as in metrics.jsonl, such as "eval/loss".
    mode: "max" or "min".
  """

  name: str
  mode: Literal["max", "min"]


def start(early_stop: str, patience: int, keep_best: str, evaluates: bool) -> "Watch | None":
  """Returns the watch that a run's config asks for, before the first evaluation; None if it asks for none.

  Args:
    early_stop: run.early_stop, "METRIC:max" or "METRIC:min"; "": no watch.
    patience: run.patience.
    keep_best: run.keep_best; "" or the same as `early_stop`.
    evaluates: True if the run evaluates during training.

  Raises:
    InputError: `early_stop` has another form, nothing is evaluated during training, or `keep_best` names another
      metric.
  """
  if not (watched := metric("run.early_stop", early_stop)):
    return None
  if not evaluates:
    raise InputError(f"run.early_stop={early_stop}: set run.eval_every, and data.eval or data.holdout")
  if keep_best not in ("", early_stop):
    raise InputError(f"run.early_stop={early_stop} keeps the best by this metric; leave run.keep_best empty")
  return Watch(watched, patience)


def metric(key: str, spec: str) -> Metric | None:
  """Parses the value of the config's `key`, such as "eval/loss:min"; None for "".

  Args:
    key: for the error message.
    spec: the value.

  Raises:
    InputError: it has another form.
  """
  if not spec:
    return None
  name, _, mode = spec.rpartition(":")
  for known in MODES:
    if name and mode == known:
      return Metric(name, known)
  raise InputError(f"{key}={spec!r}: write METRIC:min or METRIC:max, e.g. eval/loss:min")


def kept(keep_best: str, early_stop: str) -> Metric | None:
  """Returns the metric whose best step stays in the checkpoints; None if no run setting names one.

  Args:
    keep_best: run.keep_best.
    early_stop: run.early_stop.

  Raises:
    InputError: as `metric`.
  """
  return metric("run.keep_best", keep_best) or metric("run.early_stop", early_stop)


def check(key: str, watched: Metric, evaluate: Callable[[int | None], Mapping[str, float]]) -> None:
  """Raises InputError if the evaluations of a run lack the metric that the config's `key` names.

  Args:
    key: "run.keep_best" or "run.early_stop".
    watched: the metric.
    evaluate: evaluates this many batches, or all for None. One batch is evaluated first, so that the error comes before
      a long training. It may lack a metric that only some records have; if it does, all batches are evaluated.
  """
  if watched.name in evaluate(1):
    return
  evaluation = evaluate(None)
  if watched.name in evaluation:
    return
  nearest = ""
  for near in difflib.get_close_matches(watched.name, list(evaluation), n=1):
    nearest = f"; the nearest is {near}"
  raise InputError(
    f"{key}={':'.join(watched)}: evaluations have no {watched.name}; they have {', '.join(sorted(evaluation))}{nearest}"
  )


class Watch(NamedTuple):
  """The best evaluation so far, and how long ago it was.

  Attributes:
    metric: the watched metric.
    patience: evaluations in a row without an improvement that end the run.
    best: the best value; None before the first finite one.
    step: of `best`; if several steps have this value, the newest of them.
    waited: evaluations since the last improvement.
  """

  metric: Metric
  patience: int
  best: float | None = None
  step: int = 0
  waited: int = 0

  def after(self, step: int, evaluation: Mapping[str, float]) -> "Watch":
    """Returns the watch after one more evaluation.

    A value equal to the best is the new best step, but no improvement. A value that is not finite or missing is no
    improvement either: a mean of scores is missing if every reward failed (`check` finds a metric that is never there).

    Args:
      step: of the evaluation.
      evaluation: its metrics by name.
    """
    value = float(evaluation.get(self.metric.name, math.nan))
    sign = {"max": 1, "min": -1}[self.metric.mode]
    if math.isfinite(value) and (self.best is None or sign * value > sign * self.best):
      return self._replace(best=value, step=step, waited=0)
    waited = self._replace(waited=self.waited + 1)
    if value == self.best:
      return waited._replace(step=step)  # of equal values, the checkpoints keep the newest
    return waited

  @property
  def over(self) -> bool:
    """True if the run ends."""
    return self.waited >= self.patience

  def metadata(self, ended: bool) -> dict[str, Any]:
    """Makes the entries of a checkpoint's metadata: "watch", which `recall` reads, and "result" if the run has `ended`.

    There is no "result" without a finite value so far.
    """
    state = {"metric": list(self.metric), "best": self.best, "step": self.step, "waited": self.waited}
    metadata: dict[str, Any] = {"watch": state}
    if ended and self.best is not None:
      metadata["result"] = self.step
    return metadata

  def recall(self, record: Mapping[str, Any] | None) -> "Watch":
    """Returns the watch that a checkpoint recorded; itself if that has no record, or one of another metric."""
    if not record or tuple(record["metric"]) != self.metric:
      return self
    return self._replace(**{name: record[name] for name in ("best", "step", "waited")})


class Signal(NamedTuple):
  """The record of how lately a run's steps had something to learn from.

  Attributes:
    idle: number of the last steps in a row that had nothing to learn from.
    learned: True if any step had something to learn from.
  """

  idle: int = 0
  learned: bool = False

  def after(self, silent: bool) -> "Signal":
    """Returns the signal after one more step, which had nothing to learn from if `silent`."""
    if silent:
      return Signal(self.idle + 1, self.learned)
    return Signal(0, True)

  def lost(self, most: int, scored: bool = True) -> bool:
    """Returns True if the run ends: after `most` idle steps, unless it has learned before.

    A run that has learned may have nothing more to learn.

    Args:
      most: the idle steps in a row that end the run.
      scored: False if no completion has a score: the rewards are broken, and the run ends even if it has learned
        before.
    """
    return self.idle >= most and not (self.learned and scored)

  def moved(self, steps: int) -> bool:
    """Returns True if any of the last `steps` steps had something to learn from."""
    return steps > self.idle

  def metadata(self) -> dict[str, Any]:
    """Makes the entries of a checkpoint's metadata, which `recall` reads."""
    return self._asdict()

  @classmethod
  def recall(cls, saved: Mapping[str, Any]) -> "Signal":
    """Returns the signal of a checkpoint's metadata; an earlier version recorded none, and counts as having learned."""
    return cls(saved.get("idle", 0), saved.get("learned", True))

  def problem(self, step: int, metrics: Mapping[str, float], online: bool) -> str:
    """Says in one line why the last steps, up to `step`, had nothing to learn from, and the remedy.

    Args:
      step: the last step.
      metrics: of that step, with "loss"; of an online run also "objective/scores" (absent: no score) and
        "rewards/failed".
      online: True if the run samples its completions.
    """
    if not online:
      why = (
        f"loss {metrics['loss']:g} has no gradient; see that records weigh more than 0, and that the loss has not met "
        "its bound everywhere (as hinge can)"
      )
    elif "objective/scores" not in metrics:
      failed = metrics.get("rewards/failed", 0.0)
      why = (
        f"no completion has a score ({failed:.0%} failed, to the others no reward applies); look at algorithm.rewards, "
        "and at the fields that they read"
      )
    else:
      why = (
        "no completion that is learned from is better than another (the mean score is "
        f"{metrics['objective/scores']:g}); take prompts that the policy sometimes solves, more "
        "algorithm.num_generations, or another reward"
      )
    return f"nothing to learn from in {self.idle} steps in a row (to step {step}): {why}; or raise run.max_skipped"
