"""The runs that one call of training leaves: a run alone, or each member of a program."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from alignjax.errors import InputError
from alignjax.runs import workdir
from alignjax.runs.build import with_sizes
from alignjax.runs.checkpoint import save_single
from alignjax.runs.config import Config
from alignjax.training.loop import Loop
from alignjax.types import HParams, TrainState


def check(configs: Sequence[Config]) -> None:
  """Raises InputError if runs ask for what members of one program cannot have."""
  run, init = configs[0].run, configs[0].lora.init
  if init and len({config.lora.seed for config in configs}) > 1:
    raise InputError(f"lora.seed: draws factors, but lora.init={init} brings them; sweep another key")
  for logger in ("wandb", "trackio"):
    if logger in run.loggers.split(","):
      raise InputError(
        f"run.loggers={logger}: it takes one run of a process; leave it out of a sweep, or use tensorboard or mlflow"
      )
  if run.early_stop:
    raise InputError(f"run.early_stop={run.early_stop}: a sweep's members end together; leave it empty")
  if configs[0].optimizer.offload:
    raise InputError("optimizer.offload: a sweep's members keep their few moments on the device; leave it False")


def as_begun(configs: Sequence[Config], directories: Sequence[epath.Path]) -> tuple[list[Config], list[str]]:
  """Returns the configs with their models' sizes and the defaults that they began with; and lines about what changed.

  Args:
    configs: of the runs.
    directories: of the runs.

  Raises:
    InputError: as `workdir.as_begun`.
  """
  begun = []
  lines: dict[str, None] = {}  # each once: members differ in little
  for config, directory in zip(configs, directories, strict=True):
    config, kept = workdir.as_begun(directory, with_sizes(config, directory))
    begun.append(config)
    lines |= dict.fromkeys(kept)
  return begun, list(lines)


def write_configs(directories: Sequence[epath.Path], configs: Sequence[Config]) -> None:
  """Writes the config of each run to its directory; call it after all checks of the input."""
  for directory, config in zip(directories, configs, strict=True):
    workdir.write_config(directory, config)


def seeds(configs: Sequence[Config]) -> tuple[int | None, ...]:
  """Returns the seeds by which members draw their factors; None where these are those of an adapter (lora.init)."""
  return tuple(None if config.lora.init else config.lora.seed for config in configs)


def mean_loss(metrics: Sequence[Mapping[str, float]], name: str = "loss") -> float:
  """Returns the mean over the runs whose number is finite; of all, if none is."""
  losses = [own[name] for own in metrics]
  finite = [loss for loss in losses if math.isfinite(loss)] or losses
  return sum(finite) / len(finite)


def summary(evaluation: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
  """Returns what the progress line shows of an evaluation: all of a run alone, the mean loss of members."""
  if len(evaluation) == 1:
    return evaluation[0]
  return {"eval/loss, mean": mean_loss(evaluation, "eval/loss")}


def save(
  directories: Sequence[epath.Path],
  configs: Sequence[Config],
  program: Loop,
  state: TrainState,
  hparams: HParams,
  metadata: dict[str, Any],
) -> None:
  """Writes the checkpoint of every member's run, which is then a run as any other.

  Args:
    directories, configs: of the members.
    program: that trained them.
    state, hparams: of them all.
    metadata: of the checkpoint that they share, with the "step".

  Raises:
    InputError: as `save_single`.
  """
  for directory, config, (member, its_hparams) in zip(
    directories, configs, program.each((state, hparams)), strict=True
  ):
    placed = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), member, program.learner.state)
    save_single(directory / "checkpoints", placed, its_hparams, metadata | {"config": config.to_dict()})
