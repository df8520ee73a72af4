"""Members of one program: runs of LoRA factors that differ in what is traced, trained together along a `vmap` axis.

Read it beside train.py, whose lines these are: one base, one stream of batches, one key; state, hyper-parameters and
metrics have a leading axis of K members. What depends on no member, such as the reference's log-probabilities, `vmap`
leaves alone: it is computed once.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from alignjax.algorithms import Algorithm
from alignjax.errors import InputError
from alignjax.model import Model, lora
from alignjax.runs import reference_cache
from alignjax.runs.build import (
  check_reference,
  check_rows,
  make_algorithm,
  make_mesh,
  make_model,
  open_data,
  open_tokenizer,
  with_sizes,
)
from alignjax.runs.checkpoint import Checkpointer, save_single
from alignjax.runs.config import Config
from alignjax.runs.initial_params import load_base, starting_point
from alignjax.runs.resumption import continued
from alignjax.runs.workdir import alone, check_identity, fingerprints, write_config
from alignjax.system import hosts, profiling, provenance, sharding
from alignjax.system.preemption import Preemption
from alignjax.training import earlier, early_stop
from alignjax.training.metrics import MetricWriter, Progress, data_metrics
from alignjax.training.optim import make_optimizer, make_schedule
from alignjax.training.step import create_state, make_train_step
from alignjax.types import Metrics, Params, TrainState


@alone("trains")
def fit_members(configs: Sequence[Config], directories: Sequence[epath.PathLike], workdir: epath.PathLike) -> bool:
  """Trains K runs as one, from the newest checkpoint in `workdir` if there is one.

  Each leaves what `train.fit` would have: its config, its metrics and, at the end, its checkpoint (one: `run.keep_*`
  is for runs of their own).

  Args:
    configs: alike but for traced hyper-parameters, learning rate and lora.seed; with LoRA factors.
    directories: of each member's run.
    workdir: of the checkpoints of them all; made if missing.

  Returns:
    True if a signal ended the training before its last step.

  Raises:
    InputError: as `train.fit`; or no member is left whose steps are finite.
  """
  workdir, directories = epath.Path(workdir).expanduser(), [epath.Path(one).expanduser() for one in directories]
  configs = [with_sizes(own, directory) for own, directory in zip(configs, directories, strict=True)]
  config = configs[0]
  _check(configs)
  if config.run.compile_cache:
    jax.config.update("jax_compilation_cache_dir", str(epath.Path(config.run.compile_cache).expanduser()))
  mesh = make_mesh(config.mesh)
  check_rows(config, mesh)

  tokenizer = open_tokenizer(config)
  train_data, eval_data = open_data(config, tokenizer)
  share = sharding.host_share(mesh)

  model = make_model(config, tokenizer)
  algorithm = make_algorithm(config, model, tokenizer, workdir)
  reference_cache.check(config.run.reference_cache, algorithm)
  check_reference(config, model, algorithm)
  tx, schedule = make_optimizer(config.optimizer), make_schedule(config.optimizer, config.run.steps)

  with jax.set_mesh(mesh), contextlib.ExitStack() as on_exit:

    def closing(resource):
      return on_exit.enter_context(contextlib.closing(resource))

    ############################ state ############################
    key = jax.random.key(config.run.seed)

    def create(params):
      return create_state(params, tx, key, algorithm.running)

    layout = member_layout(model, create, tx, mesh)
    stacked = jax.tree.map(lambda x: _stacked(x, len(configs)), layout)
    shardings = jax.tree.map(lambda x: x.sharding, stacked)
    hparams = {name: jnp.float32([c.hparams[name] for c in configs]) for name in sorted(config.hparams)}
    hparams = jax.device_put(hparams, sharding.replicated(mesh))
    checkpoints = closing(Checkpointer(workdir / "checkpoints", save_every=config.run.save_every))
    identity: dict[str, Any] = {"config": config.to_dict()} | fingerprints(tokenizer, train_data, eval_data)
    identity |= {"versions": provenance.versions()}
    form = functools.partial(earlier.form, state=stacked, algorithm=algorithm)
    restored = checkpoints.restore(stacked, hparams, form)
    if restored is None:
      params, held, identity["base"] = starting_point(config, model, tokenizer, mesh)

      def begin(params, seeds):
        return jax.vmap(lambda seed: create(with_seed(model, config, params, key, seed)))(seeds)

      state = jax.jit(begin, out_shardings=shardings)(params, jnp.array([c.lora.seed for c in configs], jnp.uint32))
      start, signal = 0, early_stop.Signal()
    else:
      start, state, hparams, saved, notes = restored
      signal = early_stop.Signal.recall(saved)
      check_identity(workdir, saved, identity)
      for line in (*notes, *continued(saved, config, identity, start)):
        hosts.say(line)
      held = load_base(config, model, tokenizer, mesh, saved)
      identity["base"] = saved["base"]
    identity |= dict.fromkeys(algorithm.constant, identity["base"]["digest"])  # the base is the reference
    for directory, own in zip(directories, configs, strict=True):
      write_config(directory, own)
    train_columns, eval_columns = reference_cache.open_columns(
      config.run.reference_cache, algorithm, model, (train_data, eval_data), mesh, identity, lambda name: held
    )

    ############################ compiled functions ############################
    train_step, evaluate = compile_members(
      algorithm, make_train_step(algorithm.loss, tx, schedule, config.optimizer.microbatches), shardings
    )

    ############################ loop ############################
    loggers = [name for name in config.run.loggers.split(",") if name]
    writers = [closing(MetricWriter(directory, resume_step=start, loggers=loggers)) for directory in directories]
    progress = closing(Progress(f"sweep of {len(configs)}", config.run.steps, start=start))
    trace = closing(profiling.Trace(workdir / "profile", config.run.profile, start))
    batches = closing(train_data.batches(start, *share))

    def write(step, metrics, prefix=""):
      for k, writer in enumerate(writers):
        own = algorithm.finish(jax.tree.map(lambda values, k=k: float(values[k]), metrics))
        writer.write(step, {f"{prefix}{name}": value for name, value in own.items()})

    def finish(step, metrics, tokens):
      nonlocal signal
      metrics = jax.device_get(metrics)
      progress.update(step, float(np.nanmean(metrics["loss"])), tokens)
      if step % config.run.log_every == 0 or step == config.run.steps:
        write(step, metrics)
        writers[0].write_timing(step, progress.rates())
      signal = signal.after(not np.any(metrics["grad_norm"]))
      if signal.lost(config.run.max_skipped):
        raise InputError(signal.problem(step, {"loss": float(np.nanmean(metrics["loss"]))}, online=False))
      if metrics["skipped_in_a_row"].min() >= config.run.max_skipped:
        raise InputError(f"loss or gradient was not finite in any member at step {step}; sweep lower learning rates")

    if start == 0:
      for writer in writers:
        writer.write(0, data_metrics(train_data))
    step, stopped, pending = start, False, None
    preemption = on_exit.enter_context(Preemption())
    for step in range(start + 1, config.run.steps + 1):
      trace.before(step)
      local = train_columns(next(batches))
      batch = sharding.to_mesh(local, mesh)
      state, metrics = train_step(state, hparams, batch, held, jax.random.fold_in(key, step))
      if pending:
        finish(*pending)
      pending = (step, metrics, int((local["segment_ids"] > 0).sum()) * share[1])
      is_last, stopped = step == config.run.steps, preemption.requested(step)
      due = is_last or (config.run.eval_every and step % config.run.eval_every == 0)
      to_save = is_last or stopped or checkpoints.due(step)
      if due or to_save:
        finish(*pending)
        pending = None
      if eval_data and due:
        means = evaluate(state, hparams, held, map(eval_columns, eval_data.epoch(0, *share)), mesh)
        write(step, means, "eval/")
        progress.note(step, {"eval/loss, mean": float(np.nanmean(means["loss"]))})
      if to_save:
        for writer in writers:
          writer.flush()
        checkpoints.save(
          step,
          state,
          hparams,
          metadata=identity | {"step": step} | signal.metadata(),
          force=is_last or stopped,
        )
      if stopped:
        break

    ############################ every member as a run of its own ############################
    if not stopped:
      for k, (directory, own) in enumerate(zip(directories, configs, strict=True)):
        member, its_hparams = jax.tree.map(lambda x: x[k], (state, hparams))  # noqa: B023
        member = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), member, layout)
        metadata = identity | {"config": own.to_dict(), "step": step}
        save_single(directory / "checkpoints", member, its_hparams, metadata)
  return stopped


def _check(configs: Sequence[Config]) -> None:
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


def member_layout(model: Model, create: Callable, tx, mesh: jax.sharding.Mesh) -> TrainState:
  """Returns the state of one member, abstract, with shardings.

  Args:
    model: of the members.
    create: trained parameters -> the state before the first step.
    tx: the optimizer that `create` uses.
    mesh: of the run.
  """
  params, _ = model.split(model.abstract(mesh))
  state = jax.eval_shape(create, params)
  shardings = sharding.state_shardings(state, tx, jax.tree.map(lambda x: x.sharding, params), mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def _stacked(leaf: jax.ShapeDtypeStruct, members: int) -> jax.ShapeDtypeStruct:
  """Returns the leaf of K members: a leading axis that no device splits."""
  layout = jax.NamedSharding(leaf.sharding.mesh, jax.P(None, *leaf.sharding.spec))
  return jax.ShapeDtypeStruct((members, *leaf.shape), leaf.dtype, sharding=layout)


def with_seed(model: Model, config: Config, params: Params, key: jax.Array, seed: jax.Array) -> Params:
  """Returns the parameters that a member begins with: `params`, with the factors of its own seed.

  If an adapter is continued (lora.init), they are `params` as they are.

  Args:
    model: with LoRA factors.
    config: of any member.
    params: the trained parameters that the members share.
    key: of the run.
    seed: the member's lora.seed, traced.
  """
  if config.lora.init:
    return params
  return params | {"lora": lora.init(model.weights()["lora"], key, seed)}


def compile_members(algorithm: Algorithm, train_step: Callable, shardings: TrainState) -> tuple[Callable, Callable]:
  """Compiles the functions of one run, mapped over members.

  Args:
    algorithm: of the members.
    train_step: of `make_train_step`, for one member.
    shardings: of the state of all members.

  Returns:
    step(state, hparams, batch, held, key) -> (state, metrics [K]), donating the state; and
    evaluate(state, hparams, held, batches, mesh) -> means [K] of loss and metrics over batches of this host's rows.
  """

  def constant(held):
    return dict.fromkeys(algorithm.constant, held)  # the base is the reference

  def read_by_loss(held):
    return held | algorithm.for_loss(constant(held))

  def prepared(state, batch, held, key):
    return algorithm.prepare(algorithm.trees(constant(held), held | state.params), batch | state.running, key)

  def step(state, hparams, batch, held, key):
    return train_step(state, prepared(state, batch, held, key), hparams, read_by_loss(held))

  def score(state, hparams, batch, held):
    batch = prepared(state, batch, held, jax.random.key(0))
    value, metrics = algorithm.loss(read_by_loss(held) | state.params, batch, hparams)
    return metrics | {"loss": value}, batch[algorithm.count]

  def axes(*shared):
    return (0, 0, *(None for _ in shared))

  mapped_step = jax.vmap(step, in_axes=axes("batch", "held", "key"))
  compiled_step = jax.jit(mapped_step, donate_argnums=0, out_shardings=(shardings, None))
  compiled_score = jax.jit(jax.vmap(score, in_axes=axes("batch", "held")))

  def evaluate(state, hparams, held, batches, mesh):
    total: Metrics = {}
    count = 0.0
    for batch in batches:
      metrics, weight = jax.device_get(compiled_score(state, hparams, sharding.to_mesh(batch, mesh), held))
      count += np.float64(weight)
      weighted = jax.tree.map(lambda values, weight=weight: np.float64(values) * weight, metrics)
      total = jax.tree.map(operator.add, total, weighted) if total else weighted
    return jax.tree.map(lambda values: values / count, total)

  return compiled_step, evaluate
