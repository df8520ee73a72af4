"""When a run ends before its last step: its held-out signal has not improved for some evaluations (`Watch`), or its
steps have nothing to learn from (`Signal`).

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


class Signal(NamedTuple):
  """What the steps so far could learn from.

  Attributes:
    idle: the last steps in a row that had nothing to learn from.
    learned: whether any step had something.
  """

  idle: int = 0
  learned: bool = False

  def after(self, silent: bool) -> "Signal":
    """With a step more, which had nothing to learn from if `silent`."""
    return Signal(self.idle + 1, self.learned) if silent else Signal(0, True)

  def lost(self, most: int, scored: bool = True) -> bool:
    """Whether the run ends: after `most` idle steps, unless it has learned, and may have come to where there is no more
    to learn; rewards without a score (not `scored`) are broken even then.
    """
    return self.idle >= most and not (self.learned and scored)

  def moved(self, steps: int) -> bool:
    """Whether any of the last `steps` steps had something to learn from."""
    return steps > self.idle

  def metadata(self) -> dict[str, Any]:
    """What a checkpoint records, which `recall` takes."""
    return self._asdict()

  @classmethod
  def recall(cls, saved: Mapping[str, Any]) -> "Signal":
    """Itself as of a checkpoint's metadata; of an earlier version, which recorded nothing, it has learned."""
    return cls(saved.get("idle", 0), saved.get("learned", True))

  def problem(self, step: int, metrics: Mapping[str, float], online: bool) -> str:
    """Why the last steps, to `step`, had nothing to learn from, by the metrics of the last one, and the remedy."""
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
