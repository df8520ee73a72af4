"""From rewards to advantages: definitions, masks, rewards that are missing. Outside values: test_golden_*.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.advantages import (
  finished_only,
  gae,
  gdpo_advantages,
  group_advantages,
  masked_mean,
  masked_var,
  normalise,
  overlong_penalty,
  reinforce_plus_plus_advantages,
  rloo_advantages,
  token_rewards,
  varied,
  weighted_sum,
  whiten,
)
from tests import golden

NAN = np.nan


def completions(rows=4, width=9):
  """Masks [rows, width] of contiguous completions, one empty, one of one token, one up to the row's end."""
  columns = np.arange(width)
  start, stop = np.array([2, 3, 4, 1])[:rows, None], np.array([7, 3, 5, width])[:rows, None]
  return jnp.asarray((columns >= start) & (columns < stop), jnp.float32)


def random_arrays(shape, count, seed=0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(count)]


def test_gae_is_the_discounted_sum_of_temporal_differences():
  mask, gamma, lam = completions(), 0.9, 0.8
  rewards, values = random_arrays(mask.shape, 2)
  advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
  for row, there in enumerate(np.asarray(mask) > 0):
    r, v = np.asarray(rewards[row])[there], np.append(np.asarray(values[row])[there], 0)
    errors = r + gamma * v[1:] - v[:-1]
    expected = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(r))) for t in range(len(r))]
    np.testing.assert_allclose(advantages[row][there], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns[row][there], expected + v[:-1], rtol=1e-5, atol=1e-6)
  assert not np.any(np.asarray(advantages)[mask == 0])
  assert not np.any(np.asarray(returns)[mask == 0])


def test_with_gamma_and_lam_1_returns_are_what_is_still_to_come():
  mask = completions()
  rewards, values = random_arrays(mask.shape, 2)
  _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
  to_come = jnp.flip(jnp.cumsum(jnp.flip(rewards * mask, 1), 1), 1) * mask
  np.testing.assert_allclose(returns, to_come, atol=1e-5)


def test_what_stands_off_the_mask_changes_nothing():
  mask = completions()
  rewards, values, kl = random_arrays(mask.shape, 3)
  spoilt = lambda x: jnp.where(mask > 0, x, NAN)
  scores = jnp.arange(4.0)
  np.testing.assert_array_equal(
    token_rewards(scores, spoilt(kl), mask, kl_coef=0.1), token_rewards(scores, kl, mask, kl_coef=0.1)
  )
  for one, other in zip(
    gae(spoilt(rewards), spoilt(values), mask, gamma=0.9, lam=0.8),
    gae(rewards, values, mask, gamma=0.9, lam=0.8),
    strict=True,
  ):
    np.testing.assert_array_equal(one, other)
  np.testing.assert_array_equal(whiten(spoilt(values), mask), whiten(values, mask))


def test_the_score_stands_at_the_last_token_and_kl_at_every_one():
  mask = jnp.array([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], jnp.float32)
  kl = jnp.ones_like(mask)
  got = token_rewards(jnp.array([10.0, 20, 30, 40]), kl, mask, kl_coef=0.5)
  np.testing.assert_allclose(got, [[0, -0.5, 9.5, 0], [0, 19.5, 0, 0], [0, 0, 0, 0], [0, 0, -0.5, 39.5]])


def test_whiten_makes_mean_0_and_variance_1_over_the_mask():
  mask = completions()
  (values,) = random_arrays(mask.shape, 1)
  white = whiten(3 * values + 5, mask)
  assert float(masked_mean(white, mask)) == pytest.approx(0, abs=1e-6)
  assert float(masked_var(white, mask)[0, 0]) == pytest.approx(1, abs=1e-5)
  kept = whiten(3 * values + 5, mask, shift_mean=False)
  np.testing.assert_allclose(masked_mean(kept, mask), masked_mean(3 * values + 5, mask), rtol=1e-5)


@pytest.mark.parametrize("there", [0, 1])
def test_statistics_of_nothing_and_of_one_value_are_finite(there):
  mask = jnp.zeros((2, 3)).at[0, :there].set(1)
  values = jnp.full((2, 3), 7.0)
  assert masked_mean(values, mask) == 7.0 * there
  assert masked_var(values, mask)[0, 0] == 0
  np.testing.assert_array_equal(whiten(values, mask), jnp.zeros((2, 3)))


