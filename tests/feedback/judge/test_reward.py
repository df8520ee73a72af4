"""A judge as a reward: the whole group of a prompt in one call, null as a failure."""

from unittest import mock

import numpy as np
import pytest

from alignjax import rewards
from alignjax.errors import InputError
from alignjax.feedback.judge.rule import RuleJudge
from alignjax.feedback.judge.verdict import Answer

PROMPTS = ["p", "p", "q", "p", "q"]
TEXTS = ["a", "a b c", "x", "a", "x y"]


def scored(functions, columns=None):
  return rewards.score(functions, PROMPTS, TEXTS, [[1]] * 5, columns or {})


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_a_completion_is_worth_its_mean_probability_to_be_better_than_the_others_of_its_prompt():
  functions = rewards.make("judge:1", judge="rule:longer")
  with mock.patch.object(RuleJudge, "ask", autospec=True, side_effect=RuleJudge.ask) as ask:
    found = scored(functions)
  assert ask.call_count == 1
  expected = [(sigmoid(-2) + 0.5) / 2, sigmoid(2), sigmoid(-1), (sigmoid(-2) + 0.5) / 2, sigmoid(1)]
  assert found.values[:, 0] == pytest.approx(expected)
  assert not found.failures


def test_no_verdict_is_a_failure_and_no_number():
  functions = rewards.make("judge", judge="rule:longer")
  with mock.patch.object(RuleJudge, "ask", lambda self, asked: [Answer("?") for _ in asked]):
    found = scored(functions)
  # Equal texts need no judge.
  assert [failure.index for failure in found.failures] == [1, 2, 4]
  assert found.failures[0].cause == "ValueError: the judge gave no verdict"


def test_grades():
  functions = rewards.make("judge", judge="rule:longer", judge_rubric="checks")
  assert scored(functions).values[:, 0] == pytest.approx([sigmoid(len(text.split())) for text in TEXTS])


def test_a_records_own_checks():
  functions = rewards.make("rubric", judge="rule:longer")
  checks = [["Is it short?"], [{"text": "a", "weight": 3}, {"text": "b", "weight": -1}], None, "no list", []]
  found = scored(functions, {"rubric": checks})
  assert found.values[:2, 0] == pytest.approx([sigmoid(1), sigmoid(3) / 2])
  assert np.isnan(found.values[2:, 0]).all()
  assert [failure.index for failure in found.failures] == [3, 4]
  with pytest.raises(InputError, match="reward rubric needs the field 'rubric'"):
    rewards.require(functions, ["answer"])


def test_a_run_is_no_judge_of_a_reward():
  with pytest.raises(InputError, match="reward judge: judge='runs/a'; give openai:URL#MODEL or rule:NAME"):
    rewards.make("judge", judge="runs/a")
