"""How rows are packed, padded, split and sharded shows in no reward model's step, of pairs, rankings or steps.

The model is that of test_preference_invariance.py, with a head.
"""

import functools

import jax
import numpy as np
import pytest

from alignjax.algorithms import ALGORITHMS
from alignjax.system import sharding
from alignjax.system.microbatch import sum_over_microbatches
from alignjax.types import Trees
from tests import batches, made
from tests.algorithms.test_preference_invariance import MODEL, VOCAB, WIDTH, assert_same, padded
from tests.algorithms.test_preference_invariance import params as without_head
from tests.conftest import make_mesh

OBJECTIVES = [("reward", "bradley_terry"), ("reward", "plackett_luce"), ("process_reward", "step_logistic")]
TOKENS = ("tokens", "segment_ids", "positions", "loss_mask", "step_labels")


def gradient_and_metrics(objective, batch, microbatches=1, mesh="1 device"):
  """Loss, metrics and gradient of an objective, as a step computes them."""
  name, loss = objective
  algorithm, hparams = made.make(ALGORITHMS[name], MODEL, loss, microbatches), made.hparams(ALGORITHMS[name], loss)
  params = without_head(0) | {"score": jax.random.normal(jax.random.key(5), (WIDTH, 1))}

  @jax.jit
  def run(params, batch):
    value_and_grad = jax.value_and_grad(algorithm.loss, has_aux=True)
    prepared = algorithm.prepare(Trees(), batch, None)
    return sum_over_microbatches(lambda part: value_and_grad(params, part, hparams), prepared, microbatches)

  mesh = make_mesh(mesh)
  with jax.set_mesh(mesh):
    return jax.device_get(run(params, sharding.to_mesh(batch, mesh)))


@functools.cache
def packed(objective):
  name, loss = objective
  return getattr(batches, made.kind(ALGORITHMS[name], loss))(16, 48, 2, VOCAB)


@functools.cache
def expected(objective):
  return gradient_and_metrics(objective, packed(objective))


def unpack(batch):
  """The same examples, one to a row."""
  sides = batch["ranks"].shape[-1] if "ranks" in batch else 2 if "margins" in batch else 1
  rows, columns = np.nonzero(batch["example_mask"])
  names = [name for name in TOKENS if name in batch]
  out = {name: np.zeros((len(rows), batch[name].shape[1]), batch[name].dtype) for name in names}
  for row, (source, example) in enumerate(zip(rows, columns, strict=True)):
    place = (batch["segment_ids"][source] - 1) // sides == example
    for name in names:
      out[name][row, : place.sum()] = batch[name][source, place]
    out["segment_ids"][row, : place.sum()] -= sides * example
  return out | {name: batch[name][rows, columns][:, None] for name in batch.keys() - out.keys()}


def wider(batch):
  """Rows of 9 more columns that hold nothing."""
  out = padded(batch)
  if "step_labels" in batch:
    out["step_labels"] = np.pad(batch["step_labels"], ((0, 0), (0, 9)))
  return out


VARIANTS = {
  "one example per row, and padding": lambda o: gradient_and_metrics(o, wider(unpack(packed(o)))),
  "microbatches": lambda o: gradient_and_metrics(o, packed(o), microbatches=4),
  "8 devices": lambda o: gradient_and_metrics(o, packed(o), microbatches=2, mesh="8 devices"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o[1])
def test_nothing_of_the_layout_shows(objective, variant):
  got = VARIANTS[variant](objective)
  assert_same(got, expected(objective))
  (loss, _), gradient = got
  assert np.isfinite(loss)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_a_ranking_of_pairs_is_the_reward_model_of_pairs():
  pairs = packed(OBJECTIVES[0]) | {"margins": 0 * packed(OBJECTIVES[0])["margins"]}
  ranked = pairs | {"ranks": pairs["example_mask"][..., None] * np.array([1, 2], np.float32)}
  (value, metrics), gradient = gradient_and_metrics(OBJECTIVES[1], ranked)
  (expected_value, expected_metrics), expected_gradient = gradient_and_metrics(OBJECTIVES[0], pairs)
  assert_same((value, gradient), (expected_value, expected_gradient))
  finish = made.make(ALGORITHMS["reward"], MODEL, "plackett_luce").finish
  metrics = finish(jax.tree.map(float, metrics))
  assert metrics.pop("comparisons") == pytest.approx(1)
  assert metrics == pytest.approx(jax.tree.map(float, expected_metrics), rel=1e-5, abs=1e-6)


def test_rankings_without_a_comparison_have_no_accuracy():
  batch = packed(OBJECTIVES[1])
  batch = batch | {"ranks": (batch["ranks"] > 0).astype(np.float32)}
  (value, metrics), _ = gradient_and_metrics(OBJECTIVES[1], batch)
  metrics = made.make(ALGORITHMS["reward"], MODEL, "plackett_luce").finish(jax.tree.map(float, metrics))
  assert np.isfinite(value)
  assert "rewards/accuracies" not in metrics
  assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-6)
