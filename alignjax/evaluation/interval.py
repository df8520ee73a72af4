"""Estimates that carry their 95 % interval, and the name of the method that made it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95  # of every interval in this package


class Estimate(NamedTuple):
  """A number, its 95 % interval [low, high], the sample size behind it, and how the interval was made."""

  value: float
  low: float
  high: float
  count: int
  method: str

  @property
  def interval(self) -> list[float]:
    """[low, high], ready for JSON."""
    return [self.low, self.high]


def wilson(successes: float, count: int) -> Estimate:
  """The share successes / count with Wilson's score interval.

  Unlike the textbook's p +- 1.96 sqrt(p (1 - p) / n) it stays within [0, 1] and keeps its coverage near the borders and
  for small counts. `successes` may be fractional (a tie is half a win): a half has less variance than a coin flip, so
  the interval is then too wide rather than too narrow.

  Raises:
    ValueError: count is not positive, or successes lie outside 0 .. count.

  Source: Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4 (doi:10.1214/ss/1009213286)
  """
  if count < 1 or not 0 <= successes <= count:
    raise ValueError(f"wilson needs 0 <= successes <= count and count >= 1, got {successes}/{count}")
  z = stats.norm.ppf(0.5 + LEVEL / 2)
  share = successes / count
  center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
  half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
  # Clipping only removes rounding: at a share of 0 or 1 the border itself is the exact end.
  low, high = max(0.0, float(center - half)), min(1.0, float(center + half))
  return Estimate(float(share), low, high, int(count), "Wilson score")


def mean(values: ArrayLike) -> Estimate:
  """The mean of independent values [n] with Student's t interval.

  Raises:
    ValueError: fewer than two values (one alone has no spread to judge by), or one that is not finite.

  Source: Student 1908 (doi:10.1093/biomet/6.1.1)
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
    raise ValueError(f"mean needs finite values of shape [n >= 2], got shape {values.shape}")
  count, value = values.size, float(values.mean())
  half = float(stats.t.ppf(0.5 + LEVEL / 2, count - 1) * values.std(ddof=1) / np.sqrt(count))
  return Estimate(value, value - half, value + half, count, "Student t")
