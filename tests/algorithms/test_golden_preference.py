"""Preference objectives, from token log-probabilities to loss, metrics and gradient, against what TRL computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import pair_sums, preference
from alignjax.algorithms.algorithm import Sync
from alignjax.losses import reference_free
from alignjax.losses.logps import TokenScores, next_token_scores
from alignjax.losses.pair import make_pair
from alignjax.losses.reference_free import orpo
from alignjax.training.step import follow
from alignjax.types import Batch
from tests import golden, made, trl

COUPLED = [name for name, objective in preference.LOSSES.items() if objective.match]

# Losses whose number is in no file, and the test below that derives it from those that are.
DERIVED = {"cpo_simpo": "test_cpo_simpo_is_simpo_and_the_likelihood_term_of_cpo"}
SCORES = ("entropy", "is_top1", "log_sum_sq_probs")


def numbers(values, dtype=np.float64):
  """JSON as an array: null is NaN, and "inf" infinite."""
  if isinstance(values, list):
    return np.array([numbers(x, dtype) for x in values], dtype)
  return dtype(np.nan if values is None else values)


def side_by_side(rows):
  """[2N, T, ...] of chosen, then rejected, as [N, 2T, ...]: the two segments of a row."""
  return np.concatenate(np.split(np.asarray(rows), 2), axis=1)


def apart(rows):
  """The inverse of `side_by_side`."""
  return np.concatenate(np.split(np.asarray(rows), 2, axis=1))


def make_batch(mask):
  """A batch of N pairs with this completion mask [2N, T]."""
  mask = np.asarray(mask)
  segments = np.repeat([[1, 2]], mask.shape[1], axis=1) * np.ones((len(mask) // 2, 1), int)
  one = jnp.ones((len(mask) // 2, 1))
  return {
    "loss_mask": jnp.asarray(side_by_side(mask), one.dtype),
    "segment_ids": jnp.asarray(segments, jnp.int32),
    "example_mask": one,
    "weights": one,
  }


def evaluate(objective, scores, batch, reference=None):
  """Loss, gradient to scores.logps [N, 2T], per-pair losses [N] and metrics of TokenScores [N, 2T].

  Args:
    objective: a trl.Objective.
    scores: of the policy.
    batch: of `make_batch`.
    reference: token log-probabilities [N, 2T] of the reference.
  """
  ld_alpha = objective.options.get("ld_alpha", 1.0)
  sums = lambda logps: pair_sums.side_sums(logps * pair_sums.token_weights(batch, ld_alpha), batch)
  if reference is not None and objective.options.get("reference") != "none":
    batch = batch | {"reference_logps": sums(reference)}
  terms = made.objectives(preference.RECIPE, objective.loss)
  options = preference.PreferenceOptions(**objective.options)
  batch = preference.with_totals(terms, Batch(batch), options, sums(scores.logps))
  run = preference.make_objective(terms, options)
  dtype = scores.logps.dtype
  hparams = {name: jnp.asarray(value, dtype) for name, value in objective.hparams.items()}
  total = lambda logps, batch: run(scores._replace(logps=logps), batch, hparams)
  (loss, metrics), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(scores.logps, batch)
  alone = lambda weights: total(scores.logps, batch.updated({"weights": weights}, {"num_examples": 1.0}))[0]
  pairs = jax.vmap(alone)(jnp.eye(batch.size, dtype=dtype)[..., None])
  assert loss.dtype == gradient.dtype == dtype
  return loss, np.asarray(gradient), np.asarray(pairs), metrics


def near(got, expected, dtype, name=""):
  """Equal to 1e-6, or 1e-5 in float32, where TRL's number is finite; never NaN."""
  expected, got = numbers(expected), np.asarray(got, np.float64)
  assert not np.isnan(got).any(), name
  finite = np.isfinite(expected)
  tolerance = 1e-5 if dtype == "float32" else 1e-6
  np.testing.assert_allclose(got[finite], expected[finite], atol=tolerance, rtol=tolerance, err_msg=name)


def same_metrics(got, expected, dtype):
  """Those that both have: log-probabilities, and rewards where there is a beta."""
  shared = got.keys() & expected.keys()
  assert shared >= {"logps/chosen", "logps/rejected"}
  for name in shared:
    near(got[name], expected[name], dtype, name)


def in_precision(dtype):
  return jax.enable_x64(dtype != "float32")


