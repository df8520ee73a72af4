"""Signs of over-optimisation against closed forms and brute force."""

import itertools

import numpy as np
import pytest

from alignjax.evaluation import over_optimisation as oo


def test_kl_of_best_of_n_is_that_of_the_highest_of_n_uniform_draws():
  assert oo.best_of_n_kl(1) == 0
  u = (np.arange(100_000) + 0.5) / 100_000
  for n in (2, 4, 16):  # density n u^(n - 1) against 1
    density = n * u ** (n - 1)
    assert oo.best_of_n_kl(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
  rng = np.random.default_rng(0)
  proxy, gold = rng.normal(size=(2, 3, 6))
  subsets = [list(s) for s in itertools.combinations(range(6), n)]
  best = lambda row: [s[int(np.argmax(proxy[row, s]))] for s in subsets]
  (found,) = oo.best_of_n(proxy, gold, [n])
  assert found.proxy.value == pytest.approx(np.mean([proxy[row, best(row)].mean() for row in range(3)]))
  assert found.gold.value == pytest.approx(np.mean([gold[row, best(row)].mean() for row in range(3)]))
  assert found.proxy.count == 3


def test_best_of_n_of_a_normal_reward_is_its_expected_maximum():
  rng = np.random.default_rng(1)
  proxy = rng.normal(size=(4000, 8))
  gold = 0.5 * proxy + rng.normal(size=proxy.shape)
  curve = {point.n: point for point in oo.best_of_n(proxy, gold)}
  assert sorted(curve) == [1, 2, 4, 8]
  for n, expected in ((1, 0.0), (2, 1 / np.sqrt(np.pi)), (4, 1.0293754), (8, 1.4236003)):
    assert curve[n].proxy.value == pytest.approx(expected, abs=0.03)
    assert curve[n].gold.value == pytest.approx(0.5 * expected, abs=0.05)


def test_of_equal_proxies_each_is_as_likely_chosen():
  proxy, gold = np.array([[1.0, 1.0, 0.0]] * 2), np.array([[4.0, 0.0, 9.0]] * 2)
  found = oo.best_of_n(proxy, gold, [1, 2, 3])
  assert [point.gold.value for point in found] == pytest.approx([13 / 3, 2.0, 2.0])  # never the lowest of two


@pytest.mark.parametrize("samples", [1, 5, 64, 1024])
def test_rank_weights_are_a_distribution(samples):
  for n in {1, (samples + 1) // 2, samples}:
    weights = oo.rank_weights(samples, n)
    assert weights.shape == (samples,)
    assert weights.sum() == pytest.approx(1.0)


def test_best_of_n_refuses_what_it_can_not_count():
  with pytest.raises(ValueError, match=r"must be in 1 \.\. 4"):
    oo.best_of_n(np.ones((2, 4)), np.ones((2, 4)), [5])
  with pytest.raises(ValueError, match="one shape"):
    oo.best_of_n(np.ones((2, 4)), np.ones((2, 3)))
  with pytest.raises(ValueError, match="finite"):
    oo.best_of_n(np.full((2, 4), np.nan), np.ones((2, 4)))


def test_distinct_n_counts_over_all_completions():
  assert oo.distinct_n([[1, 2, 3], [1, 2, 4]], 1) == 4 / 6
  assert oo.distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
  assert oo.distinct_n(["ab"], 3) is None


def test_z_scores_are_deviations_of_the_held_out_rewards():
  np.testing.assert_allclose(oo.z_scores([3.0, 1.0], [0.0, 2.0, 1.0]), [2.0, 0.0])
  with pytest.raises(ValueError, match="different"):
    oo.z_scores([1.0], [2.0, 2.0])
  with pytest.raises(ValueError, match="different held-out rewards"):
    oo.z_scores([1.0], [1000.1] * 7)  # whose mean is 1000.1 but for rounding


# --- alarms ----------------------------------------------------------------------------------------------------------


def rows(**columns):
  return [{"step": 10 * i} | {k: v[i] for k, v in columns.items()} for i in range(len(next(iter(columns.values()))))]


def steps(found):
  return [alarm.step for alarm in found]


def test_an_alarm_where_the_proxy_rises_and_the_held_out_signal_falls():
  history = rows(proxy=[0, 1, 2, 3, 4], gold=[0, 1, 0.8, 0.7, 0.6])
  assert steps(oo.alarms(history, [oo.diverging("proxy", "gold")])) == [30, 40]  # two evaluations after the best
  assert steps(oo.alarms(history, [oo.diverging("proxy", "gold", slack=0.35)])) == [40]
  assert not oo.alarms(rows(proxy=[0, 1, 2, 0.5, 0.4], gold=[0, 1, 0.8, 0.7, 0.6]), [oo.diverging("proxy", "gold")])
  assert not oo.alarms(rows(proxy=[0, 1, 2, 3, 4], gold=[0, 1, 2, 3, 4]), [oo.diverging("proxy", "gold")])


def test_an_alarm_where_a_share_exceeds_its_limit():
  assert steps(oo.alarms(rows(share=[0.0, 0.2, 0.05, 0.3]), [oo.above("share", 0.1)])) == [10, 30]


def test_an_alarm_where_length_drifts_either_way():
  assert steps(oo.alarms(rows(length=[10, 14, 16, 6]), [oo.drifting("length", 1.5)])) == [20, 30]


def test_an_alarm_where_entropy_collapses():
  assert steps(oo.alarms(rows(entropy=[1.0, 0.5, 0.2]), [oo.collapsing("entropy", 0.3)])) == [20]


def test_a_rule_passes_over_lines_without_its_metrics():
  history = [{"step": 0, "loss": 1.0}, *rows(share=[0.5, "nan", 0.5])]
  assert steps(oo.alarms(history, [oo.above("share", 0.1), oo.above("other", 0)])) == [20]


def test_an_alarm_is_first_raised_once():
  history, rules = rows(share=[0.0, 0.2, 0.05, 0.3]), [oo.above("share", 0.1)]
  assert [len(oo.first_raised(history[:end], rules)) for end in (1, 2, 3, 4)] == [0, 1, 0, 0]


def test_rewards_of_weight_0_are_held_out():
  found = oo.rules_of({"reward_model": 1.0, "testbed_gold": 0.0, "distinct": 0.0, "second": 0.0})
  pairs = [rule.needs for rule in found if rule.name == "diverging"]
  proxy = "eval/objective/scores"
  assert pairs == [(proxy, "eval/rewards/testbed_gold"), (proxy, "eval/rewards/second")]


def test_default_rules_name_each_sign_once_and_stay_silent_on_a_run_that_logs_none():
  names = [rule.name for rule in oo.default_rules("eval/rewards/reward_model", "eval/rewards/testbed_gold")]
  assert names == ["diverging", "outside", "length", "entropy", "distinct"]
  assert not oo.alarms(rows(loss=[1, 2, 3]), oo.default_rules("eval/rewards/reward_model"))
