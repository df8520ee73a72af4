"""The share of prompts on which one model's answer beats another's."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from alignjax.evaluation import interval


def win_rate(
  scores: ArrayLike, baseline_scores: ArrayLike, clusters: Sequence[Hashable] | None = None
) -> interval.Estimate:
  """Computes the share of prompts on which `scores` [n] beats `baseline_scores` [n]; a tie is half a win.

  The comparison is paired: entry i of both scores the same prompt, so that the difficulty of a prompt cancels. The
  outcomes (0, 1/2 or 1) have Wilson's interval, which is conservative with ties, over `clusters`: the prompts, if some
  are repeated; None: all are different.

  Raises:
    ValueError: shapes differ, there are no prompts, or a score is not a number.
  """
  scores = np.asarray(scores, np.float64)
  baseline_scores = np.asarray(baseline_scores, np.float64)
  if scores.ndim != 1 or scores.shape != baseline_scores.shape:
    raise ValueError(f"scores must pair up: got shapes {scores.shape}, {baseline_scores.shape}")
  if np.isnan(scores).any() or np.isnan(baseline_scores).any():
    raise ValueError("a score is NaN; a comparison with it has no winner")
  return interval.share((scores > baseline_scores) + 0.5 * (scores == baseline_scores), clusters)
