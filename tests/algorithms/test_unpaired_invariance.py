"""How rows are packed, padded, split and sharded shows in no objective on labelled completions; nor does a kill.

The model is that of test_preference_invariance.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import unpaired
from alignjax.system import sharding
from alignjax.system.microbatch import sum_over_microbatches
from alignjax.types import Mean
from tests import batches, made, short_run
from tests.algorithms.test_preference_invariance import MODEL, VOCAB, assert_same, params
from tests.conftest import make_mesh

OBJECTIVES = [*unpaired.LOSSES, "kto:0.5+bco"]
ROWS = ("tokens", "segment_ids", "positions", "loss_mask")


def gradient_and_metrics(loss, batch, microbatches=1, mesh="1 device"):
  """Loss, metrics and gradient of an objective, as a step computes them."""
  algorithm = made.make(unpaired.RECIPE, MODEL, loss, microbatches)
  hparams = made.hparams(unpaired.RECIPE, loss) | {"beta": 0.3, "desirable_weight": 1.2}
  running = {name: jnp.float32(value + 0.5) for name, value in algorithm.running.items()}

  @jax.jit
  def run(policy, reference, batch):
    prepared = algorithm.prepare(algorithm.trees({"reference": reference}, policy), batch, None)
    value_and_grad = jax.value_and_grad(algorithm.loss, has_aux=True)
    out = sum_over_microbatches(lambda part: value_and_grad(policy, part, hparams), prepared, microbatches)
    return out, prepared.running

  mesh = make_mesh(mesh)
  with jax.set_mesh(mesh):
    return jax.device_get(run(params(0), params(1), sharding.to_mesh(batch, mesh).updated(running=running)))


@functools.cache
def packed():
  return batches.mismatched(rows=16, length=32, examples=3, vocab=VOCAB)


@functools.cache
def expected(loss):
  return gradient_and_metrics(loss, packed())


def unpack(batch):
  """The same examples, one to a row, mismatched rows made anew."""
  rows, columns = np.nonzero(batch["example_mask"])
  out = {name: np.zeros((len(rows), batch[name].shape[1]), batch[name].dtype) for name in ROWS}
  for row, (source, example) in enumerate(zip(rows, columns, strict=True)):
    place = batch["segment_ids"][source] == example + 1
    for name in ROWS:
      out[name][row, : place.sum()] = batch[name][source, place]
    out["segment_ids"][row, : place.sum()] = 1
  single = ("example_mask", "record_ids", "weights", "labels")
  out |= {name: batch[name][rows, columns][:, None] for name in single}
  return out | batches.beside(out, 48)


def padded(batch):
  """Rows of 9 more columns that hold nothing."""
  return batch | {
    prefix + name: np.pad(batch[prefix + name], ((0, 0), (0, 9))) for name in ROWS for prefix in ("", "kl_")
  }


VARIANTS = {
  "one example per row, and padding": lambda loss: gradient_and_metrics(loss, padded(unpack(packed()))),
  "microbatches": lambda loss: gradient_and_metrics(loss, packed(), microbatches=4),
  "8 devices": lambda loss: gradient_and_metrics(loss, packed(), microbatches=2, mesh="8 devices"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss", OBJECTIVES)
def test_nothing_of_the_layout_shows(loss, variant):
  got = VARIANTS[variant](loss)
  assert_same(got, expected(loss))
  ((value, metrics), gradient), running = got
  assert np.isfinite(value)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
  if "kto" in loss:
    assert metrics["kl"] > 0
    assert metrics["kl_variance"] > 0
  if "bco" in loss:
    assert running["ratio_count"] == pytest.approx(0.5 + packed()["weights"].sum(), rel=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("loss", unpaired.LOSSES)
def test_a_batch_of_one_class_is_finite_and_has_no_metrics_of_the_other(loss, label):
  batch = packed() | {"labels": label * packed()["example_mask"]}
  ((value, metrics), gradient), _ = gradient_and_metrics(loss, batch)
  assert np.isfinite([value, *(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))]).all()
  present, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
  metrics = unpaired.by_class(jax.tree.map(float, metrics))
  assert np.isfinite([metrics[f"rewards/{present}"], metrics[f"logps/{present}"]]).all()
  assert not {f"rewards/{absent}", f"logps/{absent}", "rewards/margins"} & metrics.keys()


def test_means_over_a_class_are_those_of_its_examples_over_several_batches():
  parts = [{"share/chosen": 0.25, "share/rejected": 0.75}, {"share/chosen": 1.0, "share/rejected": 0.0}]
  for part, (chosen, rejected) in zip(parts, ((1.0, 3.0), (5.0, 0.0)), strict=True):
    for name in ("rewards", "logps"):
      part[f"{name}/chosen"] = Mean(part["share/chosen"] * chosen, part["share/chosen"])
      part[f"{name}/rejected"] = Mean(part["share/rejected"] * rejected, part["share/rejected"])
  total = jax.tree.map(lambda x, y: (4 * x + 2 * y) / 6, *parts)  # of 4 examples, and of 2
  metrics = unpaired.by_class(total)
  assert metrics["rewards/chosen"] == pytest.approx((1 + 5 + 5) / 3)
  assert metrics["rewards/rejected"] == pytest.approx(3)
  assert metrics["rewards/margins"] == pytest.approx(11 / 3 - 3)


def test_kto_is_one_half_when_policy_is_reference(config, one_device, mismatched_batch):
  run = short_run.make("unpaired", config, one_device)
  assert run.losses(mismatched_batch, steps=1)[0] == pytest.approx(0.5, abs=1e-6)
