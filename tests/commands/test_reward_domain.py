"""The domain of a reward model's run, and what an online run logs of it."""

import math

import pytest

from alignjax import cli
from alignjax.commands import reward_domain
from alignjax.errors import InputError
from alignjax.evaluation.held_out import evaluate
from alignjax.train import fit
from tests import smoke


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
  """The directory of a reward model whose folder `domain` holds its domain."""
  workdir = smoke.copy(smoke.finished("reward")[0], tmp_path_factory.mktemp("reward") / "run")
  assert cli.main(["domain", "--workdir", str(workdir), "--share", "0.1"]) == 0
  return workdir


def settings(reward):
  rewards = {"algorithm__rewards": "reward_model", "algorithm__reward_model": str(reward)}
  return rewards | {"algorithm__domain": str(reward / "domain"), "algorithm__reward_settings": {}}


@pytest.mark.parametrize("name", ["grpo", "online_dpo"])
@pytest.mark.long
def test_an_online_run_logs_how_many_of_its_completions_lie_outside(name, reward, tmp_path):
  config = smoke.config(name, run__steps=2, **settings(reward))
  found = fit(config, tmp_path / "run")
  assert 0 <= found.metrics["eval/domain/outside"] <= 1
  assert found.metrics["eval/domain/distance"] > 0
  assert math.isfinite(found.metrics["eval/domain/z"])
  again = evaluate(tmp_path / "run")  # from what the run keeps of it in its own directory
  for key in ("outside", "distance", "z"):
    assert again[f"domain/{key}"] == pytest.approx(found.metrics[f"eval/domain/{key}"], abs=1e-5)


def test_a_domain_is_of_a_reward_model_with_enough_held_out_pairs(reward):
  with pytest.raises(InputError, match=r"is not empty; choose another --out"):
    reward_domain.write(reward)
  with pytest.raises(InputError, match="is not the run of a reward model of pairs"):
    reward_domain.write(smoke.finished("sft")[0], reward / "other")
  with pytest.raises(InputError, match="larger --share"):
    reward_domain.write(reward, reward / "other", share=1e-6)


def test_the_domain_of_another_reward_model_is_refused(reward, tmp_path):
  other = tmp_path / "other"
  fit(smoke.config("reward", run__steps=2, run__seed=1), other)
  options = settings(reward) | {"algorithm__reward_model": str(other)}
  with pytest.raises(InputError, match=r"domain: is not the domain of algorithm\.reward_model=.*other as it is now"):
    fit(smoke.config("grpo", **options), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_domain_without_its_reward_model_is_refused(reward):
  with pytest.raises(InputError, match=r"name its run in algorithm\.reward_model"):
    fit(smoke.config("grpo", algorithm__domain=str(reward / "domain")), reward / "other")
