"""Estimates with their 95 % intervals and the names of the methods that made these."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95  # of every interval in this package
NONE = "none: one cluster"


class Estimate(NamedTuple):
  """A number, its 95 % interval [low, high], its sample size, and the method of the interval.

  low and high are None if there is no interval: for one value, or values of one cluster.
  """

  value: float
  low: float | None
  high: float | None
  count: Any  # int; a tuple has a method of this name
  method: str

  @property
  def interval(self) -> list[float] | None:
    """[low, high], ready for JSON; None if there is no interval."""
    if self.low is None or self.high is None:
      return None
    return [self.low, self.high]


def wilson(successes: float, count: int) -> Estimate:
  """Computes the share successes / count with Wilson's score interval.

  Unlike the textbook's p +- 1.96 sqrt(p (1 - p) / n) it stays within [0, 1], and keeps its coverage near the borders
  and for small counts. `successes` may be fractional (a tie is half a win). A half has less variance than a coin flip,
  so that the interval is then too wide, never too narrow.

  Args:
    successes: in 0 .. count.
    count: of independent outcomes; for samples of one prompt use `share`.

  Raises:
    ValueError: count is not positive, or successes are outside 0 .. count.

  Source: Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4 (doi:10.1214/ss/1009213286)
  """
  if count < 1 or not 0 <= successes <= count:
    raise ValueError(f"wilson needs 0 <= successes <= count and count >= 1, got {successes}/{count}")
  low, high = _score(successes / count, count, stats.norm.ppf(0.5 + LEVEL / 2))
  return Estimate(float(successes / count), low, high, int(count), "Wilson score")


def _score(share: float, count: float, z: float) -> tuple[float, float]:
  """Returns the ends of the score interval of a share of `count`."""
  center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
  half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
  # Clipping only removes rounding: at a share of 0 or 1 the exact end is the border.
  return max(0.0, float(center - half)), min(1.0, float(center + half))


def share(outcomes: ArrayLike, clusters: Sequence[Hashable] | None = None) -> Estimate:
  """Computes the mean of outcomes [n] in 0 .. 1, such as right or wrong, with Wilson's interval over clusters.

  Samples of one prompt are similar, so that they count as fewer. n is divided by the design effect, and z is Student's
  t for the number of clusters. The design effect is the ratio of the clustered standard error squared to that of
  independent outcomes, at least 1. If every outcome has its own cluster, this is `wilson`. If all outcomes are equal, n
  is the number of clusters. If there is only one cluster, there is no interval.

  Args:
    outcomes: each 0, 1, or 1/2 for a tie.
    clusters: of each outcome, such as its prompt; None: each has its own.

  Raises:
    ValueError: there are no outcomes, one is outside 0 .. 1, or the clusters are not as many.

  Source: Kish 1965; Korn and Graubard 1998 on the interval
  """
  outcomes = np.asarray(outcomes, np.float64)
  places = _places(clusters, outcomes)
  groups = int(places.max(initial=-1)) + 1
  plain = wilson(float(outcomes.sum()), outcomes.size)
  if groups == outcomes.size:
    return plain
  if groups < 2:
    return plain._replace(low=None, high=None, method=NONE)
  design_effect = outcomes.size / groups
  variance = outcomes.var(ddof=1) / outcomes.size
  if variance > 0:
    design_effect = max(1.0, standard_error(outcomes, clusters) ** 2 / variance)
  low, high = _score(plain.value, outcomes.size / design_effect, _quantile(groups))
  return plain._replace(low=low, high=high, method="Wilson score, clustered")


def standard_error(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> float:
  """Computes the standard error of the mean of values [n], which may depend on one another within clusters.

  It is sqrt(G / (G - 1) sum_c (sum_i (x_ic - mean))^2) / n over G clusters; if each value has its own cluster, the
  deviation over sqrt(n). NaN if there are fewer than two clusters.

  Args:
    values: finite.
    clusters: of each value; None: each has its own.

  Raises:
    ValueError: the clusters are not as many as the values.

  Source: Miller 2024, section 2.2 (arXiv:2411.00640), with the factor G / (G - 1) for few clusters
  """
  values = np.asarray(values, np.float64)
  sums = np.bincount(_places(clusters, values), values - values.mean())
  if len(sums) < 2:
    return float("nan")
  return float(np.sqrt(len(sums) / (len(sums) - 1) * np.sum(np.square(sums))) / values.size)


def _quantile(groups: int) -> float:
  """Student's t of the upper end of an interval over so many clusters."""
  return float(stats.t.ppf(0.5 + LEVEL / 2, groups - 1))


def _places(clusters: Sequence[Hashable] | None, values: np.ndarray) -> np.ndarray:
  """Returns the number of each value's cluster, from 0."""
  if clusters is None:
    return np.arange(values.size)
  numbers: dict[Hashable, int] = {}
  places = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
  if len(places) != values.size:
    raise ValueError(f"clusters must be as many as the values, {values.size}; got {len(places)}")
  return np.asarray(places, np.int64)


def mean(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> Estimate:
  """Computes the mean of values [n] with Student's t interval, over clusters if these are given.

  Args:
    values: independent of one another if they are of different clusters.
    clusters: of each value, such as the prompt that a sample answers; None: each has its own.

  Raises:
    ValueError: there are no values, one is not finite, or the clusters are not as many.

  Source: Student 1908 (doi:10.1093/biomet/6.1.1); of clusters, `standard_error`
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not values.size or not np.isfinite(values).all():
    raise ValueError(f"mean needs finite values of shape [n >= 1], got shape {values.shape}")
  count = values.size
  value = float(values.mean())
  groups = int(_places(clusters, values).max()) + 1
  if groups < 2:  # there is no spread between clusters
    return Estimate(value, None, None, count, NONE)
  half = _quantile(groups) * standard_error(values, clusters)
  method = "Student t" if groups == count else "Student t, clustered"
  return Estimate(value, value - half, value + half, count, method)
