"""The held-out numbers of a run: those of a checkpoint, and the means that training computes at its evaluations."""

import dataclasses
import json
import operator
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from alignjax.algorithms import rollout
from alignjax.data.loader import Dataset
from alignjax.errors import check_path
from alignjax.evaluation import preference
from alignjax.runs.build import make_algorithm, open_host_scorer, records_of, samples, sampling_of
from alignjax.runs.run import beside_params, load, rows_of
from alignjax.runs.trust import check_code, permitted, trusting
from alignjax.system import sharding
from alignjax.training.loop import make_score
from alignjax.types import Metrics


def evaluate(
  workdir: epath.PathLike, data: str = "", step: int | None = None, *, trust_code: bool | Collection[str] = False
) -> dict[str, Any]:
  """Computes held-out numbers of a run's checkpoint.

  For a reward model of pairs these are accuracy with its interval, and calibration; for other runs, the means of loss
  and metrics.

  Args:
    workdir: of the run.
    data: records; "" takes the run's own held-out records.
    step: of the checkpoint; None: the run's result, which is the newest unless run.early_stop chose another.
    trust_code: as for `load`; also of rewards that the run's record names as module:function. Generated code runs only
      as ALIGNJAX_RUN_CODE permits now, whatever the record's `run_code` and `code_isolation` are.

  Returns:
    {"workdir", "step", "examples"} and the numbers, ready for JSON.

  Raises:
    InputError: there is no run, no checkpoint or no held-out record, or Python code may not be imported.
  """
  check_path("workdir", workdir)
  trusted = permitted(trust_code)
  with trusting(trust_code is True):
    return _evaluate(epath.Path(workdir).expanduser(), data, step, trusted)


def _evaluate(workdir: epath.Path, data: str, step: int | None, trusted: Collection[str]) -> dict[str, Any]:
  """Computes what `evaluate` returns, with the names of the code that is trusted."""
  run = load(workdir, step, trust_code=trusted)
  if samples(run.config):
    rewards = [name for name in rollout.weights(sampling_of(run.config)) if ":" in name]
    check_code(workdir / "config.json", rewards, trusted)
  config = run.config.data
  if data:
    config = dataclasses.replace(config, eval=data)
  kind = records_of(run.config)
  dataset = Dataset.open(config, run.tokenizer, kind, "eval", run.config.run.seed)
  numbers = {"workdir": str(workdir), "step": run.step, "examples": len(dataset)}
  with jax.set_mesh(run.mesh):
    if run.model.config.head == "scalar" and kind == "preference":
      margins = preference.reward_margins(run.model, run.params, dataset.epoch(rows_of(run)))
      prompts = [json.dumps(dataset.example(number).prompt) for number in margins]
      return numbers | preference.summary(list(margins.values()), prompts)
    algorithm = make_algorithm(run.config, run.model, run.tokenizer, workdir)
    others, running = beside_params(workdir, run, algorithm)
    score = make_score(algorithm, open_host_scorer(run.config, run.tokenizer, dataset, run.mesh))
    hparams = {name: jnp.float32(value) for name, value in run.config.hparams.items()}
    means = make_mean_metrics(score)(others, run.params, running, hparams, dataset.epoch(rows_of(run)), run.mesh)
    return numbers | algorithm.finish(jax.tree.map(float, means))


def make_mean_metrics(score: Callable[..., tuple[Metrics, jax.Array]]) -> Callable[..., Metrics]:
  """Returns f(others, params, running, hparams, batches, mesh): the means of loss and metrics over batches.

  The batches have this host's rows. The running statistics that `prepare` returns are dropped after each batch. The
  means are for `Algorithm.finish`; of members, each has an axis of them.

  Args:
    score: of a `training.loop.Loop`, or of `make_score`.
  """

  def mean_metrics(others, params, running, hparams, batches, mesh):
    total: Metrics = {}
    count = np.float64(0)
    for number, batch in enumerate(batches):
      key = jax.random.fold_in(jax.random.key(0), number)
      scored = score(others, params, running, hparams, sharding.to_mesh(batch, mesh), key)
      metrics, weight = jax.tree.map(np.float64, jax.device_get(scored))
      count += weight
      weighted = jax.tree.map(lambda x, weight=weight: x * weight, metrics)
      total = jax.tree.map(operator.add, total, weighted) if total else weighted
    return jax.tree.map(lambda x: x / count, total)

  return mean_metrics
