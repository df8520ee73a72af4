"""Every program that a run executes, with the shapes of what it takes: as training builds them, without an array."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.algorithms import ALGORITHMS, Algorithm, Parts, rollout
from alignjax.algorithms.algorithm import Special
from alignjax.algorithms.online_rows import HostRewards
from alignjax.data.format import KINDS
from alignjax.data.settings import check_sharing
from alignjax.data.stream import fill_row, make_layout, stack
from alignjax.model import decoder
from alignjax.model.decoder import Model
from alignjax.runs.build import check_rows, completions_of, longest_row, make_model, records_of, samples, sampling_of
from alignjax.runs.config import Config
from alignjax.runs.frozen_params import ConstantTrees
from alignjax.system import sharding
from alignjax.training.learner import make_learner
from alignjax.types import Batch

RESPONSES = 4  # of a ranking, where data would say


class Vocabulary(NamedTuple):
  """The facts about a tokenizer that decide a program: its size, and the ids of stop and padding."""

  vocab_size: int
  stop_id: int = 1
  pad_id: int = 0


class Step(NamedTuple):
  """One compiled function of a run.

  Attributes:
    name: prepare, rollout, update or evaluate.
    function: jitted.
    arguments: batch -> what it takes, abstract and placed.
    reads: the names of the run's resident trees among these.
    turns: the most turns of a loop whose end depends on data.
    gives_batch: True if it returns the batch of the next step.
  """

  name: str
  function: jax.stages.Wrapped
  arguments: Callable[[Batch], tuple]
  reads: frozenset[str]
  turns: int = 1
  gives_batch: bool = False


class Program(NamedTuple):
  """A run as steps.

  Attributes:
    steps: in order.
    batch: abstract, of the data.
    resident: abstract trees that stay in memory all the time, whether a step reads them or not.
    tokens: of an optimizer step's rows, padding included.
    model: of the run, with what is trained and what is held.
  """

  steps: list[Step]
  batch: Batch
  resident: Mapping[str, Any]
  tokens: int
  model: Model


def make_program(config: Config, vocabulary: Vocabulary, mesh: jax.sharding.Mesh) -> Program:
  """Makes the steps of a run on a mesh, which must be the current one.

  Args:
    config: of the run; other runs that it names need not exist: their models are taken to be of the policy's size.
    vocabulary: of the tokenizer.
    mesh: of devices that need not be present.

  Raises:
    InputError: sizes that the mesh does not divide, or a config that training would refuse.
  """
  model = make_model(config, vocabulary)
  algorithm = _algorithm(config, model, vocabulary)
  check_rows(config, mesh)

  learner = make_learner(config.optimizer, config.run.steps, model, algorithm, mesh)

  def whole(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))

  state = learner.state
  _, held = model.split(model.abstract(mesh))
  columns = _cached_columns(config, algorithm)
  constants = ConstantTrees(algorithm, model, mesh, held)
  constant = {name: constants.abstract(name) for name in algorithm.uncached(columns)}
  hparams = {name: whole((), jnp.float32) for name in config.hparams}
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = whole(key.shape, key.dtype)
  others = constant | state.synced
  trees = algorithm.trees(others, held | state.params, hparams)

  policy = {"parameters", "base"}
  resident_of = {"reference": "base"} if held else {}
  of_prepare = {resident_of.get(name, name) for name in algorithm.reads}
  if algorithm.reads_policy:
    of_prepare |= policy
  of_loss = policy | {resident_of.get(name, name) for name in algorithm.loss_reads}

  def prepares(name, function, turns=1):
    return Step(
      name, jax.jit(function), lambda batch: (trees, batch, key), frozenset(of_prepare), turns, gives_batch=True
    )

  steps = []
  if algorithm.rollout:
    steps.append(prepares("rollout", algorithm.rollout, sampling_of(config).max_new_tokens))
  steps.append(prepares("prepare", algorithm.prepare))
  of_update = frozenset(of_loss | {"optimizer"} | set(state.synced))

  def update(batch):
    return (state, batch, hparams, held | algorithm.for_loss(others))

  steps.append(Step("update", learner.step, update, of_update))
  if config.data.eval or config.data.holdout:

    def evaluate(params, batch, hparams):
      return algorithm.loss(params, batch.updated(totals=algorithm.counts(batch.rows)), hparams)

    whole_params = algorithm.for_loss(others) | held | state.params
    steps.append(Step("evaluate", jax.jit(evaluate), lambda batch: (whole_params, batch, hparams), frozenset(of_loss)))

  resident = {"parameters": state.params, "optimizer": state.opt_state, "base": held} | state.synced | constant
  if held:  # is the reference too
    resident.pop("reference", None)
  tokens = config.data.rows * completions_of(config) * longest_row(config)
  return Program(steps, _batch(config, algorithm, columns, mesh), resident, tokens, model)


def _algorithm(config: Config, model: Model, vocabulary: Vocabulary) -> Algorithm:
  """As `build.make_algorithm`, but the models of other runs are taken to be of the policy's size."""
  recipe = ALGORITHMS[config.algorithm.name]

  def model_with(head: str) -> Model:
    tied = head == "scalar" or model.config.tied  # what scores needs no unembedding
    return decoder.make(dataclasses.replace(model.config, head=head, score_heads=1, tied=tied))

  models = tuple((name, model_with(head)) for name, head in recipe.models.items() if getattr(config.options, name))
  parts = Parts(config.optimizer.microbatches, models, Special(vocabulary.stop_id, vocabulary.pad_id))
  return recipe.build(model, config.algorithm.loss, config.options, parts)


