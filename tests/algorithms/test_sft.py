"""Supervised fine-tuning of a decoder."""

import jax
import numpy as np
import pytest

from alignjax.algorithms import sft
from alignjax.types import Batch, Trees
from tests import made
from tests.model import reference


@pytest.fixture(scope="module")
def run(model, params):
  """batch -> (loss, metrics) as floats."""
  algorithm = made.make(sft.RECIPE, model)
  compiled = jax.jit(lambda batch: algorithm.loss(params, algorithm.prepare(Trees(), Batch(batch), None), {}))

  def loss(batch):
    value, metrics = compiled(batch)
    return float(value), {name: float(x) for name, x in metrics.items()}

  return loss


def test_loss_and_metrics_equal_the_float64_reference(config, params, run, sft_batch):
  hidden = reference.packed_hidden_states(config, params, sft_batch)
  logps = reference.log_softmax(hidden[:, :-1] @ np.float64(params["embed"]).T)
  targets = sft_batch["tokens"][:, 1:]
  picked = np.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
  weights = np.pad(sft_batch["weights"], ((0, 0), (1, 0)))
  weights = np.take_along_axis(weights, sft_batch["segment_ids"], axis=1) * sft_batch["loss_mask"]
  mean = lambda x: float((weights[:, 1:] * x).sum() / weights.sum())
  loss, metrics = run(sft_batch)
  assert loss == pytest.approx(mean(-picked), rel=1e-5)
  assert metrics == pytest.approx(
    {
      "mean_token_accuracy": mean(logps.argmax(axis=-1) == targets),
      "entropy": mean(-(np.exp(logps) * logps).sum(axis=-1)),
    },
    rel=1e-4,
  )


def test_an_example_of_weight_two_is_the_example_twice(run, sft_batch):
  ones = sft_batch | {"weights": sft_batch["example_mask"]}
  heavy = ones | {"weights": ones["weights"] * np.where(np.arange(16) < 8, 2, 1)[:, None].astype(np.float32)}
  twice = {name: np.concatenate([x, x[:8]]) for name, x in ones.items()}
  assert run(heavy)[0] == pytest.approx(run(twice)[0], rel=1e-6)


def test_only_completion_tokens_are_learned(run, sft_batch):
  padding = sft_batch["segment_ids"] == 0
  changed = sft_batch | {"tokens": np.where(padding, 7, sft_batch["tokens"])}
  assert run(changed)[0] == run(sft_batch)[0]
  unmasked = sft_batch | {"loss_mask": (sft_batch["segment_ids"] > 0).astype(np.float32)}
  assert run(unmasked)[0] != pytest.approx(run(sft_batch)[0], rel=1e-4)
