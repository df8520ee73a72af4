"""Several rewards of completions as one score, the same wherever it is asked for.

The functions take arrays of NumPy and of JAX alike, traced ones too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from alignjax.rewards.protocol import LARGEST


class Combined(NamedTuple):
  """The scores of n completions.

  Attributes:
    scores: [n], the weighted sum of the rewards that apply; 0 where none does.
    counts: bool [n], whether any reward applies and none that has a weight failed.
    failed: bool [n], where a reward that has a weight gave no number, or the sum is not finite or beyond `LARGEST`.
  """

  scores: Any
  counts: Any
  failed: Any


def checked(values: Any) -> tuple[Any, Any]:
  """Returns a model's rewards [n], NaN where they are no finite number up to `LARGEST`, and where that is, bool [n]."""
  xp = values.__array_namespace__()
  unusable = ~(xp.abs(values) <= LARGEST)
  return xp.where(unusable, xp.nan, values), unusable


def worth(values: Mapping[str, Any], weights: Mapping[str, float], failed: Any) -> Combined:
  """Combines rewards to one score of each completion, as a Combined of scores, counts and failed, all [n].

  Args:
    values: [n] by reward, NaN where it does not apply.
    weights: by reward; a reward of weight 0 is not part of the score. At least one has a weight.
    failed: bool [n], where a reward that has a weight gave no number.
  """
  weighted = {name: weight for name, weight in weights.items() if weight}
  first = values[next(iter(weighted))]
  xp = first.__array_namespace__()
  each = xp.stack([values[name] for name in weighted], axis=-1)
  applies = ~xp.isnan(each)
  scores = xp.sum(xp.where(applies, each, 0.0) * xp.asarray(list(weighted.values()), dtype=each.dtype), axis=-1)
  failed = failed | ~(xp.abs(scores) <= LARGEST)
  return Combined(scores, xp.any(applies, axis=-1) & ~failed, failed)