def _cached_columns(config: Config, algorithm: Algorithm) -> tuple[str, ...]:
  return tuple(algorithm.columns) if config.run.reference_cache else ()


def _batch(config: Config, algorithm: Algorithm, columns: tuple[str, ...], mesh: jax.sharding.Mesh) -> Batch:
  """Returns the batch that the data would give, abstract."""
  c = config.data
  kind = records_of(config)
  check_sharing(c, kind)
  texts = RESPONSES if kind == "ranked" else KINDS[kind].completions
  layout = make_layout(c, kind, texts=texts, pad_id=0)
  row = stack([fill_row([], layout)])
  row |= {name: np.zeros((1, layout.examples, *algorithm.columns[name].shape), np.float32) for name in columns}
  rows = sharding.batch_sharding(mesh)

  def place(shape, dtype) -> Any:  # in place of an array
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

  scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
  return Batch(
    {name: place((c.rows, *x.shape[1:]), x.dtype) for name, x in row.items()},
    running=dict.fromkeys(algorithm.running, scalar),
  )


def decode_reads(config: Config, model: Model, mesh: jax.sharding.Mesh) -> dict[str, int]:
  """Computes the bytes that each device must read for one token of every row: {"weights", "cache"}.

  The weights count as they are computed. {} if nothing is sampled, or (Nash-MD) from a mixture of two models.
  """
  if not samples(config) or config.algorithm.name == "nash_md":
    return {}
  options = sampling_of(config)
  computed = jnp.dtype(model.config.dtype).itemsize

  def size(x):
    return math.prod(x.sharding.shard_shape(x.shape)) * min(x.dtype.itemsize, computed)

  unread = ("value",) if model.config.tied else ("value", "embed")  # a critic; an embedding, but for its rows
  read = {name: tree for name, tree in model.abstract(mesh).items() if name not in unread}
  rows = options.slots or config.data.rows * options.num_generations
  columns = config.data.row_length + options.max_new_tokens
  empty = jax.jit(lambda zero: jax.tree.map(lambda x: x + zero.astype(x.dtype), model.init_cache(rows, columns)))
  zero = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))  # says where the cache is
  memory = empty.lower(zero).compile().memory_analysis()
  assert memory is not None
  return {"weights": sum(map(size, jax.tree.leaves(read))), "cache": memory.output_size_in_bytes}


def with_host_rewards(config: Config, batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
  """Returns the abstract batch of a rollout with the rewards of Python functions, if the run has such."""
  if not samples(config) or not (functions := rollout.host_rewards(sampling_of(config))):
    return batch

  def place(*shape) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.batch_sharding(mesh))

  host = HostRewards(place(batch.size, len(functions)), place(batch.size))
  return dataclasses.replace(batch, rows=batch.rows.replace(host=host))
