"""Symbolic equality of final answers; needs math-verify, and must run in a process that can be killed."""

import logging

from math_verify import parse, verify

from alignjax.rewards.final_answer import reference
from alignjax.rewards.protocol import Columns, column

logging.getLogger("math_verify").setLevel(logging.ERROR)  # its warning that it has no time limit is hidden


def equal(prompts, completions: list[str], token_ids, columns: Columns, *, answer_column: str) -> list[float | None]:
  """Scores completions, as a reward does: 1 if symbolically equal to the answer, else 0; None if the record has none.

  Args:
    columns: the other arguments of a reward, prompts and token_ids, are unused.
    answer_column: the right answers.

  Raises:
    LookupError: there is no such column.
    ValueError: the right answer cannot be read as an expression.
  """
  rewards: list[float | None] = []
  for completion, answer in zip(completions, column(columns, answer_column), strict=True):
    if answer is None:
      rewards.append(None)
      continue
    right = _parse(f"\\boxed{{{reference(str(answer))}}}")
    if not right:
      raise ValueError(f"the answer {str(answer)[:80]!r} of the record is no expression")
    rewards.append(float(verify(right, _parse(completion), timeout_seconds=None, raise_on_error=True)))
  return rewards


def _parse(text: str) -> list:
  return parse(text, parsing_timeout=None, raise_on_error=True)
