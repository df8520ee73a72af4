"""A label that is right with probability q: the pair twice, with weights q and 1 - q, the second one turned over."""

import jax
import numpy as np
import pytest

from alignjax.algorithms import unpaired
from tests.algorithms import test_preference_invariance as pairs
from tests.algorithms import test_reward_invariance as rewards
from tests.algorithms import test_unpaired_invariance as labelled

TOKENS = ("tokens", "segment_ids", "positions", "loss_mask")
BRADLEY_TERRY = rewards.OBJECTIVES[0]


def doubted(batch, least=0.05):
  """The batch with a probability for each pair's label; of half of the pairs above 1/2."""
  shape = batch["weights"].shape
  return batch | {"confidences": np.random.default_rng(3).uniform(least, 0.95, shape).astype(np.float32)}


def turned(batch):
  """The rows with the sides of each pair in the other order; a third completion stays."""
  out = {name: values.copy() for name, values in batch.items()}
  texts = 2 * batch["weights"].shape[1]
  for row, numbers in enumerate(batch["segment_ids"]):
    is_side = (numbers > 0) & (numbers <= texts)
    new = np.where(is_side, (numbers - 1 ^ 1) + 1, np.where(numbers > 0, numbers, 99))
    order = np.argsort(new, kind="stable")  # segments lie in a row in their order, and padding at its end
    for name in TOKENS:
      out[name][row] = batch[name][row, order]
    out["segment_ids"][row] = np.where(new == 99, 0, new)[order]
  return out


def twice(batch):
  """The pairs as labelled, and the pairs turned over, in rows of their own; the weights have the probabilities."""
  labelled = {name: values for name, values in batch.items() if name != "confidences"}
  q = batch["confidences"]
  sides = (labelled | {"weights": batch["weights"] * q}, turned(labelled) | {"weights": batch["weights"] * (1 - q)})
  return {name: np.concatenate([side[name] for side in sides]) for name in labelled}


def near(got, expected):
  """To 1e-6 of the largest entry of each array."""
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * (1 + np.abs(y).max()))
  jax.tree.map(close, got, expected)


@pytest.mark.parametrize("name", pairs.OBJECTIVES)
def test_a_doubted_pair_is_two_pairs_whatever_the_objective(name):
  batch = doubted(pairs.packed(name))
  got = pairs.gradient_and_metrics(name, batch)
  same = near
  if name == "f-DPO":  # of exponentials of ratios: where texts lie in a row alone changes its gradient by 8e-7
    same = pairs.assert_same
  same(got, pairs.gradient_and_metrics(name, twice(batch)))
  ((loss, _), _), ((certain, _), _) = got, pairs.expected(name)
  assert abs(loss - certain) > 1e-4 or name == "WPO"


def test_a_doubted_pair_is_two_pairs_for_a_reward_model():
  batch = doubted(rewards.packed(BRADLEY_TERRY))
  got = rewards.gradient_and_metrics(BRADLEY_TERRY, batch)
  near(got, rewards.gradient_and_metrics(BRADLEY_TERRY, twice(batch)))


@pytest.mark.parametrize("name", ["dpo", "TPO", "aot"])
@pytest.mark.parametrize("variant", ["microbatches", "8 devices"])
def test_doubt_passes_through_parts_and_devices(name, variant):
  batch, settings = doubted(pairs.packed(name)), {"microbatches": 2}
  if variant == "8 devices":
    settings["mesh"] = variant
  pairs.assert_same(pairs.gradient_and_metrics(name, batch, **settings), pairs.gradient_and_metrics(name, batch))


@pytest.mark.parametrize("name", ["dpo", "aot", "sft"])
def test_a_label_that_is_surely_wrong_is_the_turned_pair(name):
  batch = pairs.packed(name)
  got = pairs.gradient_and_metrics(name, batch | {"confidences": np.zeros_like(batch["weights"])})
  near(got, pairs.gradient_and_metrics(name, turned(batch)))


@pytest.mark.parametrize("name", ["dpo", "aot", "sft"])
def test_without_doubt_nothing_changes(name):
  batch = pairs.packed(name)
  certain = batch | {"confidences": np.ones_like(batch["weights"])}
  jax.tree.map(np.testing.assert_array_equal, pairs.gradient_and_metrics(name, certain), pairs.expected(name))


def test_a_doubted_label_is_two_examples():
  for name in unpaired.LOSSES:
    batch = labelled.packed()
    q = np.random.default_rng(4).uniform(0.05, 0.95, batch["weights"].shape).astype(np.float32)
    got = labelled.gradient_and_metrics(name, batch | {"labels": q * batch["example_mask"]})
    parts = [
      {"labels": label * batch["example_mask"], "weights": batch["weights"] * share}
      for label, share in ((1, q), (0, 1 - q))
    ]
    both = {key: np.concatenate([(batch | part)[key] for part in parts]).astype(batch[key].dtype) for key in batch}
    near(got, labelled.gradient_and_metrics(name, both))
