"""Rewards that verify the final answer: 1 right, 0 wrong, None if the record has no answer.

The right answer is a column of the prompt's record, "answer" unless `answer_column` names another. It is cut to the
text after its last "####", as in GSM8K, or to its last \\boxed{...}. Two answers are compared exactly as numbers if
both are numbers ("1,250.0" and "$1250"; "3/4" and "0.75"), otherwise as texts without spaces and case.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

from alignjax.errors import InputError
from alignjax.rewards.final_answer import equal, last_boxed, last_number_of, marked_number, reference
from alignjax.rewards.protocol import Columns, Reward, column, declaring
from alignjax.rewards.sandbox.isolation import isolated

Reader = Callable[[str], str | None]


def gsm8k(*, answer_column: str = "answer") -> Reward:
  """Makes a reward: 1 if the first number after the last "####" is the right one, else 0; 0 without "####".

  None if the record has no answer, in `answer_column`.

  Source: Cobbe et al. 2021 (arXiv:2110.14168), the data set's own form.
  """
  return verifier(marked_number, answer_column)


def boxed(*, answer_column: str = "answer") -> Reward:
  """Makes a reward: 1 if the last \\boxed{...} contains the right answer, else 0; 0 without one.

  None if the record has no answer, in `answer_column`.

  Source: Hendrycks et al. 2021 (arXiv:2103.03874), the data set's own form.
  """
  return verifier(last_boxed, answer_column)


def last_number(*, answer_column: str = "answer") -> Reward:
  """Makes a reward: 1 if the last number of the completion is the right one, else 0.

  It is lenient, for models that do not know a form yet. None if the record has no answer, in `answer_column`.
  """
  return verifier(last_number_of, answer_column)


def symbolic(*, answer_column: str = "answer", symbolic_limit_s: float = 10.0) -> Reward:
  """Makes a reward: 1 if the answer, in LaTeX or as an expression, is symbolically equal to the right one, else 0.

  math-verify compares them, in a process of its own, which is killed if an expression takes longer than
  `symbolic_limit_s` seconds: that completion then fails. None if the record has no answer, in `answer_column`.

  Raises:
    InputError: math-verify is not installed.
  """
  if importlib.util.find_spec("math_verify") is None:
    raise InputError("reward symbolic needs the library math-verify: pip install 'alignjax[verify]'")
  from alignjax.rewards.symbolic import equal

  reward = isolated(partial(equal, answer_column=answer_column), symbolic_limit_s)
  reward.needs = (answer_column,)
  return reward


def verifier(read: Reader, answer_column: str) -> Reward:
  """Makes a reward that compares the answer in a completion with a column: 1 if they are `equal`, 0 if not.

  Args:
    read: text of a completion -> its answer; None if there is none, which scores 0.
    answer_column: the right answers, cut as `final_answer.reference` does; None there gives None.
  """

  def reward(prompts, completions, token_ids, columns: Columns):
    answers = column(columns, answer_column)
    return [_verified(read, text, answer) for text, answer in zip(completions, answers, strict=True)]

  return declaring(reward, needs=(answer_column,))


def _verified(read: Reader, completion: str, answer: object) -> float | None:
  """1.0 or 0.0 for the answer in a completion; None if the record has no answer."""
  if answer is None:
    return None
  given = read(completion)
  return float(given is not None and equal(given, reference(str(answer))))
