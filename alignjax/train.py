"""One run, from config to checkpoint: read it from top to bottom.

  python -m alignjax.train --config configs/dpo.py:smoke --workdir runs/dpo --config.algorithm.beta=0.05

Whatever the algorithm, the lines are these: mesh, data, model, state, loop. The same command continues a run that was
interrupted.
"""

if __name__ == "__main__":
  from alignjax import errors

  errors.watch_interrupts()  # the imports take seconds

import argparse
import collections
import contextlib
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath

from alignjax.algorithms import rollout
from alignjax.data.loader import Dataset
from alignjax.errors import InputError, run_process
from alignjax.evaluation import over_optimisation
from alignjax.evaluation.held_out import make_mean_metrics
from alignjax.model import ModelConfig, check
from alignjax.runs import config as config_lib
from alignjax.runs import reference_cache, trust
from alignjax.runs.build import (
  check_reference,
  check_rows,
  description,
  longest_row,
  loss_digests,
  make_algorithm,
  make_mesh,
  make_model,
  open_data,
  open_host_scorer,
  open_tokenizer,
  samples,
  sampling_of,
  with_sizes,
)
from alignjax.runs.checkpoint import Checkpointer, load_params
from alignjax.runs.config import Config
from alignjax.runs.frozen_params import ConstantTrees, save_reference
from alignjax.runs.initial_params import check_sources, load_base, starting_constants, starting_point
from alignjax.runs.resumption import continued
from alignjax.runs.run import Run
from alignjax.runs.workdir import (
  alone,
  as_begun,
  check_identity,
  fingerprints,
  same_everywhere,
  write_config,
)
from alignjax.system import hosts, malloc, profiling, provenance, sharding
from alignjax.system.preemption import Preemption
from alignjax.training import early_stop
from alignjax.training import metrics as metrics_lib
from alignjax.training.iteration import make_prepare
from alignjax.training.learner import make_learner
from alignjax.training.metrics import MetricWriter, Progress, data_metrics
from alignjax.training.problem import RecordIds, not_finite, without_signal


