import numpy as np
import pytest
from scipy import stats

from alignjax.evaluation import interval


@pytest.mark.parametrize(("successes", "count"), [(0, 5), (3, 10), (50, 100), (981, 1000), (7, 7)])
def test_wilson_is_scipys(successes, count):
  outside = stats.binomtest(successes, count).proportion_ci(method="wilson")
  estimate = interval.wilson(successes, count)
  assert estimate.value == successes / count
  assert estimate.interval == pytest.approx([outside.low, outside.high], abs=1e-12)
  assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
  assert estimate.method == "Wilson score"


def test_wilson_covers_19_times_in_20():
  rng = np.random.default_rng(0)
  for share in (0.03, 0.5, 0.8):
    estimates = [interval.wilson(k, 80) for k in rng.binomial(80, share, 2000)]
    covered = np.mean([e.low <= share <= e.high for e in estimates])
    assert 0.92 < covered < 0.98


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(successes, count):
  with pytest.raises(ValueError, match="wilson needs"):
    interval.wilson(successes, count)


def test_mean_is_scipys_t_interval():
  values = np.random.default_rng(0).normal(3.0, 2.0, 17)
  outside = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
  estimate = interval.mean(values)
  assert estimate.value == pytest.approx(values.mean())
  assert estimate.interval == pytest.approx([outside.low, outside.high])
  assert estimate.count == 17


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0, 2.0]]])
def test_mean_refuses_what_has_no_mean(values):
  with pytest.raises(ValueError, match="mean needs"):
    interval.mean(values)


def test_one_value_or_one_cluster_has_no_interval():
  for estimate in (interval.mean([2.0]), interval.mean([1.0, 3.0], ["a", "a"])):
    assert (estimate.value, estimate.interval) == (2.0, None)
  assert interval.share([1, 0], ["a", "a"]).interval is None
  assert np.isnan(interval.standard_error([1.0, 3.0], [0, 0]))
  with pytest.raises(ValueError, match="as many as the values"):
    interval.mean([1.0, 2.0], ["a"])


def test_one_sample_of_each_prompt_has_the_plain_interval():
  rng = np.random.default_rng(0)
  values, prompts = rng.normal(size=30), [f"prompt {k}" for k in range(30)]
  assert interval.mean(values, prompts).interval == pytest.approx(interval.mean(values).interval, rel=1e-12)
  assert interval.standard_error(values, prompts) == pytest.approx(stats.sem(values))
  outcomes = rng.integers(0, 2, 30)
  assert interval.share(outcomes, prompts) == interval.wilson(outcomes.sum(), 30)


def test_samples_that_are_copies_of_one_another_count_as_one():
  values = np.random.default_rng(0).normal(size=12)
  copies, prompts = np.repeat(values, 5), np.repeat(np.arange(12), 5)
  assert interval.mean(copies, prompts).interval == pytest.approx(interval.mean(values).interval)
  outcomes = np.repeat([0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1], 5)
  clustered, alone = interval.share(outcomes, prompts), interval.wilson(8, 12)
  assert clustered.interval == pytest.approx(alone.interval, abs=0.05)  # with Student's t for z, so it is wider
  assert clustered.high - clustered.low > alone.high - alone.low
  every = interval.share(np.ones(60), prompts)
  assert every.low == pytest.approx(interval.wilson(12, 12).low, abs=0.06)


@pytest.mark.parametrize(("prompts", "samples"), [(12, 4), (40, 8)])
def test_clustered_intervals_cover_19_times_in_20_and_plain_ones_do_not(prompts, samples):
  rng = np.random.default_rng(0)
  clusters = np.repeat(np.arange(prompts), samples)
  means, plain, shares = [], [], []
  for _ in range(400):
    difficulty = np.repeat(rng.normal(size=prompts), samples)
    values = difficulty + rng.normal(size=prompts * samples)
    right = rng.random(prompts * samples) < 1 / (1 + np.exp(-1.5 * difficulty))
    inside = lambda estimate, truth: estimate.low <= truth <= estimate.high
    means.append(inside(interval.mean(values, clusters), 0.0))
    plain.append(inside(interval.mean(values), 0.0))
    shares.append(inside(interval.share(right, clusters), 0.5))
  assert 0.92 < np.mean(means) < 0.98
  assert 0.91 < np.mean(shares) < 0.98
  assert np.mean(plain) < 0.86
