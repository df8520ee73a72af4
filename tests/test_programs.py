"""What a run's compiled programs hold, send and give to the host: what was declared, and nothing beside it."""

import contextlib
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from alignjax import train
from alignjax.preflight import hlo
from alignjax.preflight import run as runs
from alignjax.preflight.command import planned
from alignjax.preflight.steps import make_program
from alignjax.runs.build import samples
from alignjax.runs.config import load_config
from alignjax.system import sharding
from alignjax.training import loop
from tests import smoke

SPLIT = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}  # parameters in 4 parts, rows in 4 others
SPLIT_ROWS = {"fsdp": 1, "sequence": 8}
CONSTANT = 1024  # bytes that a program may bring along: a few numbers per layer


@contextlib.contextmanager
def watched(see):
  """Within, a run's update is see(learner, arguments)."""
  make = loop.make_learner

  def make_learner(*args):
    learner = make(*args)
    return learner._replace(step=lambda *arguments: see(learner, arguments))

  with mock.patch.object(loop, "make_learner", make_learner):
    yield


def traced(name, mesh, *overrides):
  """A smoke config, and (step, its arguments, the step traced from shapes alone) of every program of its run."""
  config, words = planned(load_config(f"{smoke.CONFIGS / name}.py:smoke", overrides))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    program = make_program(config, words, mesh)
    batch, found = program.batch, []
    for step in program.steps:
      found.append((step, step.arguments(batch), step.function.trace(*step.arguments(batch))))
      if step.gives_batch:
        batch = found[-1][2].out_info | runs.host_columns(config, len(found[-1][2].out_info["tokens"]), mesh)
  return config, found


# --- closed over -----------------------------------------------------------------------------------------------------


def constants(jaxpr):
  """Bytes of every array that a program brings along and is not given."""
  if isinstance(jaxpr, core.ClosedJaxpr):
    yield from (np.dtype(x.dtype).itemsize * np.size(x) for x in jaxpr.consts)
    jaxpr = jaxpr.jaxpr
  for equation in jaxpr.eqns:
    yield from (np.asarray(x.val).nbytes for x in equation.invars if isinstance(x, core.Literal))
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, core.ClosedJaxpr)):
      if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
        yield from constants(value)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: lambda x: jax.lax.map(f, x[None])])
@pytest.mark.parametrize("make", [np.ones, jnp.ones])
def test_the_search_finds_what_is_closed_over(make, wrap):
  array = make((30, 20), np.float32)
  program = jax.jit(wrap(lambda x: x + array)).trace(jnp.zeros((30, 20))).jaxpr
  assert max(constants(program)) == 4 * 30 * 20


@pytest.mark.parametrize("name", sorted(path.stem for path in smoke.CONFIGS.glob("*.py") if path.stem != "shared"))
def test_the_steps_of_every_config_fit_together_and_bring_no_array_along(name, eight_devices):
  config, steps = traced(name, eight_devices)
  for step, _, program in steps:
    assert max(constants(program.jaxpr), default=0) <= CONSTANT, step.name
  names = {step.name for step, *_ in steps}
  assert names >= {"prepare", "update"}
  assert ("rollout" in names) == samples(config)


# --- as declared -----------------------------------------------------------------------------------------------------


def layouts(tree):
  """Of every array how it is partitioned."""
  return jax.tree.map(lambda x: x.sharding.spec, tree)


def share(tree):
  """The part of a tree's bytes that the first device holds."""
  leaves = jax.tree.leaves(tree)
  return sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(x.nbytes for x in leaves)


def test_the_arrays_of_a_run_lie_as_declared(tmp_path):
  config = smoke.config("dpo", **SPLIT, run__steps=2, run__eval_every=0, model__layers=1)
  references, shares = [], []
  make_prepare = loop.make_prepare

  def remembering(*args):
    prepare = make_prepare(*args)
    return lambda trees, *rest: references.append(trees.reference) or prepare(trees, *rest)

  def see(learner, arguments):
    state, batch = arguments[:2]
    assert layouts(state) == layouts(learner.state)
    assert layouts(references[-1]) == layouts(learner.params)
    rows = {name: x for name, x in batch.items() if x.ndim}
    assert set(layouts(rows).values()) == {sharding.spec("batch")}
    moments = state.opt_state[1]
    shares.append([share(tree) for tree in (state.params, moments.mu, moments.nu, references[-1], rows)])
    return learner.step(*arguments)

  with watched(see), mock.patch.object(loop, "make_prepare", remembering):
    train.fit(config, tmp_path / "run")
  assert len(shares) == 2  # as it begins, and as a step leaves it
  np.testing.assert_allclose(shares, 1 / 4, atol=0.01)  # norms are whole on every device


