"""Objectives on labelled completions, from token log-probabilities to loss, metrics and gradient, against TRL's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import unpaired
from alignjax.losses.unpaired import LOSSES, density_ratio
from alignjax.types import Batch
from tests import golden, made, trl
from tests.algorithms.test_golden_preference import in_precision, near, numbers


def evaluate(objective, policy, reference, labels, weights=None, **columns):
  """Loss, gradient to policy [N], per-example losses [N], finished metrics and the step's columns.

  Args:
    objective: a trl.Objective.
    policy, reference: log-probabilities [N].
    labels: bool [N].
    weights: of the examples [N].
    **columns: `mismatched` [N]; the statistics of `bco`.
  """
  dtype, column = policy.dtype, lambda x: jnp.asarray(x, policy.dtype)[:, None]
  batch = {"reference_logps": column(reference), "labels": column(labels)}
  batch["weights"] = jnp.ones_like(batch["labels"]) if weights is None else column(weights)
  mismatched = columns.pop("mismatched", None)
  batch = Batch(batch, running={name: jnp.asarray(value, dtype) for name, value in columns.items()})
  batch = unpaired.with_totals(batch, mismatched, column(policy) if columns else None)
  hparams = {name: jnp.asarray(value, dtype) for name, value in objective.hparams.items()}
  run = unpaired.make_objective(made.objectives(unpaired.RECIPE, objective.loss))
  total = lambda logps, batch: run(column(logps), batch, hparams)
  (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(policy, batch)
  alone = lambda k: total(policy, batch.updated({"weights": column(k)}, {"num_examples": 1.0}))[0]
  examples = jax.vmap(alone)(jnp.eye(len(policy), dtype=dtype))
  assert loss.dtype == gradient.dtype == dtype
  metrics = unpaired.by_class(jax.tree.map(float, metrics))
  return loss, np.asarray(gradient), np.asarray(examples), metrics, batch


def desirable_first(values, labels):
  """Values [N] of desirable examples, then those of undesirable ones."""
  return np.concatenate([values[labels], values[~labels]])


@pytest.mark.parametrize("case", golden.cases("kto", lambda config: True))
def test_golden_kto(case):
  section = golden.section("kto")
  case, inputs = section["cases"][case], section["inputs"]
  dtype = case.get("dtype", section["dtype"])
  with in_precision(dtype):
    objective, swapped = trl.kto(case["config"])
    total = lambda name, mask: jnp.asarray((numbers(inputs[name]) * numbers(inputs[mask])[:, 1:]).sum(axis=1), dtype)
    policy, reference = (total(f"{who}_per_token_logps", "completion_mask") for who in ("policy", "ref"))
    mismatched = [total(f"{who}_KL_per_token_logps", "KL_completion_mask") for who in ("policy", "ref")]
    ratio = (mismatched[1] - mismatched[0] if swapped else mismatched[0] - mismatched[1])[:, None]
    labels = np.array(case["label"])
    loss, gradient, examples, metrics, batch = evaluate(objective, policy, reference, labels, mismatched=ratio)
    near(loss, case["loss"], dtype)
    near(desirable_first(examples, labels), case["losses_chosen_then_rejected"], dtype)
    mask = numbers(inputs["completion_mask"])[:, 1:]  # TRL's inputs are of the tokens, ours sums over them
    near(gradient[:, None] * mask, numbers(case["grad_policy_per_token_logps"]) * mask, dtype)
    if "kto" in objective.loss:
      near(batch.totals["kl"], np.ravel(numbers(case["kl"]))[0], dtype)
      near(batch.totals["kl_variance"], np.var(ratio), dtype)
    else:
      metrics["kl"] = 0.0  # TRL logs one where there is none
    near(np.sort(case["completion_logps"]), np.sort(policy), dtype)
    shared = metrics.keys() & case["metrics"].keys()
    for name in shared:
      near(metrics[name], case["metrics"][name], dtype, name)
    ours = ("rewards/", "logps/", "kl")
    assert shared == {name for name in case["metrics"] if name.startswith(ours)}  # an absent class has none in both


def test_golden_bco_and_its_running_mean():
  section = golden.section("bco")
  objective = trl.Objective("bco", {}, made.hparams(unpaired.RECIPE, "bco") | {"beta": section["beta"]})
  running = unpaired.RUNNING
  with in_precision("float64"):
    for step in section["steps"]:
      sides = [numbers(step[f"policy_{side}_logps"]) for side in ("chosen", "rejected")]
      policy = jnp.asarray(np.concatenate(sides))
      reference = np.concatenate([numbers(step[f"ref_{side}_logps"]) for side in ("chosen", "rejected")])
      labels = np.repeat([True, False], [len(side) for side in sides])
      loss, gradient, examples, metrics, batch = evaluate(objective, policy, reference, labels, **running)
      running = jax.tree.map(float, batch.running)
      near(loss, step["loss_nanmean"], "float64")
      near(examples, step["losses_chosen_then_rejected"], "float64")
      near(gradient, step["grad_of_mean_chosen_then_rejected"], "float64")
      near(metrics["delta"], step["delta"], "float64")
      near(section["beta"] * running["mean_ratio"], step["running_after"]["mean"], "float64")
      near(running["ratio_count"], step["running_after"]["count"], "float64")
      for side in ("chosen", "rejected"):
        near(metrics[f"rewards/{side}"], numbers(step[f"{side}_rewards"]).mean(), "float64")


def test_golden_bco_with_weights_of_undesirable_examples():
  section = golden.section("bco")
  case = section["udm_case"]
  step = section["steps"][int(re.search(r"steps\[(\d+)\]", case["inputs"])[1])]
  with in_precision("float64"):
    found = density_ratio(jnp.asarray(case["prob_desirable_of_rejected"]))
    near(found, case["weights"], "float64")
    beta, weights = section["beta"], np.r_[np.ones(len(step["policy_chosen_logps"])), found]
    labels = np.repeat([True, False], [len(weights) - len(found), len(found)])
    ratio = np.concatenate(
      [numbers(step[f"policy_{side}_logps"]) - numbers(step[f"ref_{side}_logps"]) for side in ("chosen", "rejected")]
    )
    judged = unpaired.Labelled(jnp.asarray(ratio), jnp.asarray(labels, float), mean_ratio=case["delta"] / beta)
    near(weights * LOSSES["bco"].loss(judged, beta=beta), case["losses_chosen_then_rejected"], "float64")


@pytest.mark.slow
def test_every_unpaired_loss_has_an_outside_value():
  configs = [trl.kto(case["config"])[0] for case in golden.section("kto")["cases"].values()]
  outside = {objective.loss for objective in configs} | ({"bco"} if golden.section("bco")["steps"] else set())
  assert not LOSSES.keys() - outside
