"""How often one model's answers beat another's, prompt by prompt."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from alignjax.evaluation import interval


def win_rate(
  scores: ArrayLike, baseline_scores: ArrayLike, clusters: Sequence[Hashable] | None = None
) -> interval.Estimate:
  """The share of prompts on which `scores` [n] beats `baseline_scores` [n]; a tie is half a win.

  The comparison is paired: entry i of both scores the same prompt, so what makes a prompt easy or hard for both
  cancels. The outcomes (0, 1/2 or 1) have Wilson's interval, conservative with ties, over `clusters`: the prompts,
  where some come more than once; None: all are different.

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
