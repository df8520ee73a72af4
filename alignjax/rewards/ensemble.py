"""Several scores of the same completions as one."""

import numpy as np

from alignjax.errors import InputError

POOLS = ("mean", "min", "lower")


def pooled(scores: np.ndarray, pool: str = "mean", k: float = 1.0) -> np.ndarray:
  """Pools K members' scores [K, ...] into one [...]: their "mean", "min", or "lower": mean - k * std (ddof 0).

  NaN in one member is NaN in the result. Members must be on one scale.

  Source: Coste et al. 2023, section 3 (arXiv:2310.02743); "lower" is its uncertainty-weighted score with the standard
  deviation in place of the variance.
  """
  if pool not in POOLS:
    raise InputError(f"no pool {pool!r} of an ensemble; use one of {', '.join(POOLS)}")
  scores = np.asarray(scores, np.float64)
  if pool == "min":
    return scores.min(axis=0)
  mean = scores.mean(axis=0)
  if pool == "mean":
    return mean
  return mean - k * scores.std(axis=0)
