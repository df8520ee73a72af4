"""Agreement beside the numbers that books, papers and the authors of data printed."""

import numpy as np
import pytest

from alignjax.data.quality import agreement
from tests.feedback import pandalm

N = agreement.MISSING
# Krippendorff 2011, section C: four observers, twelve units.
KRIPPENDORFF = np.array(
  [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
  ]
).T
KRIPPENDORFF = np.where(KRIPPENDORFF == N, N, KRIPPENDORFF - 1)
# Fleiss's example on Wikipedia: ten items, fourteen raters, five categories.
FLEISS = [
  *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
  *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
]


# The example of Wikipedia's page: three coders, fifteen units.
WIKIPEDIA = np.array(
  [
    [N, N, N, N, N, 3, 4, 1, 2, 1, 1, 3, 3, N, 3],
    [1, N, 2, 1, 3, 3, 4, 3, N, N, N, N, N, N, N],
    [N, N, 2, 1, 3, 4, 4, N, 2, 1, 1, 3, 3, N, 4],
  ]
).T
WIKIPEDIA = np.where(WIKIPEDIA == N, N, WIKIPEDIA - 1)


def test_alpha_of_krippendorffs_examples():
  assert agreement.krippendorff_alpha(WIKIPEDIA, 4) == pytest.approx(0.691358, abs=1e-6)
  assert agreement.krippendorff_alpha(WIKIPEDIA, 4, "ordinal") == pytest.approx(0.806721, abs=1e-6)
  assert agreement.krippendorff_alpha(KRIPPENDORFF, 5) == pytest.approx(0.743421, abs=1e-6)
  assert agreement.krippendorff_alpha(KRIPPENDORFF, 5, "ordinal") == pytest.approx(0.815, abs=5e-4)


def test_fleiss_of_the_textbook():
  assert agreement.fleiss_kappa(FLEISS) == pytest.approx(0.210, abs=5e-4)


def test_cohens_kappa_of_the_textbook():
  assert agreement.cohen_kappa([[20, 5], [10, 15]]) == pytest.approx(0.4)
  assert np.isnan(agreement.cohen_kappa([[4, 0], [0, 0]]))
  assert np.isnan(agreement.cohen_kappa([[0, 0], [0, 0]]))


def test_macro_f1_counts_a_category_that_is_never_right():
  assert agreement.macro_f1([[2, 0, 0], [1, 0, 0], [0, 0, 0]]) == pytest.approx((4 / 5 + 0) / 2)


def test_missing_labels_are_no_category():
  assert agreement.confusion([0, 1, N], [0, N, 1], 2).tolist() == [[1, 0], [0, 0]]
  assert agreement.majority([[0, 1, N], [N, N, N], [1, 1, 0]], 2).tolist() == [N, N, 1]
  with pytest.raises(ValueError, match="categories 0 to 1"):
    agreement.majority([[2]], 2)


def test_the_people_of_pandalm():
  labels = pandalm.labels()
  assert labels.shape == (600, 3)
  pairs = agreement.pairwise(labels, 3, ["1", "2", "3"])
  assert [pair.count for pair in pairs] == [600] * 3
  assert [round(pair.kappa, 4) for pair in pairs] == [0.8200, 0.8541, 0.8483]
  counts = np.stack([(labels == category).sum(axis=1) for category in range(3)], axis=1)
  assert agreement.fleiss_kappa(counts) == pytest.approx(0.84077, abs=5e-6)
  assert agreement.krippendorff_alpha(labels, 3) == pytest.approx(0.84086, abs=5e-6)
