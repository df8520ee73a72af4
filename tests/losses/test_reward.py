"""The losses of reward models: pairs, rankings and steps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.reward import bradley_terry, plackett_luce, step_logistic
from tests import golden


@pytest.mark.parametrize("case", golden.cases("reward_bt", lambda config: True))
def test_golden_loss_and_gradient(case):
  section = golden.section("reward_bt")
  given, case = section["inputs"], section["cases"][case]
  config = case["config"]
  with jax.enable_x64(True):
    sides = jnp.array([given["rewards_chosen"], given["rewards_rejected"]]) * config["scale"]
    loss = lambda sides: bradley_terry(
      *sides,
      margin=jnp.array(given["margin"]) if config["margin"] else 0.0,
      center_coefficient=config["center_rewards_coefficient"] or 0.0,
    ).mean()
    value, gradient = jax.value_and_grad(loss)(sides)
  expected = case["grad_rewards_chosen_then_rejected"]
  np.testing.assert_allclose(value, case["loss"], rtol=1e-6)
  np.testing.assert_allclose(gradient.ravel(), expected, atol=1e-6, rtol=1e-6)


def test_golden_loss_of_a_real_model():
  section = golden.section("reward_bt_end_to_end")
  chosen, rejected = np.split(np.array(section["outputs"]["pooled_rewards"]), 2)
  loss = bradley_terry(chosen, rejected).mean()
  assert float(loss) == pytest.approx(section["outputs"]["loss"], rel=1e-6)


def test_equal_rewards_cost_log2():
  np.testing.assert_allclose(bradley_terry(jnp.ones(3), jnp.ones(3)), np.log(2), rtol=1e-7)


def test_a_margin_shifts_the_difference():
  shifted = bradley_terry(jnp.float32(2.0), jnp.float32(1.0), margin=3.0)
  assert float(shifted) == pytest.approx(float(bradley_terry(jnp.float32(-2.0), jnp.float32(0.0))))


def test_only_centring_fixes_the_level_of_the_rewards():
  chosen, rejected = jnp.array([2.0]), jnp.array([1.0])
  level = lambda c: jax.grad(lambda shift: bradley_terry(chosen + shift, rejected + shift, center_coefficient=c).sum())(
    0.0
  )
  assert float(level(0.0)) == pytest.approx(0, abs=1e-7)
  assert float(level(0.01)) == pytest.approx(0.01 * 2 * 3 * 2, rel=1e-5)


@pytest.mark.parametrize("difference", [-1e4, 0.0, 1e4])
def test_loss_and_gradient_are_finite_at_extreme_rewards(difference):
  loss = lambda chosen: bradley_terry(chosen, 0.0, center_coefficient=0.01)
  value, gradient = jax.value_and_grad(loss)(jnp.float32(difference))
  assert np.isfinite(value)
  assert np.isfinite(gradient)


def test_gradients_equal_finite_differences():
  with jax.enable_x64(True):
    x, step = jnp.array([0.7, -1.3, 0.2]), 1e-6
    loss = lambda x: bradley_terry(x[0], x[1], margin=x[2], center_coefficient=0.1)
    gradient = jax.grad(loss)(x)
    for i, unit in enumerate(np.eye(3)):
      slope = (loss(x + step * unit) - loss(x - step * unit)) / (2 * step)
      assert float(slope) == pytest.approx(float(gradient[i]), rel=1e-7)


# --- rankings --------------------------------------------------------------------------------------------------------


def probability(rewards, order):
  """P(order) by drawing without replacement in proportion to exp(reward): the definition, in float64."""
  left, total = list(range(len(rewards))), 1.0
  for i in order:
    total *= np.exp(rewards[i]) / sum(np.exp(rewards[j]) for j in left)
    left.remove(i)
  return total


def consistent(order, ranks):
  """Whether an order of places respects the ranks, whatever it does with ties."""
  return all(ranks[i] <= ranks[j] for i, j in itertools.pairwise(order))


ranking_loss = jax.jit(plackett_luce)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_ranking_has_the_probability_of_its_draws_and_all_of_them_sum_to_1(k):
  rewards = np.random.default_rng(k).normal(size=k)
  with jax.enable_x64(True):
    total = 0.0
    for order in itertools.permutations(range(k)):
      ranks = 1.0 + np.argsort(order)
      loss = float(ranking_loss(jnp.asarray(rewards), jnp.asarray(ranks)))
      assert np.exp(-loss) == pytest.approx(probability(rewards, order), rel=1e-12)
      total += np.exp(-loss)
  assert total == pytest.approx(1, rel=1e-12)


def test_a_ranking_of_two_is_the_pair_of_bradley_terry():
  rng = np.random.default_rng(0)
  chosen, rejected = jnp.asarray(3 * rng.normal(size=(2, 50)), jnp.float32)
  pairs = lambda c, r: bradley_terry(c, r, center_coefficient=0.3).sum()
  rankings = lambda c, r: plackett_luce(jnp.stack([r, c], axis=-1), jnp.array([2.0, 1.0]), center_coefficient=0.3).sum()
  for got, expected in zip(
    jax.tree.leaves(jax.jit(jax.value_and_grad(rankings, argnums=(0, 1)))(chosen, rejected)),
    jax.tree.leaves(jax.jit(jax.value_and_grad(pairs, argnums=(0, 1)))(chosen, rejected)),
    strict=True,
  ):
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("ranks", [(1, 1, 2), (1, 2, 2, 2), (1, 1, 2, 3, 3), (2, 1, 2, 1), (1, 1, 1)])
def test_ties_of_equal_rewards_have_the_probability_of_all_their_orders(ranks):
  level = np.random.default_rng(0).normal(size=4)
  rewards = level[np.array(ranks)]
  orders = itertools.permutations(range(len(ranks)))
  exact = sum(probability(rewards, order) for order in orders if consistent(order, ranks))
  with jax.enable_x64(True):
    loss = float(ranking_loss(jnp.asarray(rewards), jnp.asarray(ranks, float)))
  assert np.exp(-loss) == pytest.approx(exact, rel=1e-12)


def test_ties_of_close_rewards_have_it_nearly():
  rng, ranks = np.random.default_rng(0), (1, 1, 2, 2, 3)
  rewards = np.array([1.0, 1.0, 0.0, 0.0, -1.0]) + 0.2 * rng.normal(size=5)
  orders = itertools.permutations(range(5))
  exact = sum(probability(rewards, order) for order in orders if consistent(order, ranks))
  loss = float(plackett_luce(jnp.asarray(rewards), jnp.asarray(ranks, float)))
  assert np.exp(-loss) == pytest.approx(exact, rel=0.02)


def test_a_tie_pulls_rewards_together_and_only_there_costs_nothing():
  losses = [float(plackett_luce(jnp.array([x, 0.0]), jnp.ones(2))) for x in (-1.0, 0.0, 1.0)]
  assert losses[1] == pytest.approx(0, abs=1e-6)
  assert losses[0] == pytest.approx(losses[2])
  assert losses[0] > 0.1


@pytest.mark.slow
def test_neither_the_order_of_responses_nor_absent_ones_matter():
  rewards, ranks = jnp.array([0.3, -1.0, 2.0, 0.5]), jnp.array([2.0, 3.0, 1.0, 2.0])
  loss = jax.value_and_grad(lambda r, k: plackett_luce(r, k, center_coefficient=0.1))
  value, gradient = loss(rewards, ranks)
  order = jnp.array([3, 1, 0, 2])
  shuffled = loss(rewards[order], ranks[order])
  assert float(shuffled[0]) == pytest.approx(float(value), rel=1e-6)
  np.testing.assert_allclose(shuffled[1], gradient[order], rtol=1e-5)
  more = loss(jnp.r_[rewards, 7.0, 0.0], jnp.r_[ranks, 0.0, 0.0])
  assert float(more[0]) == pytest.approx(float(value), rel=1e-6)
  np.testing.assert_allclose(more[1], jnp.r_[gradient, 0.0, 0.0], rtol=1e-5)
  nothing = loss(jnp.zeros(3), jnp.zeros(3))
  assert float(nothing[0]) == 0
  assert not nothing[1].any()


def test_rankings_are_finite_at_extreme_rewards():
  extreme = jnp.array(list(itertools.product([-1e4, 0.0, 1e4], repeat=3)))
  total = jax.jit(jax.value_and_grad(lambda r, ranks: plackett_luce(r, jnp.broadcast_to(ranks, r.shape)).sum()))
  for ranks in ((1.0, 2.0, 3.0), (1.0, 1.0, 2.0), (1.0, 1.0, 1.0), (2.0, 1.0, 0.0)):
    value, gradient = total(extreme, jnp.array(ranks))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_gradients_of_rankings_equal_finite_differences():
  with jax.enable_x64(True):
    x, ranks, step = jnp.array([0.7, -1.3, 0.2, 0.4]), jnp.array([1.0, 2.0, 2.0, 3.0]), 1e-6
    loss = jax.jit(lambda x: plackett_luce(x, ranks, center_coefficient=0.1))
    gradient = jax.grad(loss)(x)
    for i, unit in enumerate(np.eye(4)):
      slope = (loss(x + step * unit) - loss(x - step * unit)) / (2 * step)
      assert float(slope) == pytest.approx(float(gradient[i]), rel=1e-7)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_golden_loss_and_accuracy_of_steps():
  section = golden.section("prm")["loss"]
  inputs, outputs = section["inputs"], section["outputs"]
  logits, labels = np.array(inputs["logits"]), np.array(inputs["labels"])
  scores, there = jnp.asarray(logits[..., 1] - logits[..., 0], jnp.float32), labels >= 0
  losses = step_logistic(scores, jnp.asarray(labels))
  assert float(losses[there].mean()) == pytest.approx(outputs["loss"], rel=1e-5)
  assert ((scores > 0) == (labels > 0))[there].mean() == pytest.approx(outputs["accuracy"]["accuracy"])


def test_step_losses_and_gradients_are_finite_at_extreme_scores():
  scores = jnp.array([-1e4, 0.0, 1e4])
  for label in (0.0, 1.0):
    value, gradient = jax.value_and_grad(lambda s, label=label: step_logistic(s, jnp.full(3, label)).sum())(scores)
    assert np.isfinite(value)
    assert np.sign(gradient).sum() == (-2 if label else 2)  # a step of the right score by far has none left