REWARDS = np.array([[1.0, 2, 3, 6], [0, 0, 0, 0], [5, -1, 2, 2]], np.float32)


def test_group_advantages_by_definition():
  centred = REWARDS - REWARDS.mean(1, keepdims=True)
  deviation = REWARDS.std(1, ddof=1, keepdims=True)
  np.testing.assert_allclose(group_advantages(REWARDS), centred / (deviation + 1e-4), rtol=1e-5)
  np.testing.assert_allclose(
    group_advantages(REWARDS, scale="batch"), centred / (REWARDS.std(ddof=1) + 1e-4), rtol=1e-5
  )
  np.testing.assert_allclose(group_advantages(REWARDS, scale="none"), centred, rtol=1e-6)


def test_rloo_compares_with_the_mean_of_the_others():
  others = (REWARDS.sum(1, keepdims=True) - REWARDS) / 3
  np.testing.assert_allclose(rloo_advantages(REWARDS), REWARDS - others, rtol=1e-5, atol=1e-6)


def test_reinforce_plus_plus_advantages_have_mean_0_in_groups_and_variance_1_over_the_batch():
  got = np.asarray(reinforce_plus_plus_advantages(REWARDS))
  np.testing.assert_allclose(got.mean(1), 0, atol=1e-6)
  assert got.std(ddof=1) == pytest.approx(1, rel=1e-5)


EAGER = {
  "group": group_advantages,
  "batch": lambda rewards: group_advantages(rewards, scale="batch"),
  "none": lambda rewards: group_advantages(rewards, scale="none"),
  "rloo": rloo_advantages,
  "reinforce++": reinforce_plus_plus_advantages,
  "gdpo": lambda rewards: gdpo_advantages(jnp.asarray(rewards)[..., None], jnp.ones(1)),
}
GROUPED = {name: jax.jit(function) for name, function in EAGER.items()}


@pytest.mark.parametrize("name", GROUPED)
def test_a_missing_reward_gets_0_and_leaves_the_others_as_if_it_were_not_there(name):
  short = jnp.asarray(REWARDS[:, :3])
  padded = jnp.concatenate([short, jnp.full((3, 1), NAN)], axis=1)
  got = GROUPED[name](padded)
  np.testing.assert_allclose(got[:, :3], GROUPED[name](short), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got[:, 3], 0)


@pytest.mark.parametrize("name", GROUPED)
def test_advantages_are_finite_whatever_is_missing_or_equal(name):
  groups = [[NAN, NAN, NAN], [2.0, NAN, NAN], [1.0, 1.0, NAN], [1e4, -1e4, 0.0]]
  for count in range(1, 5):
    assert np.isfinite(GROUPED[name](jnp.array(groups[:count]))).all()


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_of_equal_rewards_learns_nothing(name):
  np.testing.assert_array_equal(GROUPED[name](REWARDS)[1], 0)


@pytest.mark.parametrize("value", [1000.1, -7e4, 0.1, 1e-3, 3e14])
@pytest.mark.parametrize("name", GROUPED)
def test_equal_rewards_of_any_size_are_worth_exactly_0(name, value):
  """The mean of seven times 1000.1 is that but for rounding: over a small epsilon, an advantage of -0.37."""
  equal = np.full(7, value, np.float32)
  for batch in ([equal], [equal, REWARDS.ravel()[:7]], [equal, equal + 1], [equal, np.full(7, NAN)]):
    np.testing.assert_array_equal(GROUPED[name](jnp.array(batch))[0], 0)


