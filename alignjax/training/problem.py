"""The reasons why a run cannot go on: steps that are not finite, or from which nothing can be learned."""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from alignjax.algorithms.policy_update import SIGNAL
from alignjax.data.loader import Dataset
from alignjax.types import Mean

RecordIds = tuple[int, np.ndarray]  # a step, and the records of its batch; below 0: none


def not_finite(
  step: int,
  metrics: Mapping[str, float],
  recent: Iterable[RecordIds],
  dataset: Dataset,
  hparams: Mapping[str, float],
) -> str:
  """Says in one line why a run ends whose last steps, up to `step`, all had a loss or gradient that was not finite.

  No parameter moved in them, so the cause is what they share: the parameters, the settings, or records that are in
  every one of these batches. Other records are not named, because steps with them were finite elsewhere. Nor are the
  records of a single batch that several optimizer steps took.

  Args:
    step: the last one.
    metrics: of that step, with "loss", "grad_norm" and "skipped_in_a_row".
    recent: of the last steps, at least one of those that were not finite.
    dataset: says where a record is.
    hparams: the settings to look at.
  """
  count = int(metrics["skipped_in_a_row"])
  optimizer_steps = metrics.get("passes/steps", 1)  # of a step of the run
  steps = math.ceil(count / optimizer_steps)
  batches = [{int(i) for i in np.ravel(ids) if i >= 0} for number, ids in recent if step - steps < number <= step]
  suspects = sorted(set.intersection(*batches))
  line = (
    f"loss {metrics['loss']:.4g} and gradient norm {metrics['grad_norm']:.4g} were not finite for {count} steps in a "
    f"row (to step {step})"
  )
  if suspects and len(batches) > 1 and len(suspects) < len(dataset):
    places = ", ".join(dataset.where(record) for record in suspects[:8])
    if len(suspects) > 8:
      places += f" and {len(suspects) - 8} more"
    return f"{line}; in all of their batches were {places}: look at these records"
  settings = ", ".join(f"{name}={value:g}" for name, value in sorted(hparams.items()))
  why = "all were on one batch"
  if len(batches) > 1:
    why = "no single record is in all of their batches"
  remedy = f"lower optimizer.learning_rate, set optimizer.clip_norm, or change the settings ({settings})"
  if count == step * optimizer_steps:
    remedy = f"none was finite before, so look at the settings ({settings}) and at what the run began with (run.init)"
  return f"{line}; {why}: {remedy}"


def without_signal(metrics: Mapping[str, float | Mean]) -> bool:
  """Returns True if a step had nothing to learn from.

  Its gradient is 0, or its rewards prefer no completion to another.

  Args:
    metrics: of a step, before `Algorithm.finish`.
  """
  return metrics["grad_norm"] == 0 or metrics.get(SIGNAL, 1.0) == 0
