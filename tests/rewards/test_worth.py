"""Several rewards as one score: the same on the host and in a compiled program, and never made of what is no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.rewards.protocol import LARGEST
from alignjax.rewards.worth import checked, worth

VALUES = {"a": [1.0, np.nan, 3.0, np.nan, 1.0], "b": [2.0, 5.0, np.nan, np.nan, 0.5], "monitor": [9.0] * 5}
WEIGHTS = {"a": 1.0, "b": -0.5, "monitor": 0.0}
FAILED = [False, False, False, False, True]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_score_is_the_weighted_sum_of_the_rewards_that_apply(compiled):
  array = jnp.asarray if compiled else np.asarray
  combine = jax.jit(lambda values, failed: worth(values, WEIGHTS, failed)) if compiled else worth_of
  combined = combine({name: array(x, jnp.float32) for name, x in VALUES.items()}, array(FAILED))
  np.testing.assert_array_equal(combined.scores, [0.0, -2.5, 3.0, 0.0, 0.75])
  np.testing.assert_array_equal(combined.counts, [True, True, True, False, False])
  np.testing.assert_array_equal(combined.failed, FAILED)


def worth_of(values, failed):
  return worth(values, WEIGHTS, failed)


def test_a_sum_that_is_too_large_has_failed():
  combined = worth(
    {"a": np.array([LARGEST, 1.0]), "b": np.array([LARGEST, 1.0])}, {"a": 1.0, "b": 1.0}, np.zeros(2, bool)
  )
  np.testing.assert_array_equal(combined.failed, [True, False])
  np.testing.assert_array_equal(combined.counts, [False, True])


def test_numbers_of_a_model_that_are_none_are_found():
  values, unusable = checked(np.array([1.0, np.inf, -np.inf, np.nan, 2 * LARGEST]))
  np.testing.assert_array_equal(values, [1.0, *[np.nan] * 4])
  np.testing.assert_array_equal(unusable, [False, True, True, True, True])
