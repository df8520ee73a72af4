"""The functions that a training loop calls, compiled: those of one run, or of K members that train in one program.

Members are runs of LoRA factors that differ in what is traced. Their state, hyper-parameters and metrics have a leading
axis of K members, over which `vmap` maps the functions of one run. What depends on no member, such as the reference's
log-probabilities, is computed once for all.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignjax.algorithms import Algorithm
from alignjax.algorithms.online_rows import HostRewards, Rollout
from alignjax.model import Model, lora
from alignjax.system.fingerprint import Table
from alignjax.training import earlier
from alignjax.training.iteration import HostScorer, make_prepare
from alignjax.training.learner import Learner, make_functions, make_learner
from alignjax.training.optim import OptimizerConfig
from alignjax.types import Batch, HParams, Metrics, Params, TrainState


class Iterated(NamedTuple):
  """What an iteration returns.

  Attributes:
    state: after the step.
    metrics: of the step, on the device.
    batch: that was learned from.
    seconds: of each part by name, of an online iteration; {} for others, which are not waited for.
  """

  state: TrainState
  metrics: Metrics
  batch: Batch
  seconds: dict[str, float]


class Loop(NamedTuple):
  """The compiled functions of a training loop; of K members, "[K]" says what has an axis of them.

  Attributes:
    learner: of one run.
    state: all that an iteration changes, abstract and placed [K].
    create: (params of one run, key) -> the state [K] before the first step; compiled.
    form: the arrays of a checkpoint -> how the state [K] lies there.
    iterate: (state [K], batch, hparams [K], constant, held, key) -> Iterated; the state is donated. `constant` are the
      trees by name that no step changes, `held` the frozen base under LoRA factors.
    update: what `iterate` compiles that has a gradient: the step of one run, or the whole iteration of members.
    score: of `make_score`.
    stack: a dict of numbers for each run -> the float32 hparams [K].
    each: any tree [K] -> a list of the trees of each run.
  """

  learner: Learner
  state: TrainState
  create: Callable[[Params, jax.Array], TrainState]
  form: Callable[[Table], earlier.Form]
  iterate: Callable[..., Iterated]
  update: jax.stages.Wrapped
  score: Callable[..., tuple[Metrics, jax.Array]]
  stack: Callable[[Sequence[Mapping[str, float]]], HParams]
  each: Callable[[Any], list[Any]]


def of_one(
  optimizer: OptimizerConfig,
  steps: int,
  model: Model,
  algorithm: Algorithm,
  mesh: jax.sharding.Mesh,
  scorers: Sequence[HostScorer | None],
) -> Loop:
  """Compiles the functions of one run.

  Args:
    optimizer, steps, model, algorithm, mesh: as for `make_learner`.
    scorers: for the training and the held-out records, as for `make_prepare`.

  Raises:
    InputError: as `make_learner`.
  """
  learner = make_learner(optimizer, steps, model, algorithm, mesh)
  prepare = make_prepare(algorithm, scorers[0])

  def iterate(state, batch, hparams, constant, held, key):
    others = constant | state.synced
    trees = algorithm.trees(others, held | state.params, hparams)
    batch, seconds = prepare(trees, batch.updated(running=state.running), key)
    began = time.perf_counter()
    state, metrics = learner.step(state, batch, hparams, held | algorithm.for_loss(others))
    if seconds:
      jax.block_until_ready(metrics)
      seconds["update"] = time.perf_counter() - began
    return Iterated(state, metrics, batch, seconds)

  def stack(runs):
    return {name: jnp.float32(value) for name, value in sorted(runs[0].items())}

  return Loop(
    learner=learner,
    state=learner.state,
    create=learner.create,
    form=learner.form,
    iterate=iterate,
    update=learner.step,
    score=make_score(algorithm, scorers[1]),
    stack=stack,
    each=lambda tree: [tree],
  )


def make_score(
  algorithm: Algorithm, scorer: Callable[[Rollout], HostRewards] | None = None
) -> Callable[..., tuple[Metrics, jax.Array]]:
  """Returns f(others, params, running, hparams, batch, key) -> (metrics and "loss" of the batch, what they weigh).

  Args:
    algorithm: whose `prepare` and `loss` are compiled.
    scorer: as for `make_prepare`.
  """
  return _score(algorithm, make_prepare(algorithm, scorer), jax.jit(algorithm.loss), jax.jit(algorithm.counts))


def _score(algorithm, prepare, loss, counts):
  def score(others, params, running, hparams, batch, key):
    batch, _ = prepare(algorithm.trees(others, params, hparams), batch.updated(running=running), key)
    batch = batch.updated(totals=counts(batch.rows))
    value, metrics = loss(algorithm.for_loss(others) | params, batch, hparams)
    return metrics | {"loss": value}, batch.totals[algorithm.count]

  return score


def of_members(
  optimizer: OptimizerConfig,
  steps: int,
  model: Model,
  algorithm: Algorithm,
  mesh: jax.sharding.Mesh,
  seeds: Sequence[int | None],
) -> Loop:
  """Compiles the functions of K members, each mapped over its members; an iteration is one program.

  Args:
    optimizer, steps, model, algorithm, mesh: as for `make_learner`, of every member; the model has LoRA factors, and
      the algorithm no rollout.
    seeds: by which each member's factors are drawn; None: they are those that `create` is given.

  Raises:
    InputError: as `make_learner`.
  """
  members = len(seeds)
  one = make_functions(optimizer, steps, model, algorithm, mesh)
  state = jax.tree.map(lambda leaf: _stacked(leaf, members), one.state)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

  def create(params, key):
    def of_seed(seed):
      return one.create(params | {"lora": lora.init(model.weights()["lora"], key, seed)}, key)

    if None in seeds:
      return jax.vmap(lambda _: one.create(params, key), axis_size=members)(jnp.arange(members))
    return jax.vmap(of_seed)(jnp.array(seeds, jnp.uint32))

  def iterate(state, batch, hparams, constant, held, key):
    others = constant | state.synced
    trees = algorithm.trees(others, held | state.params, hparams)
    batch = algorithm.prepare(trees, batch.updated(running=state.running), key)
    return one.step(state, batch, hparams, held | algorithm.for_loss(others))

  mapped = jax.vmap(iterate, in_axes=(0, None, 0, None, None, None))
  compiled = jax.jit(mapped, donate_argnums=0, out_shardings=(shardings, None))

  def iterate_all(state, batch, *rest):
    return Iterated(*compiled(state, batch, *rest), batch, {})

  def prepare(trees, batch, key):
    return algorithm.prepare(trees, batch, key), {}

  score = _score(algorithm, prepare, algorithm.loss, algorithm.counts)

  @jax.jit
  def score_all(others, params, running, hparams, batch, key):
    by_member = {name: 0 if name in algorithm.synced else None for name in others}
    trained = {name: 0 if name in model.trained else None for name in params}
    axes = (by_member, trained, 0, 0, None, None)
    return jax.vmap(score, in_axes=axes)(others, params, running, hparams, batch, key)

  def stack(runs):
    return {name: jnp.float32([run[name] for run in runs]) for name in sorted(runs[0])}

  def each(tree):
    return [jax.tree.map(lambda leaf, k=k: leaf[k], tree) for k in range(members)]

  def form(saved):
    return earlier.form(saved, state=state, algorithm=algorithm)

  return Loop(
    learner=one,
    state=state,
    create=jax.jit(create, out_shardings=shardings),
    form=form,
    iterate=iterate_all,
    update=compiled,
    score=score_all,
    stack=stack,
    each=each,
  )


def _stacked(leaf: jax.ShapeDtypeStruct, members: int) -> jax.ShapeDtypeStruct:
  """Returns the leaf of K members: a leading axis that no device splits."""
  layout = jax.NamedSharding(leaf.sharding.mesh, jax.P(None, *leaf.sharding.spec))
  return jax.ShapeDtypeStruct((members, *leaf.shape), leaf.dtype, sharding=layout)
