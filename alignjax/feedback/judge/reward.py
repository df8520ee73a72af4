"""A judge as a reward: of the completions of a prompt, which are compared or graded together.

Made by `alignjax.rewards.asked`, which names its settings. A judge is an endpoint or a rule: rewards run on the first
host, beside a training that has the devices. A run judges behind `alignjax serve`, or another server.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy import special

from alignjax.data.field import Dialogue
from alignjax.errors import InputError
from alignjax.feedback.judge import named, pairwise, score
from alignjax.feedback.judge import rubric as rubric_lib
from alignjax.feedback.judge.judge import Judge, Settings
from alignjax.feedback.judge.pairwise import Item
from alignjax.feedback.judge.rubric import Criterion, Rubric
from alignjax.feedback.judge.score import Graded
from alignjax.rewards.protocol import Columns, Entry, Prompt, Reward, column, declaring


def make(judge: str, rubric: str, samples: int, temperature: float) -> Reward:
  """Makes a reward of a judge and a rubric.

  Pairwise: the mean, over the other completions of the prompt, of the probability to be better, from both orders; equal
  texts are equally good. single and checks: the grade. A completion without a verdict fails: it gets no number.

  Args:
    judge: openai:URL#MODEL or rule:NAME.
    rubric: a file or a shipped name.
    samples: answers to each question.
    temperature: of an endpoint's sampler.

  Raises:
    InputError: there is no such judge or rubric.
  """
  found = rubric_lib.load(rubric)
  asked = _judge("judge", judge, temperature)
  if samples < 1:
    raise InputError(f"reward judge: judge_samples={samples}; use at least 1")

  def reward(
    prompts: list[Prompt], completions: list[str], token_ids: list[list[int]], columns: Columns
  ) -> Sequence[Entry]:
    references = [""] * len(prompts)
    if found.reference:
      references = [str(one) for one in column(columns, found.reference)]
    dialogues = list(map(_dialogue, prompts))
    if found.form == "pairwise":
      return _compared(asked, found, dialogues, completions, references, samples)
    items = [Graded(*one, {}) for one in zip(dialogues, completions, references, strict=True)]
    return [_number(grade.score) for grade in score.grades(asked, found, items, samples)]

  return declaring(reward, needs=(found.reference,) if found.reference else ())


def make_rubric(judge: str, rubric_column: str, samples: int, temperature: float) -> Reward:
  """Makes a reward of the checks that each record brings: the weighted share of yes.

  A record's checks are a list of texts, or of {"text", "weight"}; None scores None.

  Args:
    judge, samples, temperature: as in `make`.
    rubric_column: the records' field of checks.

  Raises:
    InputError: there is no such judge.
  """
  asked = _judge("rubric", judge, temperature)
  base = rubric_lib.load("checks")

  def reward(
    prompts: list[Prompt], completions: list[str], token_ids: list[list[int]], columns: Columns
  ) -> Sequence[Entry]:
    values: list[Entry] = [None] * len(prompts)
    for checks, places in _places(column(columns, rubric_column)).items():
      if checks == "null":
        continue
      try:
        own = _own_rubric(base, json.loads(checks))
      except ValueError as error:
        for place in places:
          values[place] = error
        continue
      items = [Graded(_dialogue(prompts[place]), completions[place], "", {}) for place in places]
      for place, grade in zip(places, score.grades(asked, own, items, samples), strict=True):
        values[place] = _number(grade.score)
    return values

  return declaring(reward, needs=(rubric_column,))


def _judge(name: str, judge: str, temperature: float) -> Judge:
  """Returns the judge of a reward; `name` is the reward's, for errors."""
  if not judge.startswith(("rule:", "openai:")):
    raise InputError(
      f"reward {name}: judge={judge!r}; give openai:URL#MODEL or rule:NAME in algorithm.reward_settings (a run judges "
      "behind a server)"
    )
  return named.find(judge, Settings(temperature=temperature))


def _dialogue(prompt: Prompt) -> Dialogue:
  if isinstance(prompt, str):
    return [{"role": "user", "content": prompt}]
  return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _number(value: float | None) -> Entry:
  """Returns a reward; an exception, by which the completion counts as failed, if there is no verdict."""
  if value is None:
    return ValueError("the judge gave no verdict")
  return value


def _places(keys: Sequence[Any]) -> dict[str, list[int]]:
  """Returns the places of equal values, by their JSON, in the order in which these come first."""
  found: dict[str, list[int]] = {}
  for place, key in enumerate(keys):
    found.setdefault(json.dumps(key, sort_keys=True), []).append(place)
  return found


def _compared(
  judge: Judge,
  rubric: Rubric,
  prompts: Sequence[Dialogue],
  completions: Sequence[str],
  references: Sequence[str],
  samples: int,
) -> list[Entry]:
  """Compares every two completions of each prompt; all questions of the batch go to the judge in one call."""
  pairs = []
  wins: list[list[float]] = [[] for _ in completions]
  for places in _places(list(zip(prompts, references, strict=True))).values():
    for i, j in combinations(places, 2):
      if completions[i] == completions[j]:
        wins[i].append(0.5)
        wins[j].append(0.5)
      else:
        pairs.append((i, j))
  items = [Item(prompts[i], (completions[i], completions[j]), references[i]) for i, j in pairs]
  for (i, j), (label, _) in zip(
    pairs, pairwise.judge_items([judge], rubric, items, seed=0, samples=samples), strict=True
  ):
    if not math.isnan(label.delta):
      wins[i].append(float(special.expit(label.delta)))
      wins[j].append(float(special.expit(-label.delta)))
  return [_number(float(np.mean(own)) if own else None) for own in wins]


def _own_rubric(base: Rubric, checks: Any) -> Rubric:
  """Returns a rubric with the checks of a record.

  Raises:
    ValueError: these are malformed.
  """
  criteria = []
  for number, one in enumerate(checks if isinstance(checks, list) else [None]):
    entry = {"text": one} if isinstance(one, str) else one
    weight = entry.get("weight", 1.0) if isinstance(entry, Mapping) else None
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("text"), str) or not is_number:
      raise ValueError(f'its checks are {checks!r:.80}; write a list of texts, or of {{"text", "weight"}}')
    criteria.append(Criterion(str(number), entry["text"], float(weight or 0.0)))
  if not criteria:
    raise ValueError("its checks are an empty list; write one, or null")
  return dataclasses.replace(base, criteria=tuple(criteria))
