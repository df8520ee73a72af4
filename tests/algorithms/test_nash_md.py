"""Nash-MD: what plays against what, and that a run of it learns."""

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import nash_md, policy_update
from alignjax.algorithms.online_rows import Outcome, Rollout
from alignjax.errors import InputError
from alignjax.train import fit
from alignjax.training import metrics
from tests import smoke

BRIEF = dict(run__steps=2, data__eval="", data__holdout=0.0)


def config(**overrides):
  return smoke.config("nash_md", **overrides)


def test_every_completion_plays_against_the_last_of_its_prompt():
  scores = jnp.array([2.0, 0.0, 1.0, 5.0, 5.0, 5.0, 0.0, 0.0, 0.0])
  weights = jnp.ones(9).at[4].set(0).at[8].set(0)  # not scored
  texts = {"loss_mask": jnp.ones((9, 4)), "example_mask": jnp.ones((9, 1)), "weights": weights[:, None]}
  rollout = Rollout(texts, jnp.zeros((9, 4)), *jnp.zeros((2, 9)), from_other=jnp.array([0.0, 0, 1] * 3))
  outcome = Outcome(scores, scores, weights, *jnp.ones((4, 9)))
  played, outcome, preferred, _ = nash_md.play(rollout, outcome, 3)
  found = played.texts
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  np.testing.assert_allclose(preferred[:4], [sigmoid(1), sigmoid(-1), 0.5, 0.5], rtol=1e-6)
  np.testing.assert_array_equal(outcome.weights, [1, 1, 0, 1, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(found["weights"][:, 0], outcome.weights)
  np.testing.assert_array_equal(found["loss_mask"][:, 0], found["weights"][:, 0])
  np.testing.assert_array_equal(found["example_mask"][:, 0], [1, 1, 0] * 3)


@pytest.mark.long
def test_a_run_learns_from_the_distribution_that_sampled_and_continues(tmp_path):
  whole = fit(config(), tmp_path / "whole")
  rows = [row for row in metrics.read(tmp_path / "whole" / "metrics.jsonl") if "loss" in row]
  assert all(row.get(policy_update.OFF, 0.0) == 0 for row in rows)
  assert any(row["grad_norm"] > 0 for row in rows)
  assert all(0 <= row["rewards/probabilities"] <= 1 for row in rows)
  assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
  smoke.interrupt(config(), tmp_path / "killed", 3)
  assert fit(config(), tmp_path / "killed").metrics == whole.metrics
  assert smoke.arrays(tmp_path / "killed") == smoke.arrays(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize(
  "overrides", [dict(lora__rank=2), dict(algorithm__slots=8), dict(algorithm__num_generations=4)]
)
def test_options_train(overrides, tmp_path):
  run = fit(config(**BRIEF, **overrides), tmp_path / "run")
  assert np.isfinite(list(run.metrics.values())).all()


@pytest.mark.long
def test_microbatches_do_not_change_an_iteration(tmp_path):
  with smoke.devices(1):
    whole = fit(config(**BRIEF), tmp_path / "whole")
    parts = fit(config(**BRIEF, optimizer__microbatches=2), tmp_path / "parts")
  for key in ("loss", "grad_norm", "objective/scores", "rewards/probabilities"):
    assert parts.metrics[key] == pytest.approx(whole.metrics[key], abs=1e-5)


def test_a_game_needs_two():
  with pytest.raises(InputError, match="a game needs at least 2"):
    fit(config(algorithm__num_generations=1), "unused")
