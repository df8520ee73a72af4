"""What holds of every algorithm: its contract, and that neither devices nor the vocabulary's size show in a step."""

import dataclasses
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import ALGORITHMS
from alignjax.data.format import KINDS
from alignjax.losses import chunks
from alignjax.model import ModelConfig, decoder
from alignjax.system import sharding
from alignjax.types import Batch
from tests import batches, made, short_run
from tests.conftest import make_mesh

# What samples has batches of prompts and its own tests: test_online.py.
OFFLINE = [name for name, module in ALGORITHMS.items() if not module.online]


@pytest.fixture
def batch_of(request):
  """(algorithm, loss) -> a batch of the kind that it takes."""
  return lambda algorithm, loss="": request.getfixturevalue(f"{short_run.data_kind(algorithm, loss)}_batch")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_states_its_facts(name):
  module = ALGORITHMS[name]
  assert {made.kind(module, loss) for loss in ("", *module.losses)} <= KINDS.keys()
  assert module.head in ("none", "scalar")
  assert all(getattr(f, "loss", f).__name__ == loss for loss, f in module.losses.items())
  assert [*inspect.signature(module.make).parameters] == ["model", "terms", "options", "parts"]
  assert dataclasses.is_dataclass(module.options)


class Reads(dict):
  """A dict that notes which of its entries were read."""

  def __init__(self, values):
    super().__init__(values)
    self.read = set()

  def __getitem__(self, name):
    self.read.add(name)
    return super().__getitem__(name)


@pytest.mark.parametrize(("name", "loss"), [(name, loss) for name in OFFLINE for loss in ALGORITHMS[name].losses])
def test_every_hyper_parameter_of_a_loss_is_read_and_no_other(name, loss, config, batch_of):
  module = ALGORITHMS[name]
  values = made.hparams(module, loss)
  assert all(isinstance(value, float) for value in values.values())
  model = decoder.make(dataclasses.replace(config, head=module.head))
  algorithm, params = made.make(module, model, loss), model.abstract()
  hparams = Reads({key: jnp.float32(value) for key, value in values.items()})

  def run(params, batch):
    others = dict.fromkeys(algorithm.reads, params)
    prepared = algorithm.prepare(algorithm.trees(others, params), batch, jax.random.key(0))
    return algorithm.loss(algorithm.for_loss(others) | params, prepared, hparams)[0]

  assert jax.eval_shape(run, params, Batch(batch_of(name, loss), running=dict(algorithm.running))).shape == ()
  assert hparams.read == values.keys()


@pytest.mark.parametrize("name", OFFLINE)
def test_prepare_keeps_the_batch_and_adds_the_count(name, config, one_device, batch_of):
  run, batch = short_run.make(name, config, one_device), batch_of(name)
  with jax.set_mesh(one_device):
    others = {name: run.fresh().params for name in run.algorithm.reads}
    placed = sharding.to_mesh(batch, one_device)  # as `losses` has it: one program
    prepared = run.prepare(run.algorithm.trees(others, run.fresh().params), placed, jax.random.key(0))
  for column, values in batch.items():
    np.testing.assert_array_equal(prepared.rows[column], values)
  assert prepared.totals[run.algorithm.count].shape == ()
  assert prepared.totals[run.algorithm.count] > 1


@pytest.mark.parametrize("name", OFFLINE)
def test_a_batch_without_examples_costs_nothing_and_is_finite(name, config, one_device, batch_of):
  # A host whose data has run out sends such rows.
  run, batch = short_run.make(name, config, one_device), batch_of(name)
  empty = {column: np.zeros_like(values) for column, values in batch.items()}
  with jax.set_mesh(one_device):
    state = run.fresh()
    others = {name: jax.tree.map(jnp.copy, state.params) for name in run.algorithm.reads}
    placed = sharding.to_mesh(empty, one_device)
    prepared = run.prepare(run.algorithm.trees(others, state.params), placed, state.key)
    state, metrics = run.step(state, prepared, run.hparams, run.algorithm.for_loss(others))
  assert float(metrics["loss"]) == 0
  assert int(state.skipped) == 0


@pytest.mark.parametrize("name", OFFLINE)
def test_devices_do_not_change_the_training(name, config, one_device, eight_devices, batch_of):
  expected = short_run.make(name, config, one_device).losses(batch_of(name), steps=4)
  losses = short_run.make(name, config, eight_devices).losses(batch_of(name), steps=4)  # other meshes: test_drift.py
  np.testing.assert_allclose(losses, expected, atol=1e-5)
  assert losses[-1] < losses[0]


# --- no [tokens, vocabulary] -----------------------------------------------------------------------------------------

VOCAB = 4099  # a prime: no other size is a multiple of it
ROWS, LENGTH = 32, 128
CHUNK = 32  # tokens per device whose logits may exist at one time


def tokens_beside_the_vocabulary(compiled) -> int:
  """The most numbers per vocabulary entry of any array in a compiled program: D for weights, tokens for logits."""
  shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", compiled.as_text())
  sizes = {tuple(map(int, shape.split(","))) for shape in shapes}
  return max(math.prod(shape) // VOCAB for shape in sizes if VOCAB in shape)


def test_the_search_finds_logits_where_there_are_some():
  dense = lambda h, u: jax.nn.log_softmax(jnp.sin(h @ u.T)).sum()
  h, u = jnp.zeros((ROWS, LENGTH, 16)), jnp.zeros((VOCAB, 16))
  assert tokens_beside_the_vocabulary(jax.jit(jax.grad(dense)).lower(h, u).compile()) == ROWS * LENGTH


@pytest.mark.parametrize(
  ("name", "devices"),
  [("preference", "1 device"), ("preference", "8 devices"), ("sft", "1 device"), ("distillation", "1 device")],
)
def test_no_array_of_a_compiled_step_is_tokens_by_vocabulary(name, devices, monkeypatch):
  monkeypatch.setattr(chunks, "CHUNK_TOKENS", CHUNK)
  config = ModelConfig(vocab=VOCAB, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=24)
  mesh = make_mesh(devices)
  make_batch = getattr(batches, short_run.data_kind(name))
  run = short_run.make(name, config, mesh)
  with jax.set_mesh(mesh):
    state = run.fresh()
    batch = sharding.to_mesh(make_batch(ROWS, LENGTH, 2, VOCAB), mesh)
    others = dict.fromkeys(run.algorithm.reads, state.params)
    prepare = run.prepare.lower(run.algorithm.trees(others, state.params), batch, state.key).compile()
    prepared = prepare(run.algorithm.trees(others, state.params), batch, state.key)
    step = run.step.lower(state, prepared, run.hparams, run.algorithm.for_loss(others)).compile()
  logits_bytes = 4 * ROWS * LENGTH * VOCAB // mesh.size  # per device, of the step that would hold them
  assert tokens_beside_the_vocabulary(step) <= CHUNK
  assert step.memory_analysis().temp_size_in_bytes < logits_bytes / 2
  if run.algorithm.reads:
    assert tokens_beside_the_vocabulary(prepare) <= CHUNK
    assert prepare.memory_analysis().temp_size_in_bytes < logits_bytes / 2
