"""Two completions, shown to a judge in both orders, as one label without the judge's preference for a place.

Let L_AB be the log-odds that the first shown completion wins if A is shown first, and L_BA if B is. Then

  delta = (L_AB - L_BA) / 2           how much A is preferred to B, in nats
  position bias = (L_AB + L_BA) / 2   how much the first place is preferred to the second, in nats

If the place adds to the log-odds, delta is exactly what it would be without; the mean of the two probabilities is not.
The confidence of the label is sigmoid(|delta|).

L is log P(first) - log P(second) where a judge gives log-probabilities, and log((wins + 1/2) / (losses + 1/2)) of its
votes where it gives none, with half of a tie for each side. A single vote in each order is thus worth 1.1 nats, which
is a confidence of 0.75: more certainty takes more samples, or log-probabilities.

Source: both orders: Lee et al. 2023, section 2 (arXiv:2309.00267), who average probabilities; the half: Haldane 1956
(doi:10.1111/j.1469-1809.1955.tb01285.x)
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from alignjax.data.field import Dialogue, as_dialogue, plain, required, text
from alignjax.data.format import parse, placed
from alignjax.data.source import Record, Source
from alignjax.errors import InputError
from alignjax.feedback.comparison import PLACES, TIE, Comparison, shown_order
from alignjax.feedback.judge.judge import Judge
from alignjax.feedback.judge.rubric import Question, Rubric
from alignjax.feedback.judge.verdict import Answer, probabilities

SIDES = PLACES[:2]
# The least log-odds of a strength of 2 and of 3: a probability of 3/4 and of 9/10.
_STRONGER = (math.log(3), math.log(9))


@dataclass(frozen=True)
class Item:
  """Two completions of a prompt that are to be compared.

  Attributes:
    prompt: its messages.
    completions: in the order of their record.
    reference: what the rubric's field of a reference holds; "" without.
    id: of the record.
    gold: the true verdict, in the order of `completions`; None where it is not known.
    more: of the record, what a measure of bias reads, such as "authors".
  """

  prompt: Dialogue
  completions: tuple[str, str]
  reference: str = ""
  id: str = ""
  gold: str | None = None
  more: Mapping[str, Any] = field(default_factory=dict)


class Odds(NamedTuple):
  """What a judge said of a pair in one order.

  Attributes:
    value: log-odds, in nats, that the first shown completion wins; NaN if no sample gave a verdict.
    tie: share of the probability, or of the votes, that is for a tie.
    nulls: samples without a verdict.
  """

  value: float
  tie: float
  nulls: int


class Opinion(NamedTuple):
  """What one judge said of a pair in both orders; delta and position bias are NaN if an order has no verdict."""

  judge: str
  delta: float
  position_bias: float
  tie: float
  nulls: int
  raw: list[list[str | None]]  # of the item's first completion shown first, then second: the text of each sample


class Label(NamedTuple):
  """What a panel of judges said of a pair.

  Attributes:
    verdict: "first" or "second" in the order of the item's completions, TIE, or None.
    delta: nats by which the first completion is preferred, the mean over the judges with a verdict; NaN without any.
    confidence: the probability that the verdict is right, sigmoid(|delta|); NaN without one.
    opinions: of each judge.
  """

  verdict: str | None
  delta: float
  confidence: float
  opinions: list[Opinion]


def read_items(source: Source, rubric: Rubric) -> list[Item]:
  """Reads the pairs of a source: of records with "chosen" and "rejected", or with two or more "completions".

  Of more than two completions every two are a pair, whose id tells which.

  Raises:
    InputError: a record is malformed, or lacks the reference that the rubric reads.
  """
  items: list[Item] = []
  for i in range(len(source)):
    items += placed(source, i, lambda record: _items(record, rubric))
  return items


def _items(record: Record, rubric: Rubric) -> list[Item]:
  name = str(record.get("id") or "")
  reference = rubric.reference_of(record)
  if record.get("chosen") is not None:
    example = parse(record, "preference")
    chosen, rejected = (shown_text(one) for one in example.completions)
    return [Item(example.prompt, (chosen, rejected), reference, name, more=record)]
  texts = next((record[key] for key in ("completions", "responses") if record.get(key) is not None), None)
  if not isinstance(texts, list) or len(texts) < 2:
    raise InputError("a pair is of the fields 'chosen' and 'rejected', or of 'completions', a list of two or more")
  texts = [text(one, f"completions[{i}]") for i, one in enumerate(texts)]
  prompt = as_dialogue(required(record, "prompt"), "prompt", "user")
  if len(texts) == 2:
    return [Item(prompt, (texts[0], texts[1]), reference, name, record.get("gold"), more=record)]
  pairs = combinations(range(len(texts)), 2)
  return [Item(prompt, (texts[i], texts[j]), reference, f"{name}:{i}-{j}") for i, j in pairs]


def shown_text(completion: Dialogue) -> str:
  """Returns a completion as a judge sees it: one message as it is, several with their roles."""
  if len(completion) == 1:
    return completion[0]["content"]
  return "\n\n".join(f"{message['role']}: {message['content']}" for message in completion)


def questions(rubric: Rubric, item: Item, seed: int, samples: int) -> list[tuple[Question, tuple[int, ...]]]:
  """Returns what a judge is asked about a pair: (question, placement) for both orders, the drawn one first.

  Args:
    rubric: of the form pairwise.
    item: the pair.
    seed: draws which order comes first; a record keeps it as its placement.
    samples: answers to each question.
  """
  drawn = shown_order(seed, item.prompt, item.completions)
  asked = []
  for placement in (drawn, drawn[::-1]):
    shown = tuple(item.completions[number] for number in placement)
    for sample in range(samples):
      asked.append((Question(rubric, item.prompt, shown, item.reference, None, sample), placement))
  return asked


def judge_items(
  judges: Sequence[Judge],
  rubric: Rubric,
  items: Sequence[Item],
  *,
  seed: int,
  samples: int = 1,
  tie_margin: float = 0.0,
) -> Iterator[tuple[Label, list[Comparison]]]:
  """Yields the label of each pair, and the comparisons that it comes from.

  Args:
    judges: a panel; each is asked about every pair in both orders.
    rubric: of the form pairwise.
    items: the pairs.
    seed: draws which order comes first.
    samples: answers to each question.
    tie_margin: nats; a pair whose |delta| is not larger is a tie.

  Raises:
    InputError: the rubric is of another form, or a judge cannot answer.
  """
  check_form(rubric, "pairwise")
  asked = [questions(rubric, item, seed, samples) for item in items]
  flat = [question for of_item in asked for question, _ in of_item]
  answers = [judge.ask(flat) for judge in judges]
  size = 2 * samples
  for number, (item, of_item) in enumerate(zip(items, asked, strict=True)):
    opinions = []
    comparisons = []
    for judge, said in zip(judges, answers, strict=True):
      own = said[number * size : (number + 1) * size]
      opinions.append(opinion(judge.name, rubric, of_item, own))
      for (question, placement), answer in zip(of_item, own, strict=True):
        comparisons.append(_comparison(judge.name, rubric, item, question, placement, answer))
    yield label(opinions, tie_margin), comparisons


def check_form(rubric: Rubric, *forms: str) -> None:
  """Raises InputError if a rubric is of none of these forms."""
  if rubric.form not in forms:
    raise InputError(f"--rubric: {rubric.name} is of the form {rubric.form}; use one of the form {' or '.join(forms)}")


def opinion(
  name: str, rubric: Rubric, asked: Sequence[tuple[Question, tuple[int, ...]]], answers: Sequence[Answer]
) -> Opinion:
  """Combines the answers of one judge to the questions about a pair."""
  orders = []
  raw: list[list[str | None]] = []
  for first in (0, 1):
    own = [answer for (_, placement), answer in zip(asked, answers, strict=True) if placement[0] == first]
    orders.append(odds(rubric, own))
    raw.append([answer.text for answer in own])
  ab, ba = orders
  return Opinion(
    name, (ab.value - ba.value) / 2, (ab.value + ba.value) / 2, (ab.tie + ba.tie) / 2, ab.nulls + ba.nulls, raw
  )


def odds(rubric: Rubric, answers: Sequence[Answer]) -> Odds:
  """Computes the log-odds of the first place from the answers to one question; of log-probabilities or of votes."""
  read = [probabilities(rubric, answer) for answer in answers]
  given = [(one, answer) for one, answer in zip(read, answers, strict=True) if one is not None]
  if not given:
    return Odds(math.nan, math.nan, len(answers))
  first, second = rubric.labels[:2]
  tie = 0.0
  if rubric.has_tie:
    tie = float(np.mean([one[rubric.labels[2]] for one, _ in given]))
  logps = [answer.logps for _, answer in given if answer.logps is not None]
  if logps:
    # The mean probability over the samples, in logarithms: exact for one sample, however certain it is.
    masses = [_log_sum(said.get(name, -math.inf) for name in rubric.labels) for said in logps]
    first_mass, second_mass = (
      _log_sum(said.get(name, -math.inf) - mass for said, mass in zip(logps, masses, strict=True))
      for name in (first, second)
    )
    value = first_mass - second_mass
  else:
    wins = sum(one[first] for one, _ in given) + tie * len(given) / 2
    losses = sum(one[second] for one, _ in given) + tie * len(given) / 2
    value = math.log((wins + 0.5) / (losses + 0.5))
  return Odds(float(value), tie, len(answers) - len(given))


def _log_sum(values: Iterable[float]) -> float:
  """Returns log sum exp of some numbers."""
  return float(np.logaddexp.reduce(list(values)))


def label(opinions: Sequence[Opinion], tie_margin: float = 0.0) -> Label:
  """Combines the opinions of a panel: the mean of their deltas. There is no verdict if fewer than half have one."""
  given = [one for one in opinions if not math.isnan(one.delta)]
  if 2 * len(given) < len(opinions) or not given:
    return Label(None, math.nan, math.nan, list(opinions))
  delta = float(np.mean([one.delta for one in given]))
  confidence = float(special.expit(abs(delta)))
  if abs(delta) <= tie_margin or np.mean([one.tie for one in given]) > 0.5:
    return Label(TIE, delta, 0.5, list(opinions))
  return Label(SIDES[int(delta < 0)], delta, confidence, list(opinions))


def strength(log_odds: float) -> int:
  """Returns 1, 2 or 3 for the log-odds of a verdict: from a probability of 3/4 on 2, from 9/10 on 3."""
  return 1 + sum(abs(log_odds) >= least for least in _STRONGER)


def _comparison(
  name: str, rubric: Rubric, item: Item, question: Question, placement: tuple[int, ...], answer: Answer
) -> Comparison:
  """Returns the record of one answer."""
  shares = probabilities(rubric, answer)
  verdict = None
  how_much = None
  if shares is not None:
    said = max(shares, key=shares.__getitem__)
    verdict = TIE
    if said in rubric.labels[:2] and shares[rubric.labels[0]] != shares[rubric.labels[1]]:
      verdict = PLACES[rubric.labels.index(said)]
    if verdict != TIE and answer.logps is not None:
      first, second = (answer.logps.get(one, -math.inf) for one in rubric.labels[:2])
      how_much = strength(first - second)
  gold = item.gold
  if gold in SIDES:
    gold = SIDES[placement.index(SIDES.index(gold))]
  return Comparison(
    prompt=item.prompt,
    completions=question.completions,
    verdict=verdict,
    annotator=name,
    strength=how_much,
    id=item.id,
    placement=placement,
    rubric=rubric.named,
    gold=gold,
    raw=answer.text,
    logps=answer.logps,
    more={"sample": question.sample},
  )


def pair_record(item: Item, found: Label, rubric: Rubric) -> dict[str, Any] | None:
  """Returns a pair to train on, as JSON; None for a tie and for no verdict."""
  if found.verdict not in SIDES:
    return None
  better = SIDES.index(found.verdict)
  record: dict[str, Any] = {"prompt": plain(item.prompt)}
  if item.id:
    record["id"] = item.id
  return record | {
    "chosen": item.completions[better],
    "rejected": item.completions[1 - better],
    "confidence": found.confidence,
    "rubric": rubric.named._asdict(),
    "votes": [_vote(one, better) for one in found.opinions],
  }


def _vote(one: Opinion, better: int) -> dict[str, Any]:
  """Returns an opinion as JSON, in the order chosen, rejected."""
  sign = 1 - 2 * better
  known = not math.isnan(one.delta)
  return {
    "judge": one.judge,
    "delta": sign * one.delta if known else None,
    "position_bias": one.position_bias if known else None,
    "raw": {"chosen_first": one.raw[better], "rejected_first": one.raw[1 - better]},
  }
