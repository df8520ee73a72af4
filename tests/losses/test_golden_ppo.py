"""PPO from log-probabilities, values and scores to its losses, against what TRL computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.advantages import gae, masked_mean, masked_var, token_rewards, whiten
from alignjax.losses.kl import KL_ESTIMATORS
from alignjax.losses.policy import LOSSES, make_tokens
from alignjax.losses.value import ppo_value_loss
from tests import golden

# What does not enter the numbers compared: how the rollout was sampled and optimized.
ELSEWHERE = {
  *("num_ppo_epochs", "num_mini_batches", "learning_rate", "temperature", "stop_token", "response_length"),
  "missing_eos_penalty",  # the scores have it already
}


def near(got, expected, mask=None):
  """Equal to 1e-5 where the mask is nonzero."""
  got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
  if mask is not None:
    got, expected = np.where(mask, got, 0), np.where(mask, expected, 0)
  np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def arrays(record):
  return {name: np.asarray(values) for name, values in record.items()}


@pytest.mark.parametrize("case", golden.cases("ppo", lambda config: True))
def test_golden_ppo(case):
  case = golden.section("ppo")["cases"][case]
  config = {name: value for name, value in case["config"].items() if name not in ELSEWHERE}
  estimator, kl_coef = KL_ESTIMATORS[config.pop("kl_estimator")], config.pop("kl_coef")
  gamma, lam, whitened = config.pop("gamma"), config.pop("lam"), config.pop("whiten_rewards")
  epsilon, value_epsilon, vf_coef = config.pop("cliprange"), config.pop("cliprange_value"), config.pop("vf_coef")
  assert not config, f"no equal here of {config}"

  rollouts = [arrays(rollout) for rollout in case["rollouts"]]
  for r in rollouts:
    mask = 1.0 - r["padding_mask"]
    longer = 1.0 - r["padding_mask_p1"]  # with the first pad, on which TRL puts the score
    kl = jnp.where(mask > 0, estimator(jnp.asarray(r["logprobs"] - r["ref_logprobs"])), 0)
    near(kl, r["kl"])
    rewards = token_rewards(jnp.asarray(r["scores"]), kl, jnp.asarray(longer), kl_coef=kl_coef)
    if whitened:
      rewards = whiten(rewards, longer, shift_mean=False)
    near(rewards, r["rewards"])
    advantages, returns = gae(rewards, jnp.asarray(r["values"]), jnp.asarray(longer), gamma=gamma, lam=lam)
    near(returns, r["returns"])
    near(whiten(advantages, mask), r["advantages"])

  for m in map(arrays, case["minibatches"]):
    rows = m["micro_batch_inds"]
    r = next(r for r in rollouts if np.array_equal(r["logprobs"][rows], m["mb_logprobs"]))
    mask, longer = (jnp.asarray(1.0 - r[name][rows]) for name in ("padding_mask", "padding_mask_p1"))
    tokens = make_tokens(*(jnp.asarray(m[x]) for x in ("new_logprobs", "mb_logprobs", "mb_advantage")), mask)
    near(tokens.ratio, m["ratio"], mask)
    policy = LOSSES["ppo"].loss(tokens, epsilon=epsilon, epsilon_high=epsilon)
    policy_loss = masked_mean(policy.losses, mask)
    value = ppo_value_loss(
      *(jnp.asarray(m[x]) for x in ("vpred", "mb_values", "mb_return")), longer, epsilon=value_epsilon
    )
    near(policy_loss, m["pg_loss"])
    near(masked_mean(value.losses, longer), m["vf_loss"])
    near(masked_mean(value.clipped, longer), m["vf_clipfrac"])
    near(policy_loss + vf_coef * masked_mean(value.losses, longer), m["loss"])
    if "pg_clipfrac" in m:
      near(masked_mean(policy.clipped, mask), m["pg_clipfrac"])


def test_golden_ppo_helpers():
  section = golden.section("ppo_helpers")
  inputs, expected = arrays(section["inputs"]), section["outputs"]
  with jax.enable_x64(section["dtype"] == "float64"):
    values, mask = jnp.asarray(inputs["values"]), jnp.asarray(inputs["mask"], float)
    same = lambda got, name, where=None: np.testing.assert_allclose(
      got if where is None else got * where, np.asarray(expected[name]) * (1 if where is None else where), rtol=1e-6
    )
    same(masked_mean(values, mask), "masked_mean")
    same(masked_mean(values, mask, axis=1), "masked_mean_axis1")
    same(masked_var(values, mask)[0, 0], "masked_var_unbiased")
    same(masked_var(values, mask, ddof=0)[0, 0], "masked_var_biased")
    same(whiten(values, mask), "masked_whiten", mask)
    same(whiten(values, mask, shift_mean=False), "masked_whiten_shift_mean_False", mask)


def test_golden_ppo_get_reward():
  """The score of a reward model goes to the last token of a completion, as its logits stand there."""
  section = golden.section("ppo_get_reward")
  inputs, expected = section["inputs"], arrays(section["outputs"])
  tokens, logits = np.asarray(inputs["query_responses"]), expected["reward_logits"]
  columns, start = np.arange(tokens.shape[1]), inputs["context_length"]
  pads = (tokens == inputs["pad_token_id"]) & (columns >= start)
  mask = jnp.asarray((columns >= start) & (np.cumsum(pads, axis=1) == 0), jnp.float32)
  placed = token_rewards(jnp.asarray(expected["final_rewards"]), jnp.zeros(mask.shape), mask, kl_coef=0.0)
  at = expected["sequence_lengths"]
  np.testing.assert_allclose(placed[np.arange(len(at)), at], expected["final_rewards"])
  np.testing.assert_allclose(logits[np.arange(len(at)), at], expected["final_rewards"], rtol=1e-6)
  assert np.count_nonzero(placed) == np.count_nonzero(expected["final_rewards"])
