import numpy as np
import pytest

from alignjax.evaluation.win_rate import win_rate


def test_a_tie_is_half_a_win():
  assert win_rate([1, 2, 3, 4], [0, 2, 5, 4]).value == (1 + 0.5 + 0 + 0.5) / 4


def test_rates_of_both_sides_sum_to_one():
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 4, (2, 200))
  ours, theirs = win_rate(a, b), win_rate(b, a)
  assert ours.value + theirs.value == pytest.approx(1)
  assert ours.interval == pytest.approx([1 - theirs.high, 1 - theirs.low])


def test_the_interval_covers_at_least_19_times_in_20_with_ties():
  rng = np.random.default_rng(0)
  outcomes = rng.choice([0.0, 0.5, 1.0], p=[0.2, 0.4, 0.4], size=(1000, 60))  # true rate 0.6
  rates = [win_rate(row, np.full(60, 0.5)) for row in outcomes]
  assert np.mean([rate.low <= 0.6 <= rate.high for rate in rates]) >= 0.95


@pytest.mark.parametrize(
  ("a", "b", "message"),
  [([1, 2], [1], "pair up"), ([1, np.nan], [1, 2], "NaN"), ([], [], "wilson needs")],
)
def test_scores_that_can_not_be_compared_are_refused(a, b, message):
  with pytest.raises(ValueError, match=message):
    win_rate(a, b)
