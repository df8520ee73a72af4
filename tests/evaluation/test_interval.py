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


@pytest.mark.parametrize("values", [[], [1.0], [1.0, np.nan], [[1.0, 2.0]]])
def test_mean_refuses_what_has_no_interval(values):
  with pytest.raises(ValueError, match="mean needs"):
    interval.mean(values)