@pytest.mark.parametrize("case", golden.cases("dpo", lambda config: True))
def test_golden_dpo(case):
  section = golden.section("dpo")
  case, inputs = section["cases"][case], section["inputs"]
  dtype = case.get("dtype", section["dtype"])
  with in_precision(dtype):
    mask = numbers(inputs["completion_mask"])[:, 1:]
    array = lambda name: jnp.asarray(side_by_side(numbers(inputs[name])), dtype)
    objective, batch = trl.dpo(case["config"]), make_batch(mask)

    def scaled(name, sums):
      """The inputs times what the case multiplies them with, 100 in those for extremes: its sums tell."""
      weighted = array(name) * pair_sums.token_weights(batch, objective.options["ld_alpha"])
      return array(name) * round(sum(numbers(case[key]).sum() for key in sums) / float(weighted.sum()), 3)

    reference = scaled("ref_per_token_logps", ("ref_chosen_logps", "ref_rejected_logps"))
    policy = scaled("policy_per_token_logps", ("chosen_logps", "rejected_logps"))
    scores = TokenScores(policy, *map(array, ("is_top1", "entropy", "log_sum_sq_probs")))
    loss, gradient, pairs, metrics = evaluate(objective, scores, batch, reference)
    near(loss, case["loss"], dtype)
    near(apart(gradient) * mask, numbers(case["grad_policy_per_token_logps"]) * mask, dtype)
    same_metrics(metrics, case["metrics"], dtype)
    # A pair of TRL's sft has the mean of all; its pairs of aot stand in order of rank.
    if "per_sequence_loss" in case and "sft" not in objective.loss:
      order = np.sort if objective.loss.split(":")[0] in COUPLED else np.asarray
      near(order(pairs), order(numbers(case["per_sequence_loss"])), dtype)


def from_sums(values):
  """TokenScores of completions of one token each from chosen and rejected log-probabilities [N]."""
  logps = jnp.asarray(np.stack([numbers(x) for x in values], axis=1))
  return TokenScores(logps, *(jnp.zeros_like(logps) for _ in SCORES))


@pytest.mark.parametrize("case", golden.cases("dpo_legacy_v0_23", lambda config: True))
def test_golden_dpo_legacy(case):
  section = golden.section("dpo_legacy_v0_23")
  case, inputs = section["cases"][case], section["inputs"]
  with in_precision("float64"):
    scores = from_sums([inputs["chosen_logps"], inputs["rejected_logps"]])
    reference = from_sums([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]).logps
    objective = trl.dpo_legacy(case["config"])
    _, gradient, pairs, metrics = evaluate(objective, scores, make_batch(np.ones((2 * len(reference), 1))), reference)
    order = np.sort if objective.loss in COUPLED else np.asarray
    near(order(pairs), order(numbers(case["losses"])), "float64")
    near(gradient.T.ravel(), case["grad_of_mean_chosen_then_rejected"], "float64")
    if not case["config"]["reference_free"]:  # its rewards are over the reference all the same
      near(metrics["rewards/chosen"], numbers(case["chosen_rewards"]).mean(), "float64")
      near(metrics["rewards/rejected"], numbers(case["rejected_rewards"]).mean(), "float64")


@pytest.mark.parametrize("case", golden.cases("cpo_simpo", lambda config: True))
def test_golden_cpo_simpo(case):
  section = golden.section("cpo_simpo")
  case, inputs = section["cases"][case], section["inputs"]
  with in_precision("float64"):
    scores = from_sums([inputs[f"{side}_{case['logps']}_logps"] for side in ("chosen", "rejected")])
    batch = make_batch(np.ones((2 * len(scores.logps), 1)))
    _, gradient, pairs, metrics = evaluate(trl.cpo(case["config"], nll_weight=0.0), scores, batch)
    near(pairs, case["losses"], "float64")
    near(gradient.T.ravel(), case["grad_of_mean"], "float64")
    if case["config"]["loss_type"] == "simpo" or not case["config"]["alpha"]:
      near(metrics["rewards/chosen"], numbers(case["chosen_rewards"]).mean(), "float64")
      near(metrics["rewards/rejected"], numbers(case["rejected_rewards"]).mean(), "float64")


