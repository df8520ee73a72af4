"""Judges that are rules: of the length, of the place, or the testbed's simulated judges. Fast, exact, and no model.

A rule gives nats. Comparing two completions it answers with the log-probabilities of the labels; grading one, with the
label at that place of the scale; a check is yes if it gives more than 0.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from alignjax.environments.testbed.judge import JUDGES, SimulatedJudge
from alignjax.errors import InputError
from alignjax.feedback.judge.rubric import MARK, Question, shown_prompt
from alignjax.feedback.judge.verdict import Answer

Worth = Callable[[str, str], float]  # prompt, completion -> nats


class RuleJudge(NamedTuple):
  """A rule as a judge.

  Attributes:
    name: in records.
    identity: JSON.
    log_odds: (prompt, the two completions shown, number of the sample) -> nats that the first wins.
    worth: of a completion alone.
    votes: True answers with a label alone, drawn with its probability, as a judge without log-probabilities does.
  """

  name: str
  identity: dict[str, Any]
  log_odds: Callable[[str, Sequence[str], int], float]
  worth: Worth
  votes: bool = False

  def ask(self, questions: Sequence[Question]) -> list[Answer]:
    """Answers each question."""
    return [self._answer(question) for question in questions]

  def _answer(self, question: Question) -> Answer:
    prompt = shown_prompt(question.prompt)
    labels = question.rubric.labels
    if question.rubric.form == "pairwise":
      odds = self.log_odds(prompt, question.completions, question.sample)
    else:
      odds = self.worth(prompt, question.completions[0])
    if question.rubric.form == "single":
      return Answer(labels[round(float(special.expit(odds)) * (len(labels) - 1))])
    least = 0.5
    if self.votes:
      least = _uniform(self.name, prompt, *question.completions, question.sample)
    said = labels[int(special.expit(odds) < least)]
    if question.rubric.reasoning:
      said = f"{MARK} {said}"
    if self.votes:
      return Answer(said)
    yes, no = -np.logaddexp(0, -odds), -np.logaddexp(0, odds)
    return Answer(said, {labels[0]: float(yes), labels[1]: float(no)})


def _uniform(*of: str | int) -> float:
  """Draws a number within 0 and 1 for what is judged."""
  return int.from_bytes(hashlib.sha256(json.dumps(of).encode()).digest()[:6], "big") / 2**48


def _longer(prompt: str, completion: str) -> float:
  return float(len(completion.split()))


def _shorter(prompt: str, completion: str) -> float:
  return -_longer(prompt, completion)


def _nothing(prompt: str, completion: str) -> float:
  return 0.0


_RULES: Mapping[str, tuple[float, Worth]] = {  # nats for the first place, and the worth of a completion
  "longer": (0.0, _longer),
  "shorter": (0.0, _shorter),
  "first": (1.0, _nothing),
}
NAMES = (*_RULES, *JUDGES)


def find(name: str) -> RuleJudge:
  """Returns the rule of a name: "longer", "shorter", "first", or a simulated judge of the testbed.

  Raises:
    InputError: there is none.
  """
  if name in JUDGES:
    return simulated(JUDGES[name])
  if name not in _RULES:
    near = difflib.get_close_matches(name, NAMES, n=1)
    nearest = f"; the nearest is {near[0]}" if near else ""
    raise InputError(f"--judge=rule:{name}: no such rule; use {', '.join(NAMES)}{nearest}")
  place, worth = _RULES[name]

  def log_odds(prompt: str, shown: Sequence[str], sample: int) -> float:
    return place + worth(prompt, shown[0]) - worth(prompt, shown[1])

  return RuleJudge(f"rule:{name}", {"rule": name}, log_odds, worth)


def simulated(judge: SimulatedJudge, votes: bool = False) -> RuleJudge:
  """Returns a simulated judge of the testbed as a judge; with `votes`, without log-probabilities."""
  identity = {"rule": judge._asdict(), "votes": votes}
  return RuleJudge(f"rule:{judge.name}", identity, judge.log_odds, judge.utility, votes)
