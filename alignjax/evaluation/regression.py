"""Regressions whose errors may depend on one another within clusters, such as the pairs of one prompt."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from alignjax.evaluation.interval import LEVEL, NONE, Estimate

_TURNS = 50  # of Newton's method


class Fit(NamedTuple):
  """Coefficients [k] with their clustered covariance [k, k], from n rows of so many clusters."""

  coefficients: np.ndarray
  covariance: np.ndarray
  count: Any  # int; a tuple has a method of this name
  clusters: int
  method: str

  def estimate(self, place: int) -> Estimate:
    """Returns the coefficient at a place with its interval; without one if there is one cluster."""
    value = float(self.coefficients[place])
    error = float(np.sqrt(max(self.covariance[place, place], 0.0)))
    if self.clusters < 2 or not np.isfinite(error):
      return Estimate(value, None, None, self.count, NONE)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, self.clusters - 1)) * error
    return Estimate(value, value - half, value + half, self.count, self.method)


def linear(features: ArrayLike, values: ArrayLike, clusters: Sequence[Hashable]) -> Fit:
  """Fits values [n] by least squares on features [n, k]; an intercept is a feature of ones.

  Raises:
    ValueError: a feature is a combination of others, so that its coefficient is not determined.

  Source: Liang and Zeger 1986 (doi:10.1093/biomet/73.1.13) on the covariance
  """
  X = _checked(features)
  y = np.asarray(values, np.float64)
  inverse = np.linalg.inv(X.T @ X)
  coefficients = inverse @ (X.T @ y)
  scores = X * (y - X @ coefficients)[:, None]
  return _fit(coefficients, inverse, scores, clusters, "least squares, clustered")


def logistic(features: ArrayLike, outcomes: ArrayLike, clusters: Sequence[Hashable]) -> Fit:
  """Fits outcomes [n] in 0 .. 1 by maximum likelihood: P = sigmoid(features [n, k] @ coefficients), in nats.

  Raises:
    ValueError: as `linear`; or the features tell the outcomes apart completely, so that no coefficient is largest.
  """
  X = _checked(features)
  y = np.asarray(outcomes, np.float64)
  coefficients = np.zeros(X.shape[1])
  for _ in range(_TURNS):
    p = special.expit(X @ coefficients)
    information = (X * (p * (1 - p))[:, None]).T @ X
    if np.linalg.cond(information) > 1e12:
      break
    step = np.linalg.solve(information, X.T @ (y - p))
    coefficients = coefficients + step
    if np.abs(step).max() < 1e-10:
      return _fit(coefficients, np.linalg.inv(information), X * (y - p)[:, None], clusters, "logistic, clustered")
  raise ValueError("the features tell the outcomes apart completely, or nearly so; more pairs are needed")


def _checked(features: ArrayLike) -> np.ndarray:
  X = np.asarray(features, np.float64)
  if X.ndim != 2 or np.linalg.matrix_rank(X) < X.shape[1]:
    raise ValueError("a feature is a combination of the others, or there are fewer rows than features")
  return X


def _fit(coefficients, inverse, scores, clusters, method) -> Fit:
  """Returns the fit with the sandwich covariance, whose middle is made of the scores [n, k] summed by cluster."""
  numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
  sums = np.zeros((len(numbers), scores.shape[1]))
  np.add.at(sums, [numbers[cluster] for cluster in clusters], scores)
  few = len(numbers) / max(len(numbers) - 1, 1)
  return Fit(coefficients, few * inverse @ (sums.T @ sums) @ inverse, len(scores), len(numbers), method)
