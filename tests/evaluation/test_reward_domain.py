"""The domain of a reward model: distances against closed forms, shares on data of the same kind and of another."""

import dataclasses

import jax
import numpy as np
import pytest

from alignjax.algorithms.reward_domain import distance, place
from alignjax.evaluation import reward_domain as domains
from alignjax.model import decoder

MIX = np.array([[2.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 0.2]])


def texts(count, seed, shift=0.0):
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(count, 3)) @ MIX + 5 + shift
  return domains.Texts(features, features @ [1.0, 0, 0])


def test_distances_are_mahalanobis():
  training = texts(20_000, 0)
  fitted = domains.fit(training, texts(1000, 1))
  precision = np.linalg.inv(np.cov(training.features.T, bias=True))
  away = texts(50, 2).features - training.features.mean(axis=0)
  expected = np.sqrt(np.einsum("nd,de,ne->n", away, precision, away))
  np.testing.assert_allclose(distance(fitted, away + training.features.mean(axis=0)), expected, rtol=1e-2)


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_as_many_texts_of_the_same_kind_lie_outside_as_were_asked_for(share):
  fitted = domains.fit(texts(5000, 0), texts(5000, 1), share)
  assert domains.outside(fitted, texts(20_000, 2).features).value == pytest.approx(share, rel=0.25)
  assert domains.outside(fitted, texts(2000, 3, shift=9.0).features).value > 0.99


def test_rewards_have_the_moments_of_the_held_out_texts():
  held_out = texts(500, 1)
  fitted = domains.fit(texts(500, 0), held_out)
  assert fitted["reward_mean"] == pytest.approx(held_out.rewards.mean())
  assert fitted["reward_std"] == pytest.approx(held_out.rewards.std(ddof=1))


def test_a_share_needs_enough_held_out_texts():
  with pytest.raises(ValueError, match="99 held-out"):
    domains.fit(texts(100, 0), texts(98, 1), 0.01)
  domains.fit(texts(100, 0), texts(99, 1), 0.01)


def test_covariance_of_few_texts_is_drawn_to_a_sphere_and_of_many_is_their_own():
  wide = np.random.default_rng(0).normal(size=(5, 40))
  few = domains.shrunk_covariance(wide)
  assert np.linalg.eigvalsh(few).min() > 0.1 * np.trace(few) / 40
  many = texts(20_000, 0).features
  np.testing.assert_allclose(domains.shrunk_covariance(many), np.cov(many.T, bias=True), atol=2e-3)
  assert np.trace(few) == pytest.approx(np.trace(np.cov(wide.T, bias=True)))


def test_a_direction_without_variance_does_not_count():
  flat = np.concatenate([texts(200, 0).features, np.ones((200, 1))], axis=1)
  fitted = domains.fit(domains.Texts(flat, flat[:, 0]), domains.Texts(flat, flat[:, 0]), 0.1)
  assert np.isfinite(distance(fitted, flat)).all()


def test_features_are_the_states_that_the_head_reads(config, one_device):
  model = decoder.make(dataclasses.replace(config, head="scalar", score_heads=2))
  rng = np.random.default_rng(0)
  segment_ids = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2], [0] * 6], np.int32)
  batch = {
    "tokens": rng.integers(1, config.vocab, (3, 6)).astype(np.int32),
    "segment_ids": segment_ids,
    "positions": np.array([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3], [0] * 6], np.int32),
    "example_mask": np.array([[1.0], [1.0], [0.0]], np.float32),
  }
  with jax.set_mesh(one_device):
    params = jax.jit(model.init)(jax.random.key(0))
    found = domains.measure(model, params, [batch, batch])
  assert found.features.shape == (8, config.embed)  # two pairs a batch, and no text in the last row
  np.testing.assert_allclose(found.features @ np.asarray(params["score"]).mean(axis=1), found.rewards, atol=1e-5)
  np.testing.assert_array_equal(found.features[:4], found.features[4:])


def test_equal_rewards_have_no_deviation_to_count_in():
  """The mean of seven times 1000.1 is that but for rounding: over such a deviation, any z-score at all."""
  features = np.random.default_rng(0).normal(size=(7, 3))
  training, held_out = domains.Texts(features, np.ones(7)), domains.Texts(features, np.full(7, 1000.1))
  fitted = domains.fit(training, held_out, share=0.2)
  assert fitted["reward_std"] == 0
  rewards = np.array([1000.1] * 6 + [1000.2])
  np.testing.assert_array_equal(place(fitted, features, rewards)["z"], 0)
