"""Both orders as one label: exact under an additive preference for a place, and null where there is no verdict."""

import math

import numpy as np
import pytest

from alignjax.data.source import Source
from alignjax.environments.testbed.judge import SimulatedJudge
from alignjax.errors import InputError
from alignjax.feedback.judge import pairwise, rubric
from alignjax.feedback.judge.pairwise import Item, judge_items, pair_record, read_items
from alignjax.feedback.judge.rule import NAMES, RuleJudge, find
from alignjax.feedback.judge.verdict import Answer
from tests.feedback.world import RUBRIC, items


class Said:
  """A judge that answers with what a function returns."""

  def __init__(self, answer, name="said"):
    self.name = name
    self.identity = {}
    self._answer = answer

  def ask(self, questions):
    return [self._answer(question) for question in questions]


def item(first="a", second="b", **more):
  return Item([{"role": "user", "content": "Why?"}], (first, second), **more)


def judged(judges, *items, **settings):
  return [label for label, _ in judge_items(judges, RUBRIC, items, seed=0, **settings)]


def test_delta_is_free_of_an_additive_preference_for_a_place_of_one_nat():
  worth = {f"text {number}": value for number, value in enumerate(np.random.default_rng(0).normal(0, 8, 40))}
  texts = list(worth)
  odds = lambda prompt, shown, sample: 1.0 + worth[shown[0]] - worth[shown[1]]
  pairs = [item(first, second) for first, second in zip(texts[::2], texts[1::2], strict=True)]
  found = judged([RuleJudge("placed", {}, odds, lambda prompt, text: worth[text])], *pairs)
  for pair, label in zip(pairs, found, strict=True):
    true = worth[pair.completions[0]] - worth[pair.completions[1]]
    assert label.delta == pytest.approx(true, abs=1e-6)
    assert label.opinions[0].position_bias == pytest.approx(1.0, abs=1e-6)
    assert label.confidence == pytest.approx(1 / (1 + math.exp(-abs(true))))
    assert label.verdict == ("first" if true > 0 else "second")


def test_votes_count_a_half_more_for_each_side():
  always_longer = Said(lambda question: Answer("AB"[len(question.completions[1]) > len(question.completions[0])]))
  (one,) = judged([always_longer], item("long", "b"))
  assert one.delta == pytest.approx(math.log(3))
  assert one.confidence == pytest.approx(0.75)
  (four,) = judged([always_longer], item("long", "b"), samples=4)
  assert four.confidence == pytest.approx(0.9)


def test_a_judge_that_names_the_place_gives_a_tie():
  (one,) = judged([Said(lambda question: Answer("A"))], item())
  assert one.verdict == "tie"
  assert one.opinions[0].position_bias == pytest.approx(math.log(3))
  assert pair_record(item(), one, RUBRIC) is None


def test_ties_of_both_kinds():
  (one,) = judged([Said(lambda question: Answer("C"))], item())
  assert one.verdict == "tie"
  likely = {"A": math.log(0.3), "B": math.log(0.1), "C": math.log(0.6)}
  (one,) = judged([Said(lambda question: Answer("C", likely))], item())
  assert one.verdict == "tie"
  (one,) = judged([find("longer")], item("a b", "c"), tie_margin=2.0)
  assert one.verdict == "tie"


def test_an_order_without_a_verdict_is_no_verdict():
  half = Said(lambda question: Answer("A" if question.completions[0] == "a" else "I would say A."))
  ((label, comparisons),) = judge_items([half], RUBRIC, [item()], seed=0)
  assert label.verdict is None
  assert math.isnan(label.delta)
  assert sorted(str(one.verdict) for one in comparisons) == ["None", "first"]
  assert pair_record(item(), label, RUBRIC) is None


