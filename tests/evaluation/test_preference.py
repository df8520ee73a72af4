import json
import math

import jax
import numpy as np
import pytest
from scipy.special import expit

from alignjax.evaluation import preference
from alignjax.model import ModelConfig, decoder, heads


def calibrated_margins(count, scale=2.0, seed=0):
  """Margins whose model is right exactly as often as it says: the preferred side is drawn from them."""
  rng = np.random.default_rng(seed)
  margins = rng.normal(0, scale, count)
  return np.where(rng.random(count) < expit(margins), margins, -margins)


def test_accuracy_counts_a_tie_as_wrong():
  estimate = preference.accuracy([2.0, 0.1, 0.0, -1.0])
  assert estimate.value == 0.5
  assert estimate.count == 4


def test_a_calibrated_model_has_the_error_that_noise_alone_explains():
  measured = [preference.calibration(calibrated_margins(1000, seed=s)) for s in range(100)]
  observed = np.mean([m.ece for m in measured])
  expected = np.mean([m.ece_if_calibrated for m in measured])
  assert observed == pytest.approx(expected, rel=0.1)
  assert preference.calibration(calibrated_margins(200_000)).ece < 0.005


def test_overconfidence_shows_in_every_measure():
  margins = calibrated_margins(20_000)
  honest, loud = preference.calibration(margins), preference.calibration(4 * margins)
  assert loud.ece > 0.1 > 10 * honest.ece
  assert loud.brier > honest.brier
  assert loud.log_loss > honest.log_loss


def test_ece_equals_a_calculation_by_hand():
  margins = np.log([4.0, 4.0, 4.0, 1 / 4, 1 / 4])  # confidence 0.8 five times, right three times
  measured = preference.calibration(margins)
  assert measured.ece == pytest.approx(0.2)
  (row,) = measured.reliability
  assert (row.confidence, row.accuracy, row.count) == (pytest.approx(0.8), 0.6, 5)
  assert measured.brier == pytest.approx((3 * 0.2**2 + 2 * 0.8**2) / 5)
  assert measured.log_loss == pytest.approx(-(3 * math.log(0.8) + 2 * math.log(0.2)) / 5)


def test_a_model_that_knows_nothing_is_calibrated():
  measured = preference.calibration(np.zeros(100))
  assert measured.ece == 0
  assert measured.brier == 0.25
  assert measured.log_loss == pytest.approx(math.log(2))


def test_swapping_the_two_sides_of_all_pairs_of_a_calibrated_model_uncalibrates_it():
  margins = calibrated_margins(5000)
  assert preference.calibration(-margins).ece > 0.3


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_bins_hold_every_pair_once_and_lie_in_order(bins):
  margins = np.concatenate([calibrated_margins(500, scale=30.0), [0.0, 800.0, -800.0, np.inf]])
  measured = preference.calibration(margins, bins)
  rows = measured.reliability
  assert sum(row.count for row in rows) == margins.size
  assert len(rows) <= bins
  assert [row.confidence for row in rows] == sorted(row.confidence for row in rows)
  assert all(0.5 <= row.confidence <= 1 for row in rows)
  assert all(row.low <= row.accuracy <= row.high for row in rows)


def test_summary_is_json():
  record = json.loads(json.dumps(preference.summary(calibrated_margins(300))))
  assert record["heldout_interval"][0] < record["heldout_accuracy"] < record["heldout_interval"][1]
  assert set(record["reliability"][0]) >= {"confidence", "accuracy", "count"}
  assert record["pairs"] == 300


@pytest.mark.parametrize("margins", [[], [np.nan], [[1.0]]])
def test_what_is_no_margin_is_refused(margins):
  with pytest.raises(ValueError, match="margins must be"):
    preference.accuracy(margins)


def test_reward_margins_reads_each_pair_once_and_skips_empty_places():
  model = decoder.make(
    ModelConfig(vocab=20, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16, head="scalar")
  )
  params = jax.jit(model.init)(jax.random.key(0))
  params["score"] = jax.random.normal(jax.random.key(1), params["score"].shape)
  tokens = np.arange(1, 13, dtype=np.int32).reshape(1, 12)
  batch = {
    "tokens": np.tile(tokens, (2, 1)),
    "segment_ids": np.array([[1] * 3 + [2] * 3 + [3] * 2 + [4] * 4, [1] * 4 + [2] * 4 + [0] * 4]),
    "positions": np.array([[0, 1, 2] * 2 + [0, 1] + [0, 1, 2, 3], [0, 1, 2, 3] * 2 + [0] * 4]),
    "example_mask": np.array([[1.0, 1.0], [1.0, 0.0]]),
    "record_ids": np.array([[7, 3], [5, -1]]),
  }
  margins = preference.reward_margins(model, params, [batch, batch])
  assert set(margins) == {7, 3, 5}

  def reward(text):
    text = np.array([text], np.int32)
    ones, positions = np.ones_like(text), np.arange(text.shape[1])[None]
    hidden, _ = model.forward(params, text, ones, positions)
    return float(heads.score(params, hidden)[0, -1])

  assert margins[7] == pytest.approx(reward([1, 2, 3]) - reward([4, 5, 6]), abs=1e-5)
  assert margins[5] == pytest.approx(reward([1, 2, 3, 4]) - reward([5, 6, 7, 8]), abs=1e-5)
