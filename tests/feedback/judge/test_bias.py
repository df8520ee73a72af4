"""The estimators recover what simulated judges are made of; what cannot be measured says why."""

import functools
import json

import pytest
from scipy import stats

from alignjax.environments import testbed
from alignjax.environments.testbed.judge import SimulatedJudge
from alignjax.errors import InputError
from alignjax.feedback.judge import bias
from alignjax.feedback.judge.pairwise import Item, judge_items
from alignjax.feedback.judge.rule import RuleJudge, find, simulated
from tests.feedback.world import RUBRIC, items

BIASED = SimulatedJudge("biased", position=0.6, length=0.12, agreement=2.5, own=1.2, noise=0.8)
TRUTH = {"position": 0.6, "length": 0.12, "agreement": 2.5, "own": 1.2}


@functools.cache
def measured(judge, votes, count, samples):
  asked = bias.probes(items(count))
  rows = judge_items([simulated(judge, votes)], RUBRIC, [one.item for one in asked], seed=0, samples=samples)
  return bias.report(RUBRIC, asked, [comparisons for _, comparisons in rows], judge.author)


def covers(estimate, truth):
  low, high = estimate["interval"]
  return low <= truth <= high


def test_the_five_coefficients_of_a_simulated_judge_are_recovered():
  found = measured(BIASED, False, 400, 2)
  for name, truth in TRUTH.items():
    assert found["coefficients"][name]["value"] == pytest.approx(truth, rel=0.1), name
  assert found["coefficients"]["quality"]["value"] == pytest.approx(1 / BIASED.temperature, rel=0.1)
  assert found["noise"]["value"] == pytest.approx(0.8, rel=0.1)
  assert covers(found["noise"], 0.8)
  assert json.loads(json.dumps(found)) == found


def test_votes_alone_give_coefficients_whose_intervals_hold_the_truth():
  found = measured(BIASED._replace(noise=0.0), True, 400, 2)
  for name, truth in TRUTH.items():
    assert covers(found["coefficients"][name], truth), name
    low, high = found["coefficients"][name]["interval"]
    assert high - low < 2 * truth, name
  assert "missing" in found["noise"]


def test_a_judge_without_a_bias_has_none():
  found = measured(SimulatedJudge("fair", noise=0.5), False, 400, 2)
  for name in TRUTH:
    assert covers(found["coefficients"][name], 0.0), name
  assert covers(found["first_of_decided"], 0.5)
  assert covers(found["self_preference"], 0.0)
  assert found["constant_answer"]["outcome"] == "pass"


def test_each_bias_is_seen_in_what_it_does():
  vain = measured(SimulatedJudge("vain", own=2.0), False, 400, 2)
  assert vain["self_preference"]["interval"][0] > 0.1
  place = measured(SimulatedJudge("positioned", position=3.0), False, 400, 2)
  assert place["first_of_decided"]["interval"][0] > 0.6
  assert place["inconsistent"]["interval"][0] > 0.2
  assert place["stable"]["value"] == 1
  wordy = measured(SimulatedJudge("wordy", length=0.5), False, 400, 2)
  assert wordy["padded_twin"]["wins"]["value"] > 0.9
  noisy = measured(SimulatedJudge("noisy", noise=3.0), False, 400, 2)
  assert noisy["stable"]["value"] < 0.9


def test_a_constant_answer_that_wins_fails():
  asked = bias.probes(items(400)[:100])
  flattered = lambda prompt, text: 5.0 * (text in bias.CONSTANTS)
  odds = lambda prompt, shown, sample: flattered(prompt, shown[0]) - flattered(prompt, shown[1])
  outcomes = {}
  for judge in (RuleJudge("flattered", {}, odds, flattered), find("longer")):
    rows = judge_items([judge], RUBRIC, [one.item for one in asked], seed=0)
    found = bias.report(RUBRIC, asked, [comparisons for _, comparisons in rows])
    outcomes[judge.name] = found["constant_answer"]["outcome"]
  assert outcomes == {"flattered": "fail", "rule:longer": "inconclusive"}
  assert found["padded_twin"]["wins"]["value"] == 1
  assert "missing" in found["coefficients"]["own"]


def test_a_feature_that_is_malformed_names_its_record():
  item = items(400)[0]
  bad = Item(item.prompt, item.completions, id="7", more={"agrees": [1, 0]})
  with pytest.raises(InputError, match="record '7': field 'agrees'"):
    bias.probes([bad])


def test_authorship_says_nothing_of_quality():
  quality = {name: [] for name in testbed.AUTHORS}
  for item in items(400):
    for text, name, worth in zip(item.completions, item.more["authors"], item.more["quality"], strict=True):
      assert testbed.author(text) == name
      quality[name].append(worth)
  assert stats.ttest_ind(*quality.values()).pvalue > 0.01
