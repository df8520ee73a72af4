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
from collections.abc import Sequence

import jax
from etils import epath

from alignjax.algorithms import rollout
from alignjax.errors import InputError, run_process
from alignjax.evaluation import over_optimisation
from alignjax.evaluation.held_out import make_mean_metrics
from alignjax.model import check
from alignjax.runs import config as config_lib
from alignjax.runs import members, reference_cache, trust
from alignjax.runs.build import (
  check_reference,
  check_rows,
  description,
  loss_digests,
  make_algorithm,
  make_mesh,
  make_model,
  open_data,
  open_host_scorer,
  open_tokenizer,
  samples,
  sampling_of,
)
from alignjax.runs.checkpoint import Checkpointer, load_params
from alignjax.runs.config import Config
from alignjax.runs.frozen_params import ConstantTrees, save_reference
from alignjax.runs.initial_params import check_sources, load_base, starting_constants, starting_point
from alignjax.runs.notes import continued, known_at_start
from alignjax.runs.run import Run
from alignjax.runs.workdir import (
  alone,
  check_identity,
  fingerprints,
  same_everywhere,
)
from alignjax.system import hosts, malloc, profiling, provenance, sharding
from alignjax.system.preemption import Preemption
from alignjax.training import early_stop, loop
from alignjax.training import metrics as metrics_lib
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
  if not isinstance(config, Config):
    raise InputError(f"config is a {type(config).__name__}; give what load_config or resolve returns")
  return _fit([config], [workdir], workdir, stage)[0]


@alone("trains")
def fit_members(configs: Sequence[Config], directories: Sequence[epath.PathLike], workdir: epath.PathLike) -> list[Run]:
  """Trains K runs as one program, from the newest checkpoint in `workdir` if there is one.

  Each leaves what `fit` would have: its config, its metrics and, at the end, its checkpoint (one: run.keep_latest and
  run.keep_every are of the checkpoints that all share, and no best is kept).

  Args:
    configs: alike but for traced hyper-parameters, learning rate and lora.seed; with LoRA factors.
    directories: of each member's run.
    workdir: of the checkpoints of them all; made if missing.

  Returns:
    The members' runs, in order.

  Raises:
    InputError: as `fit`; or no member is left whose steps are finite.
  """
  members.check(configs)
  return _fit(configs, directories, workdir, f"sweep of {len(configs)}", in_one_program=True)