@alone("trains")
def fit(config: Config, workdir: epath.PathLike, stage: str = "train") -> Run:
  """Trains, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: of `load_config` or `resolve`; see configs/.
    workdir: made if missing; holds config.json, metrics.jsonl, timing.jsonl, checkpoints/, and reference/ where the
      algorithm has one.
    stage: the name in the progress line.

  Returns:
    The run with its last parameters, or the best ones with run.early_stop; `stopped` if a signal ended it early.

  Raises:
    InputError: anything wrong with config, data, tokenizer, mesh, checkpoints or workdir; or too many steps in a row
      that were not finite, or from which nothing could be learned.
  """
  ############################ workdir and mesh ############################
  if not isinstance(config, Config):
    raise InputError(f"config is a {type(config).__name__}; give what load_config or resolve returns")
  workdir = epath.Path(workdir).expanduser()
  given, config = config.model, with_sizes(config, workdir)
  config, kept = as_begun(workdir, config)
  metrics_lib.check_loggers(config.run.loggers)
  check_sources(workdir, config)
  hosts.agree("config and code", same_everywhere(config))
  if config.run.compile_cache:
    jax.config.update("jax_compilation_cache_dir", str(epath.Path(config.run.compile_cache).expanduser()))
  mesh = make_mesh(config.mesh)
  share = sharding.host_share(mesh)

  ############################ data ############################
  tokenizer = open_tokenizer(config)
  train_data, eval_data = open_data(config, tokenizer)
  files = {**fingerprints(tokenizer, train_data, eval_data), **loss_digests(config)}
  hosts.agree("files and devices", files | {"devices": jax.local_device_count()})
  evaluates = bool(eval_data) and config.run.eval_every > 0
  watch = early_stop.start(config.run.early_stop, config.run.patience, config.run.keep_best, evaluates)
  for line in (*kept, *_notes(config, given, train_data, eval_data)):
    hosts.say(line)

  ############################ model and algorithm ############################
  model = make_model(config, tokenizer)
  algorithm = make_algorithm(config, model, tokenizer, workdir)
  reference_cache.check(config.run.reference_cache, algorithm)
  check_rows(config, mesh)
  check_reference(config, model, algorithm)
  scorers = [open_host_scorer(config, tokenizer, dataset, mesh) for dataset in (train_data, eval_data)]

  with jax.set_mesh(mesh), contextlib.ExitStack() as on_exit:

    def closing(resource):
      return on_exit.enter_context(contextlib.closing(resource))

    compiles = closing(profiling.Compiles())

    ############################ state: fresh, from another run, or restored ############################
    learner = make_learner(config.optimizer, config.run.steps, model, algorithm, mesh)
    key = jax.random.key(config.run.seed)
    hparams = {k: jnp.float32(v) for k, v in sorted(config.hparams.items())}
    hparams = jax.device_put(hparams, sharding.replicated(mesh))

    checkpoints = closing(
      Checkpointer(
        workdir / "checkpoints",
        save_every=config.run.save_every,
        keep_latest=config.run.keep_latest,
        keep_every=config.run.keep_every or None,
        keep_best=_best(config.run),
      )
    )
    on_exit.enter_context(hosts.leaving())  # before the checkpointer, which would wait for a host that is gone
    restored = checkpoints.restore(learner.state, hparams, learner.form)
    identity = {"config": config.to_dict()} | files | {"versions": provenance.versions()}
    cache = functools.partial(reference_cache.open_columns, config.run.reference_cache, algorithm, model)
    open_columns = functools.partial(cache, (train_data, eval_data), mesh, identity)
    if restored is None:
      params, held, base = starting_point(config, model, tokenizer, mesh)
      if config.model.module:
        check.check(model, held | params)
      write_config(workdir, config)
      constant = starting_constants(config, algorithm, model, tokenizer, mesh, params, held)
      if held:  # a reference is the base itself: no copy, in memory or on disk
        identity |= {"base": base} | {name: base["digest"] for name in algorithm.constant if name == "reference"}
      for name in algorithm.constant:
        if name not in identity:
          described = description(name, algorithm.model_of(name, model), config, workdir)
          identity[name] = save_reference(workdir / name, constant[name], described)
      train_columns, eval_columns = open_columns(constant.get)  # while there is no optimizer state yet
      params = algorithm.start(params, constant)
      constants = ConstantTrees(algorithm, model, mesh, held)
      uncached = algorithm.uncached(train_columns.tables)
      constant = {name: constants.copy(name, constant[name]) for name in uncached}  # the params are donated
      state = learner.create(params, key)
      start, signal = 0, early_stop.Signal()
    else:
      start, state, hparams, saved, notes = restored
      signal = early_stop.Signal.recall(saved)
      check_identity(workdir, saved, identity)
      watch = watch and watch.recall(saved.get("watch"))
      for line in (*notes, *continued(saved, config, files, start)):
        hosts.say(line)
      held = load_base(config, model, tokenizer, mesh, saved)
      write_config(workdir, config)
      identity |= {name: saved[name] for name in ("base", "reference", *algorithm.constant) if name in saved}
      constants = ConstantTrees(algorithm, model, mesh, held)

      def load(name):
        return constants.load(name, workdir, identity[name])

      train_columns, eval_columns = open_columns(load)
      constant = {name: load(name) for name in algorithm.uncached(train_columns.tables)}

    ############################ compiled functions ############################
    prepare, mean_metrics = make_prepare(algorithm, scorers[0]), make_mean_metrics(algorithm, scorers[1])

    def evaluate(state, most: int | None = None) -> dict[str, float]:
      assert eval_data is not None
      batches = itertools.islice(map(eval_columns, eval_data.epoch(0, *share)), most)
      means = mean_metrics(constant | state.synced, held | state.params, hparams, batches, mesh, state.running)
      return {f"eval/{name}": value for name, value in means.items()}

    if eval_data and start < config.run.steps and not (watch and watch.over):
      setting = "run.early_stop" if watch else "run.keep_best"  # of both, they are the same
      if best := _best(config.run):
        early_stop.check(setting, early_stop.Metric(*best[:2]), functools.partial(evaluate, state))

    ############################ loop ############################
    loggers = [name for name in config.run.loggers.split(",") if name]
    writer = closing(MetricWriter(workdir, resume_step=start, loggers=loggers))
    rules = over_optimisation.rules_of(rollout.weights(sampling_of(config))) if samples(config) else ()
    evaluations = _evaluations(workdir) if start and rules else []
    progress = closing(Progress(stage, config.run.steps, start=start))
    trace = closing(profiling.Trace(workdir / "profile", config.run.profile, start))
    batches = closing(train_data.batches(start, *share))
    if start == 0:
      writer.write(0, data_metrics(train_data) | (scorers[0].facts if scorers[0] else {}))
    evaluation: dict[str, float] = {}
    recent: collections.deque[RecordIds] = collections.deque(maxlen=config.run.max_skipped + 1)
    pending = None  # the metrics of the step before, fetched while this one computes: no wait for the device
    problem = ""  # why the run ends with an error as soon as it is saved

    def finish(step, metrics, tokens, seconds):
      """Fetches, checks and logs the metrics of a step that has had time to end."""
      nonlocal signal, problem
      metrics = jax.tree.map(float, jax.device_get(metrics))
      signal = signal.after(without_signal(metrics))
      metrics = algorithm.finish(metrics)
      online = algorithm.rollout is not None
      lost = signal.lost(config.run.max_skipped, scored=not online or "objective/scores" in metrics)
      progress.update(step, metrics["loss"], tokens, seconds)
      give_up = lost or metrics["skipped_in_a_row"] >= config.run.max_skipped
      if give_up or step % config.run.log_every == 0 or step == config.run.steps:
        writer.write(step, metrics)
        writer.write_timing(step, progress.rates() | seconds | compiles.record())
      if lost and not problem:
        problem = signal.problem(step, metrics, online)
        if not signal.moved(step - (checkpoints.latest_step or 0)):
          raise InputError(problem)
      elif give_up and not problem:
        raise InputError(not_finite(step, metrics, recent, train_data, config.hparams))
      return metrics

    last: dict[str, float] = {}
    step, stopped = start, False
    preemption = on_exit.enter_context(Preemption())
    for step in range(start + 1, 1 + (start if watch and watch.over else config.run.steps)):
      trace.before(step)
      local = train_columns(next(batches))
      recent.append((step, local["record_ids"]))
      batch = sharding.to_mesh(local, mesh) | state.running
      others = constant | state.synced
      trees = algorithm.trees(others, held | state.params, hparams)
      batch, seconds = prepare(trees, batch, jax.random.fold_in(key, step))
      began = time.perf_counter()
      state, metrics = learner.step(state, batch, hparams, held | algorithm.for_loss(others))
      if seconds:  # of an online iteration, whose parts are timed
        jax.block_until_ready(metrics)
        seconds["update"] = time.perf_counter() - began
      if pending:
        last = finish(*pending)
      rows = sharding.local_rows(batch["segment_ids"]) if seconds else local["segment_ids"]
      pending = (step, metrics, int((rows > 0).sum()) * share[1], seconds)

      is_last, stopped = step == config.run.steps, preemption.requested(step)
      due = {
        "evaluation": bool(eval_data) and (is_last or (config.run.eval_every and step % config.run.eval_every == 0)),
        "checkpoint": is_last or stopped or checkpoints.due(step),
      }
      if problem or any(due.values()):
        last, pending = finish(*pending), None
      if due["evaluation"]:
        evaluation = evaluate(state)
        writer.write(step, evaluation)
        progress.note(step, evaluation)
        evaluations.append({"step": step} | evaluation)
        for alarm in over_optimisation.first_raised(evaluations, rules):
          progress.say(step, f"alarm: {alarm.name}: {alarm.means}; see docs/over_optimisation.md")
      if watch and due["evaluation"]:
        watch = watch.after(step, evaluation)
        is_last |= watch.over
        due["checkpoint"] |= is_last or watch.step == step
      if problem and is_last:  # saved, the run would pass for complete
        raise InputError(problem)
      if problem:  # what was learned since the last checkpoint is kept, for a larger run.max_skipped
        due["checkpoint"] = True
      if due["checkpoint"]:
        writer.flush()  # what a checkpoint covers is on disk before it is
        checkpoints.save(
          step,
          state,
          hparams,
          metadata=identity | {"step": step} | signal.metadata() | (watch.metadata(is_last) if watch else {}),
          metrics=evaluation if due["evaluation"] else None,
          force=True,
        )
      if problem:
        checkpoints.wait()
        raise InputError(problem)
      if stopped or is_last:
        progress.say(step, f"compiled {compiles.programs} programs in {compiles.seconds:.1f} s")
        break

    params, saved = state.params, identity
    if watch and watch.best is not None and not stopped:
      checkpoints.wait()
      params, saved = load_params(workdir / "checkpoints", learner.params, step=watch.step)
      step, last, evaluation = watch.step, {}, checkpoints.metrics(watch.step)
    elif eval_data and not evaluation and not stopped:
      evaluation = evaluate(state)  # the run was complete before it began
  return Run(config, step, held | params, model, tokenizer, mesh, last | evaluation, saved, stopped)


