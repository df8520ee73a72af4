"""Agreement between annotators: of two (kappa), of several (Fleiss' kappa, Krippendorff's alpha), and with a truth.

Labels are whole numbers from 0, the number of a category; MISSING where an annotator gave none, which is left out and
never counted as a category of its own.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

MISSING = -1


def category_counts(labels: ArrayLike, categories: int) -> np.ndarray:
  """Counts the labels of each item by category, int64 [items, categories], from labels int [items, annotators].

  Raises:
    ValueError: a label is no category.
  """
  table = _labels(labels, categories)
  return np.stack([(table == category).sum(axis=1) for category in range(categories)], axis=1)


def confusion(truth: ArrayLike, labels: ArrayLike, categories: int) -> np.ndarray:
  """Counts the pairs of labels, int64 [categories, categories]: rows by `truth`, columns by `labels`, both int [n].

  Items where one of the two is MISSING are left out.

  Raises:
    ValueError: the two are not equally long, or a label is no category.
  """
  truth = _labels(truth, categories)
  labels = _labels(labels, categories)
  if truth.shape != labels.shape:
    raise ValueError(f"labels of the same items: got shapes {truth.shape} and {labels.shape}")
  both = (truth != MISSING) & (labels != MISSING)
  cells = truth[both] * categories + labels[both]
  return np.bincount(cells, minlength=categories**2).reshape(categories, categories)


def cohen_kappa(counts: ArrayLike) -> float:
  """Computes Cohen's kappa from a confusion matrix [categories, categories].

  NaN without items, and if both gave one and the same category throughout: agreement by chance is then 1.

  Source: Cohen 1960 (doi:10.1177/001316446002000104)
  """
  shares = np.asarray(counts, np.float64)
  if not shares.sum():
    return float("nan")
  shares = shares / shares.sum()
  by_chance = float(shares.sum(axis=0) @ shares.sum(axis=1))
  return _beyond_chance(float(np.trace(shares)), by_chance)


def fleiss_kappa(ratings: ArrayLike) -> float:
  """Computes Fleiss' kappa from the counts [items, categories] of the labels of each item.

  Raises:
    ValueError: the items have different numbers of labels, or fewer than two.

  Source: Fleiss 1971 (doi:10.1037/h0031619)
  """
  counts = np.asarray(ratings, np.float64)
  raters = counts.sum(axis=1)
  if not raters.size or raters[0] < 2 or (raters != raters[0]).any():
    raise ValueError("fleiss_kappa needs the same number of labels, two or more, for every item; use alpha")
  n = raters[0]
  agreed = float(np.mean((np.square(counts).sum(axis=1) - n) / (n * (n - 1))))
  by_chance = float(np.square(counts.sum(axis=0) / counts.sum()).sum())
  return _beyond_chance(agreed, by_chance)


def krippendorff_alpha(labels: ArrayLike, categories: int, level: str = "nominal") -> float:
  """Computes Krippendorff's alpha = 1 - observed / expected disagreement of labels int [items, annotators].

  MISSING labels are allowed; an item with fewer than two labels says nothing. NaN if all labels are of one category.

  Args:
    labels: one row an item.
    categories: their number.
    level: "nominal", or "ordinal", for which the categories are in order.

  Raises:
    ValueError: a label is no category, or the level is unknown.

  Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability"
  """
  counts = category_counts(labels, categories).astype(np.float64)
  counts = counts[counts.sum(axis=1) >= 2]
  if not counts.size:
    return float("nan")
  pairs = counts.sum(axis=1) - 1
  coincidences = (counts / pairs[:, None]).T @ counts - np.diag((counts / pairs[:, None]).sum(axis=0))
  totals = coincidences.sum(axis=1)
  distance = _distances(totals, level)
  expected = float(totals @ distance @ totals) / (totals.sum() - 1)
  if not expected:
    return float("nan")
  return 1 - float((coincidences * distance).sum()) / expected


def _distances(totals: np.ndarray, level: str) -> np.ndarray:
  """Returns the squared distances [categories, categories] of a level, given how often each category occurs."""
  categories = len(totals)
  if level == "nominal":
    return 1 - np.eye(categories)
  if level != "ordinal":
    raise ValueError(f"level {level!r}: use nominal or ordinal")
  middles = np.cumsum(totals) - totals / 2  # the labels between two categories are the difference of their middles
  return np.square(middles[:, None] - middles[None, :])


def macro_f1(counts: ArrayLike) -> float:
  """Computes the mean F1 over the categories that occur, from a confusion matrix [categories, categories].

  NaN without items. A category that occurs in the truth or among the labels counts; one that is never right has 0.
  """
  matrix = np.asarray(counts, np.float64)
  occur = matrix.sum(axis=0) + matrix.sum(axis=1)
  if not occur.any():
    return float("nan")
  return float(np.mean(2 * np.diag(matrix)[occur > 0] / occur[occur > 0]))


class Pair(NamedTuple):
  """The agreement of a pair of annotators over the items that both labelled."""

  first: str
  second: str
  count: Any  # int; a tuple has a method of this name
  agreed: float
  kappa: float


def pairwise(labels: ArrayLike, categories: int, names: list[str]) -> list[Pair]:
  """Computes the agreement of every two annotators, from labels int [items, annotators]; pairs without items are left
  out.
  """
  table = _labels(labels, categories)
  found = []
  for i, first in enumerate(names):
    for j in range(i + 1, len(names)):
      counts = confusion(table[:, i], table[:, j], categories)
      if counts.sum():
        agreed = float(np.trace(counts) / counts.sum())
        found.append(Pair(first, names[j], int(counts.sum()), agreed, cohen_kappa(counts)))
  return found


def majority(labels: ArrayLike, categories: int) -> np.ndarray:
  """Returns the commonest label of each item, int64 [items], from labels int [items, annotators].

  MISSING if there is no label, or two are equally common.
  """
  counts = category_counts(labels, categories)
  most = counts.max(axis=1)
  is_alone = (counts == most[:, None]).sum(axis=1) == 1
  return np.where((most > 0) & is_alone, counts.argmax(axis=1), MISSING)


def _beyond_chance(agreed: float, by_chance: float) -> float:
  if by_chance >= 1:
    return float("nan")
  return (agreed - by_chance) / (1 - by_chance)


def _labels(labels: ArrayLike, categories: int) -> np.ndarray:
  table = np.asarray(labels, np.int64)
  if table.size and (table.min() < MISSING or table.max() >= categories):
    raise ValueError(f"labels must be categories 0 to {categories - 1}, or {MISSING} for none")
  return table
