"""Repeated n-grams of tokens, as a penalty and as a monitor."""

from collections.abc import Sequence

from alignjax.errors import InputError
from alignjax.rewards.protocol import Reward


def repetition(*, ngram: int = 3, max_penalty: float = -1.0) -> Reward:
  """Makes a reward: `max_penalty` times the share of a completion's n-grams that repeat an earlier one.

  It is 0 for fewer than n tokens.

  Args:
    ngram: n, in tokens.
    max_penalty: 0 or less.

  Raises:
    InputError: ngram is below 1, or max_penalty above 0.

  Source: Yeo et al. 2025, appendix C.2 (arXiv:2502.03373), for a whole completion.
  """
  _check("repetition", ngram)
  if max_penalty > 0:
    raise InputError(f"reward repetition: max_penalty is {max_penalty}; it must be 0 or less")

  def penalty(ids):
    share = distinct_share(ids, ngram)
    if share in (None, 1.0):
      return 0.0
    return max_penalty * (1 - share)

  return lambda prompts, completions, token_ids, columns: [penalty(ids) for ids in token_ids]


def distinct(*, ngram: int = 3) -> Reward:
  """Makes a monitor: the share of different n-grams among those of a completion; None for fewer than n tokens.

  A monitor has weight 0. `ngram` is n, in tokens.

  Raises:
    InputError: ngram is below 1.

  Source: Li et al. 2016 (arXiv:1510.03055), which takes it over all completions.
  """
  _check("distinct", ngram)
  return lambda prompts, completions, token_ids, columns: [distinct_share(ids, ngram) for ids in token_ids]


def distinct_share(ids: Sequence[int], n: int) -> float | None:
  """Returns the share of different n-grams among all n-grams of token ids; None if there are none."""
  count = len(ids) - n + 1
  if count <= 0:
    return None
  return len({tuple(ids[i : i + n]) for i in range(count)}) / count


def _check(name: str, ngram: int) -> None:
  if ngram < 1:
    raise InputError(f"reward {name}: ngram is {ngram}; it must be 1 or more")
