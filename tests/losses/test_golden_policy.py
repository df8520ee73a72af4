"""GRPO's family: losses, gradients, advantages and sampling corrections, against what TRL computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses import token_weight
from alignjax.losses.advantages import (
  finished_only,
  gdpo_advantages,
  group_advantages,
  normalise,
  rloo_advantages,
  weighted_sum,
)
from alignjax.losses.aggregation import aggregate, count
from alignjax.losses.kl import KL_ESTIMATORS
from alignjax.losses.policy import LOSSES, make_tokens
from tests import golden, trl


def array(values, dtype=np.float64):
  """JSON as an array: null is NaN."""
  if isinstance(values, list):
    return np.array([array(x, dtype) for x in values], dtype)
  return dtype(np.nan if values is None else values)


def near(got, expected, mask=1.0, tolerance=1e-6):
  """Equal where the mask is 1."""
  shape = np.broadcast_shapes(np.shape(got), np.shape(expected), np.shape(mask))
  got, expected = (np.broadcast_to(np.asarray(x, np.float64), shape) for x in (got, expected))
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got * mask, np.where(mask, expected, 0), atol=tolerance, rtol=tolerance)


def total(logps, entropy, inputs, objective):
  """(the loss, {name: arrays on the way}) of a trl.PolicyObjective."""
  mask, name = inputs["mask"], objective.loss.aggregation
  old = logps if inputs["old"] is None else inputs["old"]
  keep = jnp.ones_like(logps)
  if objective.threshold is not None:
    keep *= token_weight.on_policy(logps, inputs["sampling"], inputs["advantages"], mask, threshold=objective.threshold)
  if objective.entropy_share is not None:
    keep *= token_weight.top_entropy(entropy, mask, share=objective.entropy_share)
  there = mask * keep if objective.loss is LOSSES["gmpo"] else mask  # its mean is a part of the loss
  tokens = make_tokens(
    logps, old, inputs["advantages"], there, ratio=objective.loss.ratio, correction=inputs["correction"]
  )
  found = objective.loss.loss(tokens, **objective.hparams)
  losses = found.losses * keep
  kl = KL_ESTIMATORS["k3"](jnp.where(mask > 0, logps - inputs["reference"], 0))
  kl = kl * tokens.ratio if objective.corrected_kl else kl
  counts = count(mask * objective.per_step, jnp.full(len(mask), objective.per_step), inputs["max_length"])
  loss = aggregate(-objective.entropy_coef * entropy, mask, "token_mean", counts)
  if objective.tokens is not None:
    counts = counts._replace(tokens=objective.tokens)
  loss += aggregate(losses, there, name, counts) + aggregate(objective.kl_coef * kl, mask, name, counts)
  per_token = losses + objective.kl_coef * kl
  return loss, {"losses": per_token, "ratio": tokens.ratio, "kl": kl, "clipped": found.clipped}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", golden.cases("grpo_loss", lambda config: True))
def test_golden_grpo_loss(case, dtype):
  section = golden.section("grpo_loss")
  case, given = section["cases"][case], {name: array(values) for name, values in section["inputs"].items()}
  config, tolerance = dict(case["config"]), 1e-6 if dtype == "float64" else 1e-5
  mask = given["completion_mask"] * (given["tool_mask"] if config.pop("tool_mask") else 1)
  per_completion, correction = config.pop("advantages") == "B", config.pop("vllm_importance_sampling")
  inputs = {
    "mask": mask,
    "old": None if config.pop("on_policy_old_is_detached_new") else given["old_per_token_logps"],
    "reference": given["ref_per_token_logps"],
    "sampling": given["sampling_per_token_logps"],
    "advantages": given["advantages_B"][:, None] if per_completion else given["advantages_BT"],
    "correction": np.float64(1.0) if correction is None else given[f"importance_sampling_ratio_{correction}"],
    "max_length": given["max_completion_length"],
  }
  objective = trl.grpo(config, section["inputs"], geometric="per_sequence_loss" in case)
  with jax.enable_x64(dtype == "float64"):
    inputs = {name: None if x is None else jnp.asarray(x, dtype) for name, x in inputs.items()}
    logps, entropy = (jnp.asarray(given[name], dtype) for name in ("per_token_logps", "entropies"))
    run = jax.value_and_grad(lambda l, e: total(l, e, inputs, objective), argnums=(0, 1), has_aux=True)
    (loss, found), (gradient, of_entropy) = run(logps, entropy)
    assert loss.dtype == gradient.dtype == dtype
  near(loss, case["loss"], tolerance=tolerance)
  near(gradient, array(case["grad_per_token_logps"]), mask, tolerance)
  for name, mine in {"per_token_loss": "losses", "per_token_kl": "kl"}.items():
    if name in case:
      near(found[mine], array(case[name]), mask, tolerance)
  if "per_sequence_loss" in case and not objective.kl_coef:
    near(found["losses"], array(case["per_sequence_loss"])[:, None], mask, tolerance)
  if "coef_1" in case:
    near(np.minimum(found["ratio"], objective.hparams.get("delta", np.inf)), array(case["coef_1"]), mask, tolerance)
  if "grad_entropies" in case:
    near(of_entropy, array(case["grad_entropies"]), mask, tolerance)
  same_clip_ratios(np.asarray(found["clipped"]), inputs, objective, case["metrics"])


def same_clip_ratios(clipped, inputs, objective, metrics):
  """Shares of tokens, or of completions where the ratio is of those."""
  mask, advantages = np.asarray(inputs["mask"]), np.asarray(inputs["advantages"])
  whole = objective.loss.ratio == "sequence"
  share = lambda x: (x.sum(1) / mask.sum(1)).mean() if whole else x.sum() / mask.sum()
  clipped = clipped * mask
  expected = {
    "clip_ratio/low_mean": share(clipped * (advantages < 0)),
    "clip_ratio/high_mean": share(clipped * (advantages > 0)),
    "clip_ratio/region_mean": share(clipped),
    "cispo_clip_ratio": share(clipped),
  }
  for name in expected.keys() & metrics.keys():
    near(expected[name], metrics[name])


def section_inputs():
  """What sections `rloo_loss` and `gspo_token` share with `grpo_loss`: (logps, old, advantages, mask)."""
  given = golden.section("grpo_loss")["inputs"]
  names = ("per_token_logps", "old_per_token_logps", "advantages_B", "completion_mask")
  return [jnp.asarray(array(given[name])) for name in names]


def evaluate(loss, config):
  """(loss, gradient, per-token losses, ratio) of a config with an epsilon alone, over all completions."""
  logps, old, advantages, mask = section_inputs()
  counts = count(mask, jnp.ones(len(mask)), max_length=mask.shape[1])

  def total(logps):
    tokens = make_tokens(logps, old, advantages, mask, ratio=loss.ratio)
    losses = loss.loss(tokens, **config).losses
    return aggregate(losses, mask, loss.aggregation, counts), (losses, tokens.ratio)

  (value, rest), gradient = jax.value_and_grad(total, has_aux=True)(logps)
  return value, gradient, *rest, mask


@pytest.mark.parametrize("case", golden.cases("rloo_loss", lambda config: True))
def test_golden_rloo_loss(case):
  case = golden.section("rloo_loss")["cases"][case]
  config = dict(case["config"])
  epsilons = {"epsilon": config.pop("epsilon_low"), "epsilon_high": config.pop("epsilon_high")}
  assert not config, f"no equal here of {config}"
  with jax.enable_x64(True):
    loss, gradient, losses, ratio, mask = evaluate(LOSSES["rloo"], epsilons)
    near(loss, case["loss"])
    near(gradient, array(case["grad_per_token_logps"]), mask)
    near(losses, array(case["per_sequence_loss"])[:, None], mask)
    near(ratio, array(case["coef_1"])[:, None], mask)


def test_golden_gspo_token():
  section = golden.section("gspo_token")
  config, expected = dict(section["config"]), section["outputs"]
  assert LOSSES["gspo_token"].ratio == config.pop("importance_sampling_level")
  loss = LOSSES["gspo_token"]._replace(aggregation=LOSSES[config.pop("loss_type")].aggregation)
  epsilon = config.pop("epsilon")
  high = config.pop("epsilon_high", epsilon)
  assert not config, f"no equal here of {config}"
  with jax.enable_x64(True):
    value, gradient, *_, mask = evaluate(loss, {"epsilon": epsilon, "epsilon_high": high})
    near(value, expected["loss"])
    near(gradient, array(expected["grad_per_token_logps"]), mask)


def rewards_of(case, group_size):
  """[N, G, R] of a case's reward functions, missing ones NaN."""
  names = sorted(name for name in case if name.startswith("reward_"))
  rewards = np.stack([array(case[name]) for name in names], axis=-1)
  return jnp.asarray(rewards.reshape(-1, group_size, len(names)), jnp.float32)


