"""Bradley-Terry reward modelling with a decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import reward
from alignjax.model import decoder
from tests.model import reference


@pytest.fixture(scope="module")
def model_with_head(config):
  return decoder.make(dataclasses.replace(config, head="scalar"))


@pytest.fixture(scope="module")
def params_with_head(config, params):
  score = jax.random.normal(jax.random.key(4), (config.embed, 1))
  return params | {"score": score}


def float64_rewards(config, params, batch):
  """Rewards [B, P, 2] at the last token of each side by the float64 reference; 0 where there is no pair."""
  values = reference.packed_hidden_states(config, params, batch) @ np.float64(params["score"][:, 0])
  rewards = np.zeros((*batch["weights"].shape, 2))
  for row, pair, side in np.ndindex(rewards.shape):
    columns = np.nonzero(batch["segment_ids"][row] == 2 * pair + side + 1)[0]
    if len(columns):
      rewards[row, pair, side] = values[row, columns[-1]]
  return rewards


def test_rewards_loss_and_metrics_equal_the_float64_reference(
  config, model_with_head, params_with_head, preference_batch
):
  expected = float64_rewards(config, params_with_head, preference_batch)
  chosen, rejected = expected[..., 0], expected[..., 1]
  weights = preference_batch["weights"] / preference_batch["weights"].sum()
  mean = lambda x: float((weights * x).sum())
  likelihood = np.logaddexp(0, -(chosen - rejected - preference_batch["margins"]))

  algorithm = reward.make(model_with_head)
  prepared = algorithm.prepare({}, preference_batch, None)
  rewards = jax.jit(lambda p: reward.pair_rewards(model_with_head, p, prepared))(params_with_head)
  np.testing.assert_allclose(rewards, expected, atol=1e-4)
  hparams = {"center_coefficient": jnp.float32(0.05)}
  loss, metrics = jax.jit(algorithm.loss)(params_with_head, prepared, hparams)
  assert float(loss) == pytest.approx(mean(likelihood + 0.05 * (chosen + rejected) ** 2), rel=1e-5)
  assert {name: float(x) for name, x in metrics.items()} == pytest.approx(
    {
      "rewards/chosen": mean(chosen),
      "rewards/rejected": mean(rejected),
      "rewards/margins": mean(chosen - rejected),
      "rewards/accuracies": mean(chosen > rejected),
    },
    rel=1e-4,
    abs=1e-4,
  )


def test_a_fresh_head_costs_log2_and_counts_ties_as_wrong(config, model_with_head, params, preference_batch):
  algorithm = reward.make(model_with_head)
  batch = preference_batch | {"margins": np.zeros_like(preference_batch["margins"])}
  zero_head = params | {"score": jnp.zeros((config.embed, 1))}
  hparams = {"center_coefficient": jnp.float32(0.01)}
  loss, metrics = jax.jit(algorithm.loss)(zero_head, algorithm.prepare({}, batch, None), hparams)
  assert float(loss) == pytest.approx(np.log(2), abs=1e-6)
  assert float(metrics["rewards/accuracies"]) == 0
