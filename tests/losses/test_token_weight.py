"""Weights of sampled tokens by definition. Outside values: test_golden_policy.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.token_weight import on_policy, sampling_correction, top_entropy

NAN = np.nan


@pytest.mark.parametrize(
  ("level", "bound", "expected"),
  [
    ("token", "truncate", [[1, 0.5, 4, 3, 1]]),
    ("token", "mask", [[1, 0, 0, 3, 1]]),
    ("sequence", "truncate", [[1, 4, 4, 4, 4]]),
    ("sequence", "mask", [[1, 0, 0, 0, 0]]),
  ],
)
def test_weights_are_bounded_or_dropped_and_a_missing_log_prob_is_the_trainers_own(level, bound, expected):
  old = jnp.log(jnp.array([[NAN, 0.1, 0.5, 0.6, 0.2]]))
  sampling = jnp.log(jnp.array([[0.5, 0.5, 0.1, 0.2, NAN]]))
  mask = jnp.array([[0, 1, 1, 1, 1]])
  # ratios 0.2, 5, 3 and an unknown one; their product is 3
  high = 2.5 if (level, bound) == ("sequence", "mask") else 4.0
  got = sampling_correction(old, sampling, mask, level=level, bound=bound, low=0.5, high=high)
  np.testing.assert_allclose(got, np.minimum(expected, 3 if level == "sequence" else 9), rtol=1e-6)


def test_weights_are_finite_however_far_apart_the_programs_are():
  far = jnp.array([[-1e4, 1e4]])
  for level in ("token", "sequence"):
    assert np.isfinite(sampling_correction(far, -far, jnp.ones((1, 2)), level=level, high=np.inf)).all()


def test_completions_that_the_policy_left_are_dropped_where_the_advantage_is_negative():
  sampling, logps = jnp.zeros((4, 3)), jnp.array([[-1.0], [-1.0], [-0.1], [-9.0]]) * jnp.ones(3)
  mask = jnp.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]])
  keep = on_policy(logps, sampling, jnp.array([[-1.0], [1.0], [-1.0], [-1.0]]), mask, threshold=0.5)
  np.testing.assert_array_equal(keep, np.array([0, 1, 1, 1])[:, None] * np.ones(3))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.8, 1.0])
def test_top_entropy_keeps_what_is_not_below_the_quantile(share):
  rng = np.random.default_rng(0)
  entropy, mask = rng.uniform(0, 3, (4, 9)).astype(np.float32), rng.integers(0, 2, (4, 9))
  threshold = np.quantile(entropy[mask > 0], 1 - share)
  kept = top_entropy(jnp.asarray(entropy), jnp.asarray(mask), share=share)
  np.testing.assert_array_equal(kept, (mask > 0) & (entropy >= threshold - 1e-6))


def test_top_entropy_of_nothing_is_nothing():
  np.testing.assert_array_equal(top_entropy(jnp.ones((2, 2)), jnp.zeros((2, 2)), share=0.2), 0)