@pytest.mark.parametrize("case", golden.cases("orpo_odds_ratio", lambda config: True))
def test_golden_orpo_odds_ratio(case):
  section = golden.section("orpo_odds_ratio")
  inputs, case = section["inputs"], section["cases"][case]
  # There is no config; rewards are beta times the averages.
  beta = round(numbers(case["chosen_rewards"]).sum() / numbers(inputs["chosen_avg_logps"]).sum(), 5)
  with in_precision("float32"):
    logps = [jnp.asarray(numbers(inputs[f"{side}_avg_logps"]), jnp.float32) for side in ("chosen", "rejected")]
    pair = lambda chosen, rejected: make_pair(chosen, rejected, nll=jnp.zeros_like(chosen))
    losses = lambda *logps: orpo(pair(*logps), beta=beta)
    near(losses(*logps), -numbers(case["losses_sign_as_in_trl"]), "float32")
    gradient = jax.grad(lambda *logps: losses(*logps).mean(), argnums=(0, 1))(*logps)
    near(np.concatenate(gradient), case["grad_of_minus_mean_losses_wrt_chosen_then_rejected"], "float32")
    metrics = {name: x.mean() for name, x in reference_free.odds_metrics(pair(*logps)).items()}
    near(metrics["log_odds_ratio"], case["mean_log_sigmoid_log_odds"], "float32")
    near(metrics["log_odds_chosen"], case["mean_log_odds"], "float32")


# --- from logits -----------------------------------------------------------------------------------------------------


def score_logits(logits, tokens):
  """TokenScores [N, T] of logits [N, T, V] through the chunked path: an unembedding of ones gives them back."""
  logits = jnp.asarray(logits, jnp.float32)
  return next_token_scores(logits, jnp.eye(logits.shape[-1]), jnp.asarray(tokens, jnp.int32), chunk=3)


def test_golden_dpo_from_logits():
  section = golden.section("dpo_end_to_end")
  inputs, outputs = section["inputs"], section["outputs"]
  defaults = {"label_smoothing": 0.0, "loss_weights": [1.0], "f_divergence_type": "reverse_kl", "ld_alpha": None}
  defaults |= {"use_weighting": False, "discopop_tau": 0.05, "f_alpha_divergence_coef": 0.5}
  tokens, mask = side_by_side(inputs["input_ids"]), np.array(inputs["completion_mask"])
  scores, reference = (score_logits(side_by_side(inputs[f"{who}_logits"]), tokens) for who in ("policy", "ref"))
  batch = make_batch(mask)
  for got, name in ((scores, "per_token_logps"), (reference, "ref_per_token_logps")):
    near(apart(got.logps)[:, 1:] * mask[:, 1:], numbers(outputs[name]) * mask[:, 1:], "float32", name)
  loss, _, pairs, metrics = evaluate(trl.dpo(defaults | inputs["config"]), scores, batch, reference.logps)
  near(loss, outputs["loss"], "float32")
  near(pairs, outputs["per_sequence_loss"], "float32")
  same_metrics(metrics, outputs["metrics"], "float32")


def concatenated(section):
  """TokenScores, batch and tokens of a section in the format of ORPO's and CPO's collator."""
  logits = section["inputs"]["logits"]
  if isinstance(logits, str):  # "same as SECTION.inputs.logits"
    logits = golden.section(logits.split()[-1].split(".")[0])["inputs"]["logits"]
  inputs = section["inputs"]
  tokens = side_by_side(inputs["concatenated_input_ids"])
  batch = make_batch(np.array(inputs["concatenated_labels"]) != -100)
  return score_logits(side_by_side(logits), tokens), batch


@pytest.mark.parametrize("name", ["cpo_end_to_end", "simpo_end_to_end"])
def test_golden_cpo_from_logits(name):
  section = golden.section(name)
  scores, batch = concatenated(section)
  loss, _, _, metrics = evaluate(trl.cpo(section["config"]), scores, batch)
  near(loss, section["outputs"]["loss"], "float32")
  same_metrics(metrics, section["outputs"]["metrics"], "float32")