def test_a_panel_is_the_mean_of_those_that_have_a_verdict():
  silent = Said(lambda question: Answer(None), "silent")
  three = [find("longer"), find("first"), silent]
  (label,) = judged(three, item("a b c", "d"))
  assert label.delta == pytest.approx(1.0)
  assert [one.judge for one in label.opinions] == ["rule:longer", "rule:first", "silent"]
  (label,) = judged([find("longer"), silent, silent], item("a b c", "d"))
  assert label.verdict is None


def test_a_pair_keeps_what_it_comes_from():
  pair = item("a", "b c d", id="7", gold="second")
  ((label, comparisons),) = judge_items([find("longer")], RUBRIC, [pair], seed=0)
  record = pair_record(pair, label, RUBRIC)
  assert record["chosen"] == "b c d"
  assert record["confidence"] == pytest.approx(1 / (1 + math.exp(-2)))
  assert record["rubric"]["hash"] == RUBRIC.hash
  (vote,) = record["votes"]
  assert vote["judge"] == "rule:longer"
  assert vote["delta"] == pytest.approx(2)
  assert vote["raw"] == {"chosen_first": ["A"], "rejected_first": ["B"]}
  for one in comparisons:
    assert one.completions == tuple(pair.completions[number] for number in one.placement)
    assert one.completions[one.winner] == "b c d"
    assert one.gold == one.verdict
    assert one.strength == 2
    assert (one.annotator, one.id, one.rubric, one.seconds) == ("rule:longer", "7", RUBRIC.named, None)


def test_every_named_rule_answers():
  pair = items(400)[0]
  for name in NAMES:
    (label,) = judged([find(name)], pair)
    assert label.verdict is not None, name
  with pytest.raises(InputError, match="the nearest is longer"):
    find("longr")


def test_a_simulated_judge_is_its_formula():
  judge = SimulatedJudge("one", position=0.5, length=0.25, agreement=2.0, own=1.0, author="ben")
  for pair in items(400)[:20]:
    prompt = pair.prompt[0]["content"]
    of = pair.more
    words = [len(text.split()) for text in pair.completions]
    worth = [
      of["quality"][k] / 0.8 + 0.25 * words[k] + 2 * of["agrees"][k] + (of["authors"][k] == "ben") for k in (0, 1)
    ]
    assert judge.log_odds(prompt, pair.completions) == pytest.approx(0.5 + worth[0] - worth[1])
    noisy = judge._replace(noise=2.0)
    assert noisy.log_odds(prompt, pair.completions) == noisy.log_odds(prompt, pair.completions)
    assert noisy.log_odds(prompt, pair.completions) != noisy.log_odds(prompt, pair.completions, sample=1)


class Lines:
  """Records in memory, in the form of a source's file."""

  def __init__(self, *lines):
    self._lines = lines
    self.blanks = 0
    self.left_out = {}
    self.digest = "0"

  def __len__(self):
    return len(self._lines)

  def read(self, i):
    return self._lines[i]

  def where(self, i):
    return f"lines:{i + 1}"


def test_pairs_come_from_either_kind_of_record():
  source = Source(
    [
      Lines(
        b'{"prompt": "p", "chosen": "a", "rejected": "b", "id": 3}',
        b'{"prompt": "p", "completions": ["c", "d"], "gold": "second"}',
        b'{"prompt": "p", "responses": ["e", "f", "g"], "id": "x"}',
      )
    ]
  )
  found = read_items(source, RUBRIC)
  assert [(one.completions, one.id, one.gold) for one in found] == [
    (("a", "b"), "3", None),
    (("c", "d"), "", "second"),
    (("e", "f"), "x:0-1", None),
    (("e", "g"), "x:0-2", None),
    (("f", "g"), "x:1-2", None),
  ]
  with pytest.raises(InputError, match="lines:1: a pair is of the fields"):
    read_items(Source([Lines(b'{"prompt": "p", "completion": "a"}')]), RUBRIC)


def test_another_form_is_refused():
  with pytest.raises(InputError, match="of the form single"):
    pairwise.check_form(rubric.load("reference-grade"), "pairwise")
