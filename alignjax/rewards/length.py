"""Rewards that shape the length of completions, counted in tokens."""

import math

from alignjax.errors import InputError
from alignjax.rewards.answer import verifier
from alignjax.rewards.final_answer import last_boxed, last_number_of, marked_number
from alignjax.rewards.protocol import Reward, declaring

READERS = {"gsm8k": marked_number, "boxed": last_boxed, "last_number": last_number_of}


def length(*, max_completion: int = 0) -> Reward:
  """Makes a reward: minus the completion's length as a share of `max_completion`, at least -1.

  Its weight should be small.

  Args:
    max_completion: tokens; must be given, as the default of 0 is refused.

  Raises:
    InputError: max_completion is not positive.
  """
  _positive("length", "max_completion", max_completion)

  def reward(prompts, completions, token_ids, columns):
    return [-min(1.0, len(ids) / max_completion) for ids in token_ids]

  return reward


def soft_overlong(*, max_completion: int = 0, overlong_cache: int = 0) -> Reward:
  """Makes a reward: 0 up to `max_completion - overlong_cache` tokens, then linearly down to -1 at `max_completion`.

  It is -1 beyond.

  Args:
    max_completion: tokens; must be given, as the default of 0 is refused.
    overlong_cache: tokens over which it falls; 0 is a step.

  Raises:
    InputError: max_completion is not positive, or overlong_cache not within 0 and max_completion.

  Source: Yu et al. 2025, eq. 13 (arXiv:2503.14476).
  """
  _positive("soft_overlong", "max_completion", max_completion)
  if not 0 <= overlong_cache <= max_completion:
    raise InputError(
      f"reward soft_overlong: overlong_cache is {overlong_cache}; use 0 to max_completion={max_completion}"
    )

  def penalty(length):
    excess = length - (max_completion - overlong_cache)
    if excess <= 0:
      return 0.0
    if excess >= overlong_cache:
      return -1.0
    return -excess / overlong_cache

  return lambda prompts, completions, token_ids, columns: [penalty(len(ids)) for ids in token_ids]


def cosine(*, max_completion: int = 0, cosine_verifier: str = "last_number", answer_column: str = "answer") -> Reward:
  """Makes a reward of a verified answer by its length: 1 to 0.5 for right ones, the shorter the better.

  Wrong ones get -1 to -0.5. Past `max_completion` it is -1. None if the record has no answer.

  Args:
    max_completion: tokens; must be given, as the default of 0 is refused.
    cosine_verifier: how the answer is read, one of `READERS`.
    answer_column: the right answers.

  Raises:
    InputError: max_completion is not positive, or the verifier is unknown.

  Source: Yeo et al. 2025, appendix C.1 (arXiv:2502.03373), its cosine with other end points.
  """
  _positive("cosine", "max_completion", max_completion)
  if cosine_verifier not in READERS:
    raise InputError(f"reward cosine: cosine_verifier is {cosine_verifier!r}; use one of {', '.join(READERS)}")
  right = verifier(READERS[cosine_verifier], answer_column)

  def reward(prompts, completions, token_ids, columns):
    verdicts = right(prompts, completions, token_ids, columns)
    shares = [len(ids) / max_completion for ids in token_ids]
    return [_cosine(verdict, share) for verdict, share in zip(verdicts, shares, strict=True)]

  return declaring(reward, needs=(answer_column,))


def _cosine(verdict: float | None, share: float) -> float | None:
  """From 1 (or -1 if the verdict is 0) for a share of 0 to a half of that for a share of 1; None without a verdict."""
  if verdict is None:
    return None
  if share > 1:
    return -1.0
  size = 0.75 + 0.25 * math.cos(math.pi * share)
  return size if verdict else -size


def _positive(name: str, key: str, value: int) -> None:
  """Raises InputError unless a number of tokens is positive."""
  if value <= 0:
    raise InputError(f"reward {name} needs {key}: tokens, such as the run's limit of new ones")
