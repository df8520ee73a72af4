"""Rewards that a judge gives: which completions of a prompt are better, a grade, or a record's own checks.

Judges stand in a room above, which is looked up by name when such a reward is made, as a user's module is.
"""

import importlib
from typing import Any

from alignjax.rewards.protocol import Reward

_MAKERS = "alignjax.feedback.judge.reward"


def judge(
  *,
  judge: str = "",
  judge_rubric: str = "helpful-harmless-honest",
  judge_samples: int = 1,
  judge_temperature: float = 0.0,
) -> Reward:
  """Makes a reward: how a judge compares a prompt's completions with one another, from 0 to 1, or its grade.

  A completion without a verdict fails.

  Args:
    judge: openai:URL#MODEL or rule:NAME; must be given.
    judge_rubric: a file or a shipped name.
    judge_samples: answers to each question.
    judge_temperature: of an endpoint's sampler.

  Raises:
    InputError: there is no such judge or rubric, or a library is missing.
  """
  return _maker("make")(judge, judge_rubric, judge_samples, judge_temperature)


def rubric(
  *, judge: str = "", rubric_column: str = "rubric", judge_samples: int = 1, judge_temperature: float = 0.0
) -> Reward:
  """Makes a reward: the weighted share of the record's own checks that a judge answers with yes; None without checks.

  Args:
    judge, judge_samples, judge_temperature: as in `judge`.
    rubric_column: the checks: a list of texts, or of {"text", "weight"}.

  Raises:
    InputError: as `judge`.
  """
  return _maker("make_rubric")(judge, rubric_column, judge_samples, judge_temperature)


def _maker(name: str) -> Any:
  return getattr(importlib.import_module(_MAKERS), name)
