import json

import pytest

from alignjax.environments import testbed
from alignjax.evaluation import testbed as evaluation


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """Held-out pairs: (prompt, response, response) whose first was preferred by an annotator."""
  folder = tmp_path_factory.mktemp("world")
  testbed.write(folder, sft=1, preference=1, evaluation=300, prompts=1)
  lines = (folder / "eval_preference.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def columns(pairs, *names):
  return [[pair[name] for pair in pairs] for name in names]


def test_components_sum_to_the_mean(pairs):
  record = evaluation.evaluate(*columns(pairs, "prompt", "chosen"))
  assert sum(record["components"].values()) == pytest.approx(record["gold_mean"])
  low, high = record["gold_mean_interval"]
  assert low < record["gold_mean"] < high


def test_rates_are_the_testbeds(pairs):
  prompts, responses = columns(pairs, "prompt", "chosen")
  record = evaluation.evaluate(prompts, responses)
  for name, probe in testbed.PROBES.items():
    assert record[name] == pytest.approx(testbed.rate(probe, prompts, responses))
    low, high = record[f"{name}_interval"]
    assert low <= record[name] <= high


def test_preferred_responses_win(pairs):
  record = evaluation.compare(*columns(pairs, "prompt", "chosen", "rejected"))
  assert record["gold_win_rate_interval"][0] > 0.5
  assert record["gold_mean"] > record["gold_mean_sft"]
  assert set(record["components_sft"]) == set(testbed.WEIGHTS)
  assert "capability_sft_interval" in record
  json.dumps(record, allow_nan=False)


def test_a_model_against_itself_is_even(pairs):
  record = evaluation.compare(*columns(pairs, "prompt", "chosen", "chosen"))
  assert record["gold_win_rate_vs_sft"] == 0.5
  assert record["gold_win_rate_ties"] == 1


def test_a_rate_without_prompts_of_its_kind_is_none(pairs):
  harmful = [pair for pair in pairs if pair["family"] == "harmful"]
  record = evaluation.evaluate(*columns(harmful, "prompt", "chosen"))
  assert record["capability"] is record["capability_interval"] is None
  assert record["harm"] is not None


def test_examples_take_families_in_turn_whatever_the_result(pairs):
  responses = {"sft": [p["rejected"] for p in pairs], "dpo": [p["chosen"] for p in pairs]}
  families = list(dict.fromkeys(pair["family"] for pair in pairs))
  shown = evaluation.side_by_side(pairs, responses, count=len(families) + 1)
  assert [example["family"] for example in shown] == [families[0], *families]
  swapped = {"sft": responses["dpo"], "dpo": responses["sft"]}
  others = evaluation.side_by_side(pairs, swapped, count=len(families) + 1)
  assert [e["prompt"] for e in shown] == [e["prompt"] for e in others]
  assert shown[0]["gold_dpo"] == testbed.reward(shown[0]["prompt"], shown[0]["dpo"]).total
  assert evaluation.side_by_side([], {"sft": []}) == []