def _fit(
  configs: Sequence[Config],
  directories: Sequence[epath.PathLike],
  workdir: epath.PathLike,
  stage: str,
  in_one_program: bool = False,
) -> list[Run]:
  """Trains what `fit` and `fit_members` describe; a run alone is the only one of `configs`."""
  ############################ workdir and mesh ############################
  workdir = epath.Path(workdir).expanduser()
  directories = [epath.Path(directory).expanduser() for directory in directories]
  given = configs[0].model
  configs, kept = members.as_begun(configs, directories)
  config = configs[0]
  metrics_lib.check_loggers(config.run.loggers)
  check_sources(directories[0], config)
  hosts.agree("config and code", same_everywhere(config))
  if in_one_program:  # alike but for these
    hosts.agree("members", {"hparams": [own.hparams for own in configs], "seeds": members.seeds(configs)})
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
  for line in (*kept, *known_at_start(config, given, train_data, eval_data)):
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

    ############################ compiled functions ############################
    parts = (config.optimizer, config.run.steps, model, algorithm, mesh)
    if in_one_program:
      program = loop.of_members(*parts, members.seeds(configs))
    else:
      program = loop.of_one(*parts, scorers)
    mean_metrics = make_mean_metrics(program.score)

    ############################ state: fresh, from another run, or restored ############################
    key = jax.random.key(config.run.seed)
    hparams = program.stack([own.hparams for own in configs])
    hparams = jax.device_put(hparams, sharding.replicated(mesh))
    best = None if in_one_program else early_stop.kept(config.run.keep_best, config.run.early_stop)
    checkpoints = closing(
      Checkpointer(
        workdir / "checkpoints",
        save_every=config.run.save_every,
        keep_latest=config.run.keep_latest,
        keep_every=config.run.keep_every or None,
        keep_best=best and (*best, 1),
      )
    )
    on_exit.enter_context(hosts.leaving())  # before the checkpointer, which would wait for a host that is gone
    restored = checkpoints.restore(program.state, hparams, program.form)
    identity = {"config": config.to_dict()} | files | {"versions": provenance.versions()}
    cache = functools.partial(reference_cache.open_columns, config.run.reference_cache, algorithm, model)
    open_columns = functools.partial(cache, (train_data, eval_data), mesh, identity)
    if restored is None:
      params, held, base = starting_point(config, model, tokenizer, mesh)
      if config.model.module:
        check.check(model, held | params)
      members.write_configs(directories, configs)
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
      state = program.create(params, key)
      start, signal = 0, early_stop.Signal()
    else:
      start, state, hparams, saved, notes = restored
      signal = early_stop.Signal.recall(saved)
      check_identity(workdir, saved, identity)
      watch = watch and watch.recall(saved.get("watch"))
      for line in (*notes, *continued(saved, config, files, start)):
        hosts.say(line)
      held = load_base(config, model, tokenizer, mesh, saved)
      members.write_configs(directories, configs)
      identity |= {name: saved[name] for name in ("base", "reference", *algorithm.constant) if name in saved}
      constants = ConstantTrees(algorithm, model, mesh, held)

      def load(name):
        return constants.load(name, workdir, identity[name])

      train_columns, eval_columns = open_columns(load)
      constant = {name: load(name) for name in algorithm.uncached(train_columns.tables)}

    def evaluate(state, most: int | None = None) -> list[dict[str, float]]:
      assert eval_data is not None
      batches = itertools.islice(map(eval_columns, eval_data.epoch(0, *share)), most)
      means = mean_metrics(constant | state.synced, held | state.params, state.running, hparams, batches, mesh)
      finished = [algorithm.finish(jax.tree.map(float, own)) for own in program.each(means)]
      return [{f"eval/{name}": value for name, value in own.items()} for own in finished]

    if best and eval_data and start < config.run.steps and not (watch and watch.over):
      setting = "run.early_stop" if watch else "run.keep_best"  # of both, they are the same
      early_stop.check(setting, best, lambda most: evaluate(state, most)[0])

    ############################ loop ############################
    loggers = [name for name in config.run.loggers.split(",") if name]
    writers = [closing(MetricWriter(directory, resume_step=start, loggers=loggers)) for directory in directories]
    rules = over_optimisation.rules_of(rollout.weights(sampling_of(config))) if samples(config) else ()
    evaluations = metrics_lib.evaluations(workdir) if start and rules else []
    progress = closing(Progress(stage, config.run.steps, start=start))
    trace = closing(profiling.Trace(workdir / "profile", config.run.profile, start))
    batches = closing(train_data.batches(start, *share))

    def write(step, metrics):
      for writer, own in zip(writers, metrics, strict=True):
        writer.write(step, own)

    if start == 0:
      write(0, [data_metrics(train_data) | (scorers[0].facts if scorers[0] else {})] * len(configs))
    evaluation: list[dict[str, float]] = []
    recent: collections.deque[RecordIds] = collections.deque(maxlen=config.run.max_skipped + 1)
    pending = None  # the metrics of the step before, fetched while this one computes: no wait for the device
    problem = ""  # why the run ends with an error as soon as it is saved

    def finish(step, metrics, tokens, seconds):
      """Fetches, checks and logs the metrics of a step that has had time to end."""
      nonlocal signal, problem
      each = [jax.tree.map(float, own) for own in program.each(jax.device_get(metrics))]
      signal = signal.after(all(without_signal(own) for own in each))
      each = [algorithm.finish(own) for own in each]
      online = algorithm.rollout is not None
      lost = signal.lost(config.run.max_skipped, scored=not online or "objective/scores" in each[0])
      progress.update(step, members.mean_loss(each), tokens, seconds)
      last = min(range(len(each)), key=lambda k: each[k]["skipped_in_a_row"])  # of all members, the last to be finite
      give_up = lost or each[last]["skipped_in_a_row"] >= config.run.max_skipped
      if give_up or step % config.run.log_every == 0 or step == config.run.steps:
        write(step, each)
        writers[0].write_timing(step, progress.rates() | seconds | compiles.record())
      if lost and not problem:
        problem = signal.problem(step, each[0], online)
        if not signal.moved(step - (checkpoints.latest_step or 0)):
          raise InputError(problem)
      elif give_up and not problem:
        raise InputError(not_finite(step, each[last], recent, train_data, configs[last].hparams))
      return each

    latest: list[dict[str, float]] = [{} for _ in configs]
    step, stopped = start, False
    preemption = on_exit.enter_context(Preemption())
    for step in range(start + 1, 1 + (start if watch and watch.over else config.run.steps)):
      trace.before(step)
      local = train_columns(next(batches))
      recent.append((step, local["record_ids"]))
      batch = sharding.to_mesh(local, mesh)
      step_key = jax.random.fold_in(key, step)
      state, metrics, batch, seconds = program.iterate(state, batch, hparams, constant, held, step_key)
      if pending:
        latest = finish(*pending)
      rows = sharding.local_rows(batch.rows.texts["segment_ids"]) if seconds else local["segment_ids"]
      pending = (step, metrics, int((rows > 0).sum()) * share[1], seconds)

      is_last, stopped = step == config.run.steps, preemption.requested(step)
      due = {
        "evaluation": bool(eval_data) and (is_last or (config.run.eval_every and step % config.run.eval_every == 0)),
        "checkpoint": is_last or stopped or checkpoints.due(step),
      }
      if problem or any(due.values()):
        latest, pending = finish(*pending), None
      if due["evaluation"]:
        evaluation = evaluate(state)
        write(step, evaluation)
        progress.note(step, members.summary(evaluation))
        evaluations.append({"step": step} | evaluation[0])
        for alarm in over_optimisation.first_raised(evaluations, rules):
          progress.say(step, f"alarm: {alarm.name}: {alarm.means}; see docs/over_optimisation.md")
      if watch and due["evaluation"]:
        watch = watch.after(step, evaluation[0])
        is_last |= watch.over
        due["checkpoint"] |= is_last or watch.step == step
      if problem and is_last:  # saved, the run would pass for complete
        raise InputError(problem)
      if problem:  # what was learned since the last checkpoint is kept, for a larger run.max_skipped
        due["checkpoint"] = True
      if due["checkpoint"]:
        for writer in writers:
          writer.flush()  # what a checkpoint covers is on disk before it is
        checkpoints.save(
          step,
          state,
          hparams,
          metadata=identity | {"step": step} | signal.metadata() | (watch.metadata(is_last) if watch else {}),
          metrics=evaluation[0] if due["evaluation"] and not in_one_program else None,
          force=True,
        )
      if problem:
        checkpoints.wait()
        raise InputError(problem)
      if stopped or is_last:
        progress.say(step, f"compiled {compiles.programs} programs in {compiles.seconds:.1f} s")
        break

    ############################ result ############################
    params, saved = state.params, identity
    if watch and watch.best is not None and not stopped:
      checkpoints.wait()
      params, saved = load_params(workdir / "checkpoints", program.learner.params, step=watch.step)
      step, latest, evaluation = watch.step, [{}], [checkpoints.metrics(watch.step)]
    elif eval_data and not evaluation and not stopped and not in_one_program:
      evaluation = evaluate(state)  # the run was complete before it began
    if in_one_program and not stopped:
      members.save(directories, configs, program, state, hparams, identity | {"step": step})
    records = [saved]
    if in_one_program:
      records = [saved | {"config": own.to_dict()} for own in configs]
    numbers = [own | held_out for own, held_out in zip(latest, evaluation or [{}] * len(configs), strict=True)]
    return [
      Run(own, step, held | trained, model, tokenizer, mesh, metrics, record, stopped)
      for own, trained, metrics, record in zip(configs, program.each(params), numbers, records, strict=True)
    ]


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