def test_golden_orpo_from_logits():
  section = golden.section("orpo_end_to_end")
  scores, batch = concatenated(section)
  expected = section["outputs"]["metrics"]
  objective = trl.Objective("orpo", {}, section["config"])
  loss, _, _, metrics = evaluate(objective, scores, batch)
  same_metrics({k: v for k, v in metrics.items() if k != "nll_loss"}, expected, "float32")
  # TRL's likelihood term covers the prompts as well, and ours the completions: with its tokens, ours is its loss.
  attended = side_by_side(section["inputs"]["concatenated_attention_mask"])
  half = attended.shape[1] // 2
  attended = attended[:, 1:half]
  sums = pair_sums.side_sums(scores.logps * batch["loss_mask"], batch)
  lengths = pair_sums.side_sums(batch["loss_mask"], batch)
  pair = make_pair(sums[..., 0], sums[..., 1], chosen_length=lengths[..., 0], rejected_length=lengths[..., 1])
  theirs = pair._replace(
    nll=-(scores.logps[:, 1:half] * attended).sum(axis=1)[:, None], mean_nll_tokens=attended.sum() / len(attended)
  )
  assert float(orpo(pair, **section["config"]).mean()) == pytest.approx(float(loss), rel=1e-5)
  near(orpo(theirs, **section["config"]).mean(), section["outputs"]["loss"], "float32")
  near((theirs.nll / theirs.mean_nll_tokens).mean(), section["outputs"]["nll_loss"], "float32")


@pytest.mark.parametrize("case", golden.cases("tpo", lambda config: True))
def test_golden_tpo(case):
  section = golden.section("tpo")
  inputs, objective = section["inputs"], trl.tpo(case, section["config"])
  case = section["cases"][case]
  chosen, rejected, third = np.split(np.array(inputs["completion_mask"]), 3)
  row = lambda name: np.concatenate(np.split(np.array(inputs[name]), 3), axis=1)  # the three sides of a triple
  batch = make_batch(np.concatenate([chosen, rejected]))
  segments = np.repeat([[1, 2, 3]], chosen.shape[1], axis=1) * np.ones((len(chosen), 1), int)
  batch |= {"loss_mask": jnp.asarray(row("completion_mask"), jnp.float32), "segment_ids": jnp.asarray(segments)}
  scores = score_logits(row("logits"), row("input_ids"))
  loss, _, pairs, metrics = evaluate(objective, scores, batch)
  near(loss, case["loss"], "float32")
  # Ours have the likelihood term in them.
  nll = pair_sums.likelihood_sums(-scores.logps * batch["loss_mask"], batch, "third")[..., 0].ravel()
  nll *= section["config"]["tpo_alpha"] * len(chosen) / third.sum()
  near(pairs - nll, case["per_sequence_loss"], "float32")
  near(metrics["nll_loss"], case["nll_loss"], "float32")
  if not objective.loss.startswith("ipo"):  # TRL's rewards are then of averages, ours of sums
    same_metrics(metrics, case["metrics"], "float32")


def test_golden_reference_sync():
  case = golden.section("callbacks")["sync_ref_model"]
  tree, params = (jnp.asarray(case[name]) for name in ("ref_before", "model"))
  near(follow(tree, params, Sync(4, case["alpha"]), jnp.int32(8)), case["ref_after"], "float32")
  np.testing.assert_array_equal(follow(tree, params, Sync(4, case["alpha"]), jnp.int32(7)), tree)


# --- what no file has ------------------------------------------------------------------------------------------------


def test_cpo_simpo_is_simpo_and_the_likelihood_term_of_cpo():
  rng = np.random.default_rng(0)
  chosen, rejected = jnp.asarray(-rng.uniform(1, 9, (2, 5)))
  pair = make_pair(chosen, rejected, chosen_length=jnp.arange(1.0, 6), rejected_length=jnp.arange(5.0, 0, -1))
  pieces = reference_free.simpo(pair, beta=2.0, gamma=1.0)
  pieces += reference_free.cpo(pair, nll_weight=0.7) - reference_free.cpo(pair, nll_weight=0.0)
  whole = reference_free.cpo_simpo(pair, beta=2.0, gamma=1.0, nll_weight=0.7)
  np.testing.assert_allclose(whole, pieces, rtol=1e-6)


def test_every_loss_has_an_outside_value_or_a_derivation():
  configs = lambda name: [case["config"] for case in golden.section(name)["cases"].values()]
  found = [trl.dpo(c) for c in configs("dpo")]
  found += [trl.dpo_legacy(c) for c in configs("dpo_legacy_v0_23")]
  found += [trl.cpo(c, nll_weight=0.0) for c in configs("cpo_simpo")]
  outside = {term.name for one in found for term in made.objectives(preference.RECIPE, one.loss)}
  outside |= {"orpo"} if golden.section("orpo_odds_ratio")["cases"] else set()
  tpo = golden.section("tpo")
  outside |= {trl.tpo(name, tpo["config"]).loss for name in tpo["cases"]}
  assert not (preference.LOSSES | reference_free.LOSSES).keys() - outside - DERIVED.keys()
  assert all(test in globals() for test in DERIVED.values())
