"""What a run that goes on otherwise than it began says of its later numbers."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from alignjax.runs.config import Config
from alignjax.training.optim import make_schedule

# Of what may change where a run goes on, what takes sums in another order, and moves later numbers by rounding alone.
REORDERING = ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "optimizer.microbatches", "optimizer.offload")


def continued(old: Mapping[str, Mapping[str, Any]], config: Config, step: int) -> Iterator[str]:
  """What people should know where a run goes on after `step` with another config than its checkpoint's, `old`."""
  new = config.to_dict()

  def value(sections, key):
    return sections.get(key.split(".")[0], {}).get(key.split(".")[1])

  changed = [key for key in REORDERING if old and value(old, key) != value(new, key)]
  if changed:
    said = ", ".join(f"{key} {value(old, key)} -> {value(new, key)}" for key in changed)
    yield f"goes on from step {step} with {said}: sums are taken in another order, so later numbers differ by rounding"
  before, now = value(old, "run.steps"), config.run.steps
  c = config.optimizer
  if not before or before == now or step >= now or c.schedule == "constant" or c.final_scale == 1:
    return

  def rate(steps, number):
    return c.learning_rate * float(make_schedule(c, steps)(jnp.float32(number - 1)))

  last = f"{rate(before, step):.3g} at step {step}"
  would = f", where it would have been {rate(before, step + 1):.3g}" if step < before else ""
  yield (
    f"run.steps {before} -> {now}: the {c.schedule} schedule now ends at step {now}; the learning rate was {last} and "
    f"is {rate(now, step + 1):.3g} at step {step + 1}{would}"
  )