@pytest.mark.parametrize("name", GROUPED)
def test_a_constant_added_to_all_rewards_changes_no_advantage(name):
  steps = REWARDS * 1024  # which 2^20 rounds none of
  np.testing.assert_allclose(
    GROUPED[name](jnp.array(steps + 2**20)), GROUPED[name](jnp.array(steps)), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("value", [1000.1, -7e4, 1e-3])
def test_equal_values_are_exactly_0_when_whitened_and_have_no_variance(value):
  mask = completions()
  values = jnp.full(mask.shape, value, jnp.float32)
  np.testing.assert_array_equal(whiten(values, mask), 0)
  np.testing.assert_array_equal(whiten(values, mask, shift_mean=False), values * mask)
  np.testing.assert_array_equal(masked_var(values, mask), 0)
  np.testing.assert_array_equal(normalise(values), 0)
  assert masked_mean(values, mask) == np.float32(value)


@pytest.mark.parametrize("unit", [1e-3, 0.3, 50.0])
def test_statistics_by_weights_do_not_depend_on_their_unit(unit):
  mask = completions()
  (values,) = random_arrays(mask.shape, 1)
  np.testing.assert_allclose(whiten(values, unit * mask), whiten(values, mask), rtol=1e-4, atol=1e-5)
  weights = jnp.array([[1.0] * 4, [2.0] * 4, [0.5] * 4])
  for scaled in (
    lambda w: group_advantages(REWARDS, scale="batch", weights=w),
    lambda w: reinforce_plus_plus_advantages(REWARDS, weights=w),
    lambda w: gdpo_advantages(jnp.asarray(REWARDS)[..., None], jnp.ones(1), example_weights=w),
  ):
    np.testing.assert_allclose(scaled(unit * weights), scaled(weights), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled(unit * jnp.ones((3, 4))), scaled(None), rtol=1e-4, atol=1e-5)
    assert not np.allclose(scaled(weights), scaled(None))


def test_a_weighted_mean_is_that_of_values_that_stand_there_as_often():
  values, often = jnp.array([1.0, 5.0, 2.0]), jnp.array([3.0, 1.0, 0.0])
  assert masked_mean(values, often) == 2
  assert masked_var(values, often, ddof=0)[0] == 3


def test_what_shapes_a_score_shapes_gdpo_by_its_own_size():
  each = jnp.asarray(np.stack([REWARDS, REWARDS[::-1]], axis=-1))
  weights = jnp.array([1.0, 2.0])
  whole = weighted_sum(each, weights)
  plain = gdpo_advantages(each, weights)
  np.testing.assert_array_equal(gdpo_advantages(each, weights, shaped=whole), plain)
  small, large = (gdpo_advantages(each, weights, shaped=whole.at[0, 0].add(-by)) for by in (0.1, 10.0))
  assert plain[0, 0] > small[0, 0] > large[0, 0]
  assert plain[0, 0] - small[0, 0] < 0.2
  failed = gdpo_advantages(each, weights, shaped=whole.at[0, 1].set(NAN))
  np.testing.assert_allclose(failed, gdpo_advantages(each.at[0, 1].set(NAN), weights), rtol=1e-5)
  assert failed[0, 1] == 0


def test_several_rewards_are_summed_by_weight_and_a_missing_one_adds_nothing():
  rewards = jnp.array([[[1.0, 10.0], [NAN, 5.0], [NAN, NAN]]])
  np.testing.assert_allclose(weighted_sum(rewards, jnp.array([1.0, 0.5])), [[6.0, 2.5, NAN]])


def test_gdpo_does_not_let_a_reward_of_large_spread_drown_another():
  small = jnp.array([[0.0, 1, 0, 1]])
  both = jnp.stack([small, 1000 * jnp.array([[0.0, 0, 1, 1]])], axis=-1)
  got = gdpo_advantages(both, jnp.ones(2))
  assert float(got[0, 1]) == pytest.approx(float(got[0, 2]), abs=1e-3)


def test_normalise_leaves_out_what_is_missing():
  np.testing.assert_allclose(normalise(jnp.array([1.0, 3.0, NAN])), [-0.70700, 0.70700, 0], atol=1e-4)


def test_varied_groups_are_those_with_something_to_learn():
  groups = [[1.0, 1.0], [1.0, 0.0], [NAN, 1.0], [NAN, NAN]]
  np.testing.assert_array_equal(varied(jnp.array(groups)), [False, True, False, False])


def test_cut_off_completions_leave_the_mask():
  mask = jnp.ones((3, 2))
  np.testing.assert_array_equal(finished_only(mask, jnp.array([True, False, True])), [[1, 1], [0, 0], [1, 1]])


def test_golden_rewards_soft_overlong():
  section = golden.section("rewards")["soft_overlong"]
  got = overlong_penalty(
    jnp.array(section["lengths"]), max_length=section["max_completion_len"], buffer=section["soft_punish_cache"]
  )
  np.testing.assert_allclose(got, section["out"], atol=1e-6)


def test_everything_compiles():
  mask = completions()
  rewards, values = random_arrays(mask.shape, 2)
  jax.jit(lambda r, v, m: gae(r, v, m, gamma=1.0, lam=0.95))(rewards, values, mask)
  jax.jit(jax.vmap(lambda lam: gae(rewards, values, mask, gamma=1.0, lam=lam)[0]))(jnp.array([0.9, 1.0]))