@pytest.mark.parametrize("case", golden.cases("grpo_advantages", lambda config: True))
def test_golden_grpo_advantages(case):
  section = golden.section("grpo_advantages")
  inputs, case = section["inputs"], section["cases"][case]
  config = dict(case["config"])
  scale, drop = config.pop("scale_rewards"), config.pop("mask_truncated_completions")
  weights, how = jnp.asarray(config.pop("reward_weights"), jnp.float32), config.pop("multi_objective_aggregation")
  assert not config, f"no equal here of {config}"
  rewards = rewards_of(case, inputs["num_generations"])
  got = {
    "sum_then_normalize": lambda: group_advantages(weighted_sum(rewards, weights), scale=scale),
    "normalize_then_sum": lambda: gdpo_advantages(rewards, weights),
  }[how]()
  near(got.ravel(), array(case["advantages"]), tolerance=1e-5)

  ids = inputs["completion_ids"]
  lengths, finished = np.array([*map(len, ids)]), np.array([row[-1] == inputs["eos_token_id"] for row in ids])
  mask = jnp.asarray(np.arange(lengths.max()) < lengths[:, None], jnp.float32)
  mask = finished_only(mask, finished) if drop else mask
  assert mask.sum() == case["num_items_in_batch"]
  if "completion_mask" in case:
    near(mask, array(case["completion_mask"]))


