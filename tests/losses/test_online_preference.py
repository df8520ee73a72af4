"""Preference learning from own samples, against what TRL computed, and at the extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.online_preference import best_of_two, mixture_logits, nash_md, online_pair, xpo
from alignjax.losses.preference import dpo, ipo
from tests import golden

# TRL's loss types; its ipo is of sums, which have lengths of 1 here.
PAIR_LOSSES = {"sigmoid": dpo, "ipo": ipo}


def close(got, expected, tolerance=1e-6):
  np.testing.assert_allclose(got, np.asarray(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", golden.cases("online_dpo", lambda config: True))
def test_golden_online_dpo(case):
  case = golden.section("online_dpo")["cases"][case]
  config = dict(case["config"])
  loss = functools.partial(PAIR_LOSSES[config.pop("loss_type")], beta=config.pop("beta"))
  config.pop("missing_eos_penalty", None)  # the rewards have it already
  assert not config, f"no equal here of {config}"
  # The first half are the first completions of the prompts, the second half the second ones.
  halves = lambda x: tuple(jnp.asarray(x, jnp.float32).reshape(2, -1))
  sums = lambda name: halves(np.sum(np.array(case[name]) * np.array(case["completion_mask"]), axis=1))
  first_wins = best_of_two(jnp.stack(halves(case["rewards"]), axis=-1))
  np.testing.assert_array_equal(first_wins, case["mask"])
  pair = online_pair(sums("logprobs"), sums("ref_logprobs"), first_wins)
  for mine, name in {
    "chosen": "chosen_logprobs_sum",
    "rejected": "rejected_logprobs_sum",
    "margin": "logits",
  }.items():
    close(getattr(pair, mine), case[name], 1e-5)
  close(loss(pair), case["losses"], 1e-5)
  close(loss(pair).mean(), case["loss"], 1e-5)


@pytest.mark.parametrize("case", golden.cases("xpo", lambda config: True))
def test_golden_xpo(case):
  section = golden.section("xpo")
  expected, config = section["cases"][case], dict(section["config"]) | section["cases"][case].get("config", {})
  # Which loss it is, a case's name alone tells.
  loss = functools.partial(PAIR_LOSSES[config.pop("loss_type", case)], beta=config.pop("beta"))
  alpha = config.pop("alpha")
  assert not config, f"no equal here of {config}"
  with jax.enable_x64(True):
    inputs = {name: jnp.asarray(values) for name, values in section["inputs"].items()}
    reference = tuple(inputs[f"ref_logprobs_{data}_data"].sum(1) for data in ("model", "ref"))

    def losses(policy):
      logps = tuple(x.sum(1) for x in policy)
      return xpo(logps, reference, inputs["chosen_mask_model_wins"], loss, alpha=alpha)

    policy = tuple(inputs[f"model_logprobs_{data}_data"] for data in ("model", "ref"))
    close(losses(policy), np.add(expected["dpo_losses"], expected["xpo_losses"]))
    value, (of_model, of_reference) = jax.value_and_grad(lambda policy: losses(policy).mean())(policy)
    close(value, expected["loss"])
    close(of_model, expected["grad_model_logprobs_model_data"])
    close(of_reference, expected["grad_model_logprobs_ref_data"])


def test_golden_nash_md():
  section = golden.section("nash_md")
  config, expected = dict(section["config"]), section["outputs"]
  beta = config.pop("beta")
  assert not config, f"no equal here of {config}"
  with jax.enable_x64(True):
    inputs = {name: jnp.asarray(values) for name, values in section["inputs"].items()}
    logps, reference = inputs["model_logprobs_model_data"], inputs["ref_logprobs_model_data"]
    losses = lambda logps: nash_md(logps, reference, jnp.ones_like(logps), inputs["probability"], beta=beta)
    value, gradient = jax.value_and_grad(lambda logps: losses(logps).mean())(logps)
    close(value, expected["loss"])
    close(gradient, expected["grad_model_logprobs"])
    close((logps - reference).sum(1), expected["kl_div_log"])
    kl_term = nash_md(logps, reference, jnp.ones_like(logps), jnp.full(len(logps), 0.5), beta=beta)
    close(kl_term - losses(logps), expected["score"])


def test_the_first_of_two_wins_a_tie():
  np.testing.assert_array_equal(best_of_two(jnp.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])), [True, False, True])


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_swapping_the_completions_and_the_winner_changes_nothing(name):
  logps, reference = (jnp.array([-3.0]), jnp.array([-5.0])), (jnp.array([-4.0]), jnp.array([-4.5]))
  one = PAIR_LOSSES[name](online_pair(logps, reference, jnp.array([True])))
  other = PAIR_LOSSES[name](online_pair(logps[::-1], reference[::-1], jnp.array([False])))
  close(one, other)


def test_losses_and_gradients_are_finite_at_extreme_ratios_and_in_empty_rows():
  logps, reference = jnp.array([[-1e4, 0.0], [-1.0, -1e4], [0.0, 0.0]]), jnp.array([[0.0, -1e4], [-1e4, -1.0], [0, 0]])
  mask = jnp.array([[1, 1], [1, 0], [0, 0]])
  of_nash = lambda x: nash_md(x, reference, mask, jnp.array([0.0, 1.0, 0.5])).sum()
  of_xpo = lambda x: xpo(
    (x[:, 0], x[:, 1]), (reference[:, 0], reference[:, 1]), jnp.array([True, False, True]), dpo
  ).sum()
  for total in (of_nash, of_xpo):
    value, gradient = jax.value_and_grad(total)(logps)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_what_stands_off_the_mask_does_not_enter_nash_md():
  logps, mask = jnp.array([[np.nan, -1.0, np.nan]]), jnp.array([[0, 1, 0]])
  losses = lambda x: nash_md(x, jnp.full((1, 3), -2.0), mask, jnp.array([0.9])).sum()
  value, gradient = jax.value_and_grad(losses)(logps)
  close(value, -0.1 + 0.4)
  close(gradient, [[0, 0.1 - 0.4, 0]])


def test_the_mixture_is_the_geometric_mean():
  one, other = jnp.array([0.2, 0.3, 0.5]), jnp.array([0.6, 0.3, 0.1])
  got = jax.nn.softmax(mixture_logits(jnp.log(one), jnp.log(other), 0.25))
  expected = one**0.75 * other**0.25
  close(got, expected / expected.sum())
