"""Grades of completions one by one: a number of a scale, or the share of checks that are answered with yes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.data.field import Dialogue, as_dialogue, plain, required, text
from alignjax.data.format import parse, placed
from alignjax.data.source import Record, Source
from alignjax.feedback.judge.judge import Judge
from alignjax.feedback.judge.pairwise import check_form, shown_text
from alignjax.feedback.judge.rubric import YES, Question, Rubric
from alignjax.feedback.judge.verdict import Answer, probabilities

_OF_A_GRADE = ("score", "checks", "judge", "rubric", "raw")


class Graded(NamedTuple):
  """A completion that is to be graded; `record` is the one it is of."""

  prompt: Dialogue
  completion: str
  reference: str
  record: Mapping[str, Any]


class Grade(NamedTuple):
  """What a judge said of a completion.

  Attributes:
    score: the expected number of the scale; or the weighted share of yes among the checks, from 0 to 1 unless a weight
      is negative. None if a check, or the number, has no verdict.
    checks: the probability of yes by check, None without a verdict; {} in the form single.
    nulls: answers without a verdict.
    answers: their number.
    raw: the text of each answer.
  """

  score: float | None
  checks: dict[str, float | None]
  nulls: int
  answers: int
  raw: list[str | None]


def read_graded(source: Source, rubric: Rubric) -> list[Graded]:
  """Reads the completions of a source: of the field "completion", or each of "completions".

  Raises:
    InputError: a record is malformed, or lacks the reference that the rubric reads.
  """
  found: list[Graded] = []
  for i in range(len(source)):
    found += placed(source, i, lambda record: _graded(record, rubric))
  return found


def _graded(record: Record, rubric: Rubric) -> list[Graded]:
  reference = rubric.reference_of(record)
  if isinstance(record.get("completions"), list):
    prompt = as_dialogue(required(record, "prompt"), "prompt", "user")
    texts = [text(one, f"completions[{i}]") for i, one in enumerate(record["completions"])]
    return [Graded(prompt, one, reference, record) for one in texts]
  example = parse({name: record.get(name) for name in ("prompt", "completion")}, "sft")
  return [Graded(example.prompt, shown_text(example.completions[0]), reference, record)]


def questions(rubric: Rubric, one: Graded, samples: int) -> list[Question]:
  """Returns what a judge is asked about a completion: each check, `samples` times."""
  checks = rubric.criteria if rubric.form == "checks" else (None,)
  return [
    Question(rubric, one.prompt, (one.completion,), one.reference, check, sample)
    for check in checks
    for sample in range(samples)
  ]


def grades(judge: Judge, rubric: Rubric, items: Sequence[Graded], samples: int = 1) -> Iterator[Grade]:
  """Yields the grade of each completion; all are asked in one call of the judge.

  Raises:
    InputError: the rubric compares pairs, or the judge cannot answer.
  """
  check_form(rubric, "single", "checks")
  asked = [questions(rubric, item, samples) for item in items]
  answers = iter(judge.ask([question for of_item in asked for question in of_item]))
  for of_item in asked:
    yield _grade(rubric, of_item, [next(answers) for _ in of_item])


def _grade(rubric: Rubric, asked: Sequence[Question], answers: Sequence[Answer]) -> Grade:
  """Combines the answers about one completion."""
  values: dict[str, list[float]] = {}
  nulls = 0
  for question, answer in zip(asked, answers, strict=True):
    found = values.setdefault(question.check.id if question.check else "", [])
    shares = probabilities(rubric, answer)
    if shares is None:
      nulls += 1
    elif rubric.form == "single":
      found.append(sum(float(label) * share for label, share in shares.items()))
    else:
      found.append(shares[YES])
  means = {name: float(np.mean(found)) if found else None for name, found in values.items()}
  raw = [answer.text for answer in answers]
  if rubric.form == "single":
    return Grade(means[""], {}, nulls, len(answers), raw)
  known = [(means[one.id], one.weight) for one in rubric.criteria]
  if any(value is None for value, _ in known):
    return Grade(None, means, nulls, len(answers), raw)
  total = sum(abs(one.weight) for one in rubric.criteria)
  score = sum((value or 0.0) * weight for value, weight in known) / (total or 1.0)
  return Grade(score, means, nulls, len(answers), raw)


def grade_record(item: Graded, grade: Grade, judge: Judge, rubric: Rubric) -> dict[str, Any]:
  """Returns a grade as JSON, with the other fields of its record, renamed to "given_NAME" if a grade has the name."""
  rest = {name: value for name, value in item.record.items() if name not in ("prompt", "completion", "completions")}
  return {
    "prompt": plain(item.prompt),
    "completion": item.completion,
    **{f"given_{name}" if name in _OF_A_GRADE else name: value for name, value in rest.items()},
    "score": grade.score,
    "checks": grade.checks,
    "judge": judge.name,
    "rubric": rubric.named._asdict(),
    "raw": grade.raw,
  }
