"""Lines for people about a run: what its data and its model are, and how later numbers differ where it continues."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from alignjax.data.loader import Dataset
from alignjax.model import ModelConfig
from alignjax.runs.build import longest_row
from alignjax.runs.config import Config
from alignjax.training.optim import OptimizerConfig, make_schedule

# Keys that may change when a run continues, and that change the order of sums: later numbers differ by rounding alone.
REORDERING = ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "optimizer.microbatches", "optimizer.offload")

Sections = Mapping[str, Mapping[str, Any]]


def known_at_start(config: Config, given: ModelConfig, *datasets: Dataset | None) -> Iterator[str]:
  """Yields lines about a run's data, and about its model if that is not as people gave it.

  Args:
    config: of the run.
    given: the model of the config as it was given, without the sizes that run.init brings.
    datasets: those that are trained on, and those that are held out or None.
  """
  for dataset in filter(None, datasets):
    yield from dataset.report_lines()
  if config.run.keep_best and datasets[1] is None:
    yield f"run.keep_best={config.run.keep_best}: no best is kept, for nothing is held out (data.eval, data.holdout)"
  if config.model != given:
    yield f"model: the sizes of run.init={config.run.init}, not those of the config"
  longest = longest_row(config)
  if 0 < config.model.max_positions < longest:
    yield f"model: made for texts of {config.model.max_positions} tokens; rows have up to {longest}"


def continued(saved: Mapping[str, Any], config: Config, files: Mapping[str, Any], step: int) -> Iterator[str]:
  """Yields lines for people about a run that continues after `step` with another config than its checkpoint's.

  Args:
    saved: the checkpoint's metadata, with its config by section, which an earlier version did not store.
    config: of the command that continues the run.
    files: digests of the files behind the run as they are now.
    step: of the checkpoint.
  """
  losses = files.get("losses", {})
  edited = [name for name, digest in saved.get("losses", {}).items() if losses.get(name) != digest]
  if edited:
    yield f"goes on from step {step} with another {', '.join(edited)}: its file has changed since"
  old = saved.get("config", {})
  if not old:
    return
  new = config.to_dict()
  changes = [
    f"{key} {_value(old, key)} -> {_value(new, key)}" for key in REORDERING if _value(old, key) != _value(new, key)
  ]
  if changes:
    yield (
      f"goes on from step {step} with {', '.join(changes)}: sums are taken in another order, so later numbers differ "
      "by rounding"
    )
  yield from _stretched(_value(old, "run.steps"), config, step)


def _stretched(before: int | None, config: Config, step: int) -> Iterator[str]:
  """Yields a line if the schedule now ends at another step than `before`, with the learning rates around `step`."""
  now = config.run.steps
  optimizer = config.optimizer
  if not before or before == now or step >= now or optimizer.schedule == "constant" or optimizer.final_scale == 1:
    return
  planned = ""
  if step < before:
    planned = f", where it would have been {_rate(optimizer, before, step + 1):.3g}"
  yield (
    f"run.steps {before} -> {now}: the {optimizer.schedule} schedule now ends at step {now}; the learning rate was "
    f"{_rate(optimizer, before, step):.3g} at step {step} and is {_rate(optimizer, now, step + 1):.3g} at step "
    f"{step + 1}{planned}"
  )


def _value(sections: Sections, dotted: str) -> Any:
  """Returns the value of a dotted key; None if the sections lack it."""
  section, key = dotted.split(".")
  return sections.get(section, {}).get(key)


def _rate(optimizer: OptimizerConfig, steps: int, number: int) -> float:
  """Returns the learning rate of step `number`, from 1, in a run of `steps` steps."""
  return optimizer.learning_rate * float(make_schedule(optimizer, steps)(jnp.float32(number - 1)))