@pytest.mark.parametrize(
  ("third", "slots"), [("data", 0), ("sequence", 0), pytest.param("data", 8, marks=pytest.mark.slow)]
)
def test_the_cache_lies_as_declared_while_the_rollout_loops(third, slots):
  mesh = sharding.make_mesh(fsdp=2, tensor=2, **{third: 2})
  small = ("model.layers=1", "model.heads=4", "model.kv_heads=4", f"algorithm.slots={slots}")
  config, ((step, _, program), *_) = traced("grpo", mesh, *small)
  assert step.name == "rollout"
  rows = slots or config.data.rows * config.options.num_generations
  columns = config.data.row_length + config.options.max_new_tokens
  computations, _ = hlo.parse(program.lower().compile().as_text())
  loops = [i.shape for body in computations.values() for i in body if i.opcode == "while"]
  carried = {tuple(map(int, sizes.split(","))) for loop in loops for sizes in re.findall(r"\w\[([\d,]+)\]", loop)}
  ways = (2, 4) if third == "sequence" else (4, 2)  # of rows, and of heads
  here, size = (rows // ways[0], config.model.kv_heads // ways[1]), config.model.head_dim
  assert {shape for shape in carried if columns in shape} == {
    (*here, size, columns),  # keys
    (*here, columns, size),  # values
    (here[0], columns),  # segment ids
  }


# --- sent ------------------------------------------------------------------------------------------------------------


def test_a_dpo_step_gathers_each_weight_once_a_pass_and_reduces_each_gradient_once(eight_devices):
  config, steps = traced("dpo", eight_devices)
  model, rows = config.model, config.data.rows
  prepare, update = (hlo.analyse(program.lower().compile().as_text()) for _, _, program in steps[:2])
  matrices = 7 * model.layers + 1  # q, k, v, o, gate, up and down; the unembedding
  others = 7 / 8  # what a device lacks of an array
  weights = sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(steps[1][1][0].params) if x.sharding.spec != jax.P())
  tokens = 4 * rows * config.data.row_length  # of all rows: their embeddings are looked up where these lie
  embeddings = tokens // 8 * model.embed  # and sent to the devices that asked

  def bound(totals, passes):
    assert totals.count["all-gather"] <= passes * matrices + 1
    assert totals.wire["all-gather"] <= (passes * weights + tokens) * others
    assert totals.count["all-to-all"] <= passes
    assert totals.wire["all-to-all"] <= passes * embeddings * others

  bound(prepare, passes=1)  # of the reference, forward
  bound(update, passes=2)  # forward and backward
  assert prepare.wire["all-reduce"] < 1000  # counts
  assert update.count["all-reduce"] <= model.layers + 2  # a layer's gradients at once, the rest's, and their norm
  assert update.wire["all-reduce"] <= 2 * 1.01 * weights * others  # on CPUs; half, as a reduce-scatter, on TPUs
  assert {*prepare.count, *update.count} == {"all-gather", "all-to-all", "all-reduce"}


@pytest.mark.slow
def test_rows_over_devices_send_the_weights_of_whole_rows_and_move_queries_keys_and_values_between_tokens_and_heads():
  heads = ("model.heads=8", "model.kv_heads=8")
  (config, alone), (_, steps) = (traced("dpo", sharding.make_mesh(**sizes), *heads) for sizes in ({}, SPLIT_ROWS))
  whole, split = (hlo.analyse(program.lower().compile().as_text()) for _, _, program in (alone[1], steps[1]))
  for kind in ("all-gather", "all-reduce"):
    assert split.wire[kind] <= 1.01 * whole.wire[kind]
  model, tokens = config.model, 4 * config.data.rows * config.data.row_length
  vectors = model.embed + model.layers * 4 * model.heads * model.head_dim  # of a token: looked up; q, k, v and out
  np.testing.assert_allclose(split.wire["all-to-all"], 2 * tokens * vectors / 8 * 7 / 8, rtol=0.01)


# --- given to the host -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_metrics_go_to_the_host_one_step_late_and_only_rows_and_the_step_come_from_it(tmp_path):
  config = smoke.config("dpo", run__steps=8, run__eval_every=0, run__save_every=8)
  array = type(jnp.zeros(()))
  steady = range(3, 7)  # before: programs are made; after: the last checkpoint
  taken = {}  # id -> (step, metric), and the metric so that its id stays its own
  fetched = {step: [] for step in steady}  # what the host asked for between the update of a step and the next
  waits, put, now = [], dict.fromkeys(steady, 0), 0
  value, fold_in, to_mesh = array._value, jax.random.fold_in, sharding.to_mesh

  def see(learner, arguments):
    nonlocal now
    state, metrics = learner.step(*arguments)
    now += 1
    taken.update({id(x): ((now, name), x) for name, x in metrics.items()})
    jax.config.update("jax_transfer_guard_host_to_device", "disallow" if now in steady else "allow")
    return state, metrics

  def fetch(x):
    if now in steady:
      fetched[now].append(taken[id(x)][0] if id(x) in taken else x.shape)
    return value.fget(x)

  def place(*args):
    if now in steady:
      put[now] += 1
    return to_mesh(*args)

  def fold_in_step(key, step):
    with jax.transfer_guard_host_to_device("allow"):
      return fold_in(key, step)

  try:
    with (
      watched(see),
      mock.patch.object(array, "_value", property(fetch)),
      mock.patch.object(sharding, "to_mesh", place),
      mock.patch.object(jax.random, "fold_in", fold_in_step),
      mock.patch.object(jax, "block_until_ready", lambda x: waits.append(now) or x),
    ):
      train.fit(config, tmp_path / "run")
  finally:
    jax.config.update("jax_transfer_guard_host_to_device", "allow")
  names = {name for (step, name), _ in taken.values() if step == 1}
  for step in steady:
    assert sorted(fetched[step]) == sorted((step - 1, name) for name in names)
  assert set(put.values()) == {1}
  assert not {*waits} & {*steady}