def _notes(config: Config, given: ModelConfig, *datasets: Dataset | None) -> Iterator[str]:
  """Yields what people should know of a run's data, and of its model if that is not as they gave it."""
  for dataset in filter(None, datasets):
    yield from dataset.report_lines()
  if config.run.keep_best and datasets[1] is None:
    yield f"run.keep_best={config.run.keep_best}: no best is kept, for nothing is held out (data.eval, data.holdout)"
  if config.model != given:
    yield f"model: the sizes of run.init={config.run.init}, not those of the config"
  longest = longest_row(config)
  if 0 < config.model.max_positions < longest:
    yield f"model: made for texts of {config.model.max_positions} tokens; rows have up to {longest}"


def _evaluations(workdir: epath.Path) -> list[dict[str, Any]]:
  """Reads the lines of the metrics so far that an evaluation wrote.

  Only the first process has them, and says something; [] in the others.
  """
  if jax.process_index() != 0:
    return []
  return [row for row in metrics_lib.read(workdir / "metrics.jsonl") if any(name.startswith("eval/") for name in row)]


def _best(config: config_lib.RunConfig) -> tuple[str, Literal["max", "min"], int] | None:
  """Returns the metric whose best step stays, with its mode, and how many."""
  kept = early_stop.metric("run.keep_best", config.keep_best) or early_stop.metric("run.early_stop", config.early_stop)
  return kept and (*kept, 1)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line of `alignjax train`, and returns its exit status.

  Args:
    argv: the arguments without the program's name; those of this process if None.

  Raises:
    InputError: as `fit`, or the config cannot be loaded.
  """
  parser = argparse.ArgumentParser(
    prog="alignjax train",
    description="Trains the run that a config describes; the same command continues it.",
    epilog="example: alignjax train --config configs/dpo.py --workdir runs/dpo --config.algorithm.beta=0.05",
  )
  parser.add_argument("--config", required=True, help="FILE.py or FILE.py:variant, e.g. configs/dpo.py:smoke")
  parser.add_argument("--workdir", required=True, help="where the run writes; one run per directory")
  trust.add_flag(parser)
  arguments, rest = parser.parse_known_args(argv)
  unknown = [a for a in rest if not a.startswith("--config.") or "=" not in a]
  if unknown:
    parser.error(f"unknown argument {unknown[0]}; overrides look like --config.run.steps=100")
  config = config_lib.load_config(arguments.config, [a.removeprefix("--config.") for a in rest])
  with trust.trusting(arguments.trust_run_code):
    run = fit(config, arguments.workdir)
  shown = {k: round(v, 4) for k, v in run.metrics.items() if k == "loss" or k.startswith("eval/")}
  ending = "stopped at" if run.stopped else "finished; the best is" if config.run.early_stop else "finished"
  if jax.process_index() == 0:
    print(f"{ending} step {run.step}: {json.dumps(shown)}")
  return hosts.STOPPED if run.stopped and hosts.several() else 0  # a scheduler would take 0 for the end of the run


if __name__ == "__main__":
  malloc.keep_freed()
  sys.exit(run_process(lambda argv: hosts.run(lambda: main(argv))))