@pytest.mark.parametrize("case", golden.cases("rloo_advantages", lambda config: True))
def test_golden_rloo_advantages(case):
  section = golden.section("rloo_advantages")
  inputs, case = section["inputs"], section["cases"][case]
  config = dict(case["config"])
  beta, normalised, bounds = config.pop("beta"), config.pop("normalize_advantages"), config.pop("reward_clip_range")
  weights = jnp.asarray(config.pop("reward_weights"), jnp.float32)
  assert not config, f"no equal here of {config}"
  old, reference, mask = (
    jnp.asarray(array(inputs[name]), jnp.float32)
    for name in ("old_per_token_logps", "ref_per_token_logps", "completion_mask")
  )
  rewards = weighted_sum(rewards_of(case, inputs["num_generations"]), weights)
  rewards = rewards if bounds is None else jnp.clip(rewards, *bounds)
  kl = jnp.sum(KL_ESTIMATORS["k1"](old - reference) * mask, axis=1)
  got = rloo_advantages(rewards - beta * kl.reshape(rewards.shape))
  near((normalise(got) if normalised else got).ravel(), array(case["advantages"]), tolerance=1e-5)


@pytest.mark.parametrize("case", golden.cases("grpo_vllm_importance_sampling", lambda config: True))
def test_golden_grpo_vllm_importance_sampling(case):
  case = golden.section("grpo_vllm_importance_sampling")["cases"][case]
  config = dict(case["config"])
  level, bound = config.pop("mode").split("_")
  low, high = config.pop("clip_min"), config.pop("clip_max")
  assert not config, f"no equal here of {config}"
  old = jnp.asarray(array(case["old_per_token_logps"]), jnp.float32)
  mask = np.arange(old.shape[1]) < np.array(case["completion_lengths"])[:, None]
  sampling = np.zeros(old.shape, np.float32)
  for row, logps in enumerate(case["sampling_logps"]):
    sampling[row, : len(logps)] = array(logps)
  low, high = 0.0 if low is None else low, np.inf if high is None else high
  got = token_weight.sampling_correction(
    old, jnp.asarray(sampling), jnp.asarray(mask), level=level, bound=bound, low=low, high=high
  )
  near(got, array(case["importance_sampling_ratio"]), mask if level == "sequence" else 1.0, tolerance=1e-5)
