"""The numbers of a row's segments: who lays rows out and who reads them mean the same."""

import numpy as np
import pytest

from alignjax.data import segment


def test_the_sides_of_pair_k_are_2k_plus_1_and_2k_plus_2_and_the_thirds_come_after_all_pairs():
  assert [segment.of(k, side, segment.PAIR) for k in range(3) for side in range(2)] == [1, 2, 3, 4, 5, 6]
  assert [segment.of_third(k, 3) for k in range(3)] == [7, 8, 9]
  assert segment.count(3, segment.PAIR) == 6
  np.testing.assert_array_equal(segment.thirds(np.arange(10), 3), [0, 0, 0, 0, 0, 0, 0, 1, 2, 3])


@pytest.mark.parametrize("sides", [1, 2, 3])
def test_values_by_example_are_those_of_its_segments(sides):
  numbers = np.arange(1, 6 * sides + 1).reshape(2, 3 * sides)  # of two rows, as if their segments were numbered through
  parted = segment.by_example(numbers, sides)
  assert parted.shape == (2, 3, sides)
  for k in range(3):
    np.testing.assert_array_equal(parted[0, k], [segment.of(k, side, sides) for side in range(sides)])
  np.testing.assert_array_equal(segment.by_segment(parted), numbers)
  assert segment.by_example(numbers[..., None], sides).shape == (2, 3, sides, 1)
