"""How the answer of a judge is read: strictly, so that no reading is a guess.

An answer is a text, or the log-probabilities of the labels, or both. A text is a verdict if it is one label and nothing
more; with reasons, if its last line is "Verdict: LABEL" and no other line begins so. Everything else is no verdict:
null, which is counted, and never a tie or a win.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from alignjax.feedback.judge.rubric import MARK, Rubric

LEAST_MASS = 0.01  # probability of all labels together below which log-probabilities are no answer to the question


class Answer(NamedTuple):
  """What a judge said to a question.

  Attributes:
    text: word for word; None if there is no answer, as after a time-out.
    logps: nats of each label at the place of the verdict; None if there are none.
  """

  text: str | None
  logps: Mapping[str, float] | None = None


def read(rubric: Rubric, text: str | None) -> str | None:
  """Returns the label that a text gives; None if it gives none, or more than one."""
  if text is None:
    return None
  said = text.strip()
  if rubric.reasoning:
    lines = [line.strip() for line in said.splitlines()]
    marked = [line for line in lines if line.startswith(MARK)]
    if len(marked) != 1 or not lines or lines[-1] != marked[0]:
      return None
    said = marked[0].removeprefix(MARK).strip()
  if said in rubric.labels:
    return said
  return None


def probabilities(rubric: Rubric, answer: Answer, least_mass: float = LEAST_MASS) -> dict[str, float] | None:
  """Returns the probability of each label of the rubric, of an answer; None if it is no verdict.

  From the log-probabilities, if there are some, as shares of their sum; from the text otherwise: 1 for its label.

  Args:
    rubric: has the labels.
    answer: of a judge.
    least_mass: None is returned if all labels together have less.
  """
  if answer.logps is None:
    said = read(rubric, answer.text)
    if said is None:
      return None
    return {label: float(label == said) for label in rubric.labels}
  masses = {label: math.exp(answer.logps.get(label, -math.inf)) for label in rubric.labels}
  total = sum(masses.values())
  if not total >= least_mass:
    return None
  return {label: mass / total for label, mass in masses.items()}
