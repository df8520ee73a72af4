"""Rewards that shape the length of completions, counted in tokens."""

import math

from alignjax.errors import InputError
from alignjax.rewards.answer import verifier
from alignjax.rewards.final_answer import last_boxed, last_number_of, marked_number
from alignjax.rewards.protocol import Reward

READERS = {"gsm8k": marked_number, "boxed": last_boxed, "last_number": last_number_of}


def length(*, max_completion: int = 0) -> Reward:
  """Minus the completion's length as a share of `max_completion`, at least -1: give it a small weight."""
  _positive("length", "max_completion", max_completion)

  def reward(prompts, completions, token_ids, columns):
    return [-min(1.0, len(ids) / max_completion) for ids in token_ids]

  return reward


def soft_overlong(*, max_completion: int = 0, overlong_cache: int = 0) -> Reward:
  """0 up to `max_completion - overlong_cache` tokens, then linearly down to -1 at `max_completion`, and -1 beyond.

  Source: Yu et al. 2025, eq. 13 (arXiv:2503.14476).
  """
  _positive("soft_overlong", "max_completion", max_completion)
  if not 0 <= overlong_cache <= max_completion:
    raise InputError(
      f"reward soft_overlong: overlong_cache is {overlong_cache}; use 0 to max_completion={max_completion}"
    )

  def reward(prompts, completions, token_ids, columns):
    over = [len(ids) - (max_completion - overlong_cache) for ids in token_ids]
    return [0.0 if n <= 0 else -1.0 if n >= overlong_cache else -n / overlong_cache for n in over]

  return reward


def cosine(*, max_completion: int = 0, cosine_verifier: str = "last_number", answer_column: str = "answer") -> Reward:
  """A verified answer's reward by length: 1 to 0.5 for right ones, the shorter the better; -1 to -0.5 for wrong ones.

  Past `max_completion` it is -1.

  Source: Yeo et al. 2025, appendix C.1 (arXiv:2502.03373), its cosine with other end points.
  """
  _positive("cosine", "max_completion", max_completion)
  if cosine_verifier not in READERS:
    raise InputError(f"reward cosine: cosine_verifier is {cosine_verifier!r}; use one of {', '.join(READERS)}")
  right = verifier(READERS[cosine_verifier], answer_column)

  def reward(prompts, completions, token_ids, columns):
    verdicts = right(prompts, completions, token_ids, columns)
    lengths = [len(ids) / max_completion for ids in token_ids]
    return [None if verdict is None else _cosine(verdict, t) for verdict, t in zip(verdicts, lengths, strict=True)]

  reward.needs = right.needs
  return reward


def _cosine(verdict: float, t: float) -> float:
  """From 1 (or -1, where wrong) at t = 0 to a half of it at t = 1."""
  if t > 1:
    return -1.0
  return (1.0 if verdict else -1.0) * (0.75 + 0.25 * math.cos(math.pi * t))


def _positive(name: str, key: str, value: int) -> None:
  if value <= 0:
    raise InputError(f"reward {name} needs {key}: tokens, such as the run's limit of new ones")
