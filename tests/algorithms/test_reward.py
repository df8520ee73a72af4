"""Bradley-Terry reward modelling with a decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import process_reward, reward
from alignjax.errors import InputError
from alignjax.evaluation.held_out import evaluate
from alignjax.model import decoder
from alignjax.train import fit
from alignjax.types import Batch, Trees
from tests import made, smoke
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

  algorithm = made.make(reward.RECIPE, model_with_head)
  prepared = algorithm.prepare(Trees(), Batch(preference_batch), None)
  rewards = jax.jit(lambda p: reward.pair_rewards(model_with_head, p, preference_batch))(params_with_head)
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
  algorithm = made.make(reward.RECIPE, model_with_head)
  batch = preference_batch | {"margins": np.zeros_like(preference_batch["margins"])}
  zero_head = params | {"score": jnp.zeros((config.embed, 1))}
  hparams = {"center_coefficient": jnp.float32(0.01)}
  loss, metrics = jax.jit(algorithm.loss)(zero_head, algorithm.prepare(Trees(), Batch(batch), None), hparams)
  assert float(loss) == pytest.approx(np.log(2), abs=1e-6)
  assert float(metrics["rewards/accuracies"]) == 0


# --- ensembles -------------------------------------------------------------------------------------------------------

HEADS = 3


@pytest.fixture(scope="module")
def ensemble(config):
  """A model of three heads, and its parameters."""
  model = decoder.make(dataclasses.replace(config, head="scalar", score_heads=HEADS))
  return model, jax.jit(model.init)(jax.random.key(0))


def loss_of(model, params, batch, **options):
  """Loss, metrics and gradient of one batch."""
  algorithm = made.make(reward.RECIPE, model, **options)
  hparams = {"center_coefficient": jnp.float32(0.05)}
  total = lambda p: algorithm.loss(p, algorithm.prepare(Trees(), Batch(batch), None), hparams)
  (value, metrics), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  return float(value), {name: float(x) for name, x in metrics.items()}, gradient


@pytest.mark.long
def test_an_ensemble_is_the_mean_of_its_heads_trained_apart(ensemble, model_with_head, preference_batch):
  model, params = ensemble
  counts = np.asarray(reward.poisson_weights(jnp.asarray(preference_batch["record_ids"]), HEADS))
  value, metrics, gradient = loss_of(model, params, preference_batch)
  alone, rewards = [], []
  for k in range(HEADS):
    # A head alone, on pairs that weigh as often as it sees them; the divisor is that of all pairs.
    batch = preference_batch | {"weights": preference_batch["weights"] * counts[..., k]}
    share = batch["weights"].sum() / preference_batch["weights"].sum()
    one = params | {"score": params["score"][:, k : k + 1]}
    head_gradient = loss_of(model_with_head, one, batch)[2]
    alone.append(loss_of(model_with_head, one, preference_batch)[0])  # the loss that is reported is of all pairs
    expected = np.asarray(head_gradient["score"][:, 0]) * share / HEADS
    np.testing.assert_allclose(gradient["score"][:, k], expected, rtol=1e-4, atol=1e-6)
    rewards.append(reward.pair_rewards(model_with_head, one, preference_batch))
  assert value == pytest.approx(np.mean(alone), rel=1e-5)
  np.testing.assert_allclose(reward.pair_rewards(model, params, preference_batch), np.mean(rewards, axis=0), atol=1e-5)
  margins = np.stack(rewards)[..., 0] - np.stack(rewards)[..., 1]
  weights = preference_batch["weights"] / preference_batch["weights"].sum()
  assert metrics["rewards/disagreement"] == pytest.approx((weights * margins.std(axis=0)).sum(), rel=1e-4)
  assert metrics["rewards/head_accuracies"] == pytest.approx((weights * (margins > 0).mean(axis=0)).sum(), rel=1e-4)
  assert metrics["rewards/accuracies"] == pytest.approx((weights * (margins.mean(axis=0) > 0)).sum(), rel=1e-4)


def test_heads_begin_apart_and_one_head_begins_at_nothing(ensemble, model_with_head):
  scores = np.asarray(ensemble[1]["score"])
  assert np.linalg.matrix_rank(scores) == HEADS
  assert not model_with_head.init(jax.random.key(0))["score"].any()


def test_the_bootstrap_belongs_to_record_and_head():
  ids = jnp.arange(4000)
  counts = np.asarray(reward.poisson_weights(ids, HEADS))
  order = np.random.default_rng(0).permutation(4000)
  np.testing.assert_array_equal(
    reward.poisson_weights(ids[order].reshape(40, 100), HEADS).reshape(-1, HEADS), counts[order]
  )
  # Poisson(1): mean and variance 1, and 37 % of the records are not seen.
  np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.06)
  np.testing.assert_allclose(counts.var(axis=0), 1, atol=0.1)
  np.testing.assert_allclose((counts == 0).mean(axis=0), np.exp(-1), atol=0.03)
  assert np.abs(np.corrcoef(counts.T) - np.eye(HEADS)).max() < 0.06


def test_without_the_bootstrap_every_head_learns_from_all_pairs(ensemble, preference_batch):
  model, params = ensemble
  same = params | {"score": jnp.tile(params["score"][:, :1], (1, HEADS))}
  gradient = loss_of(model, same, preference_batch, bootstrap="none")[2]["score"]
  np.testing.assert_allclose(gradient[:, 1:], gradient[:, :1].repeat(HEADS - 1, axis=1), rtol=1e-5, atol=1e-7)
  parted = loss_of(model, same, preference_batch)[2]["score"]
  assert np.abs(parted[:, 1] - parted[:, 0]).max() > 1e-3


@pytest.mark.long
def test_a_run_trains_an_ensemble_and_evaluation_takes_its_mean(tmp_path):
  config = smoke.config("reward", model__score_heads=HEADS, run__steps=2)
  run = fit(config, tmp_path / "run")
  assert run.params["score"].shape == (config.model.embed, HEADS)
  assert run.metrics["rewards/disagreement"] > 0
  assert evaluate(tmp_path / "run")["heldout_accuracy"] == pytest.approx(
    run.metrics["eval/rewards/accuracies"], abs=1e-6
  )


def test_a_process_reward_model_has_one_head(ensemble):
  with pytest.raises(InputError, match=r"model.score_heads=3: only algorithm.name=reward trains an ensemble; use 1"):
    made.make(process_reward.RECIPE, ensemble[0])


def test_a_policy_has_no_use_for_heads(tmp_path):
  with pytest.raises(InputError, match=r"model.score_heads=2: algorithm.name=sft scores nothing; use 1"):
    fit(smoke.config("sft", model__score_heads=2), tmp_path / "run")
