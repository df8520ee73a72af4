"""The files: reproducible, disjoint, like anybody's, and with a known best accuracy."""

import json

import numpy as np
import pytest

from alignjax.environments import testbed
from alignjax.environments.testbed import annotator, behaviour, world
from alignjax.errors import InputError

SIZES = {"sft": 300, "preference": 2000, "evaluation": 300, "prompts": 100}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  return testbed.write(tmp_path_factory.mktemp("testbed"), **SIZES)


def records(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_same_arguments_give_the_same_bytes(files, tmp_path):
  again = testbed.write(tmp_path, **SIZES)
  assert {name: path.read_bytes() for name, path in files.items()} == {
    name: path.read_bytes() for name, path in again.items()
  }


def test_another_seed_gives_other_records(files, tmp_path):
  other = testbed.write(tmp_path, seed=1, **SIZES)
  for name, path in files.items():
    assert path.read_bytes() != other[name].read_bytes()


def test_more_of_one_file_leaves_the_others_and_its_beginning(files, tmp_path):
  more = testbed.write(tmp_path, **(SIZES | {"sft": 400}))
  assert records(more["sft"])[: SIZES["sft"]] == records(files["sft"])
  assert more["preference"].read_bytes() == files["preference"].read_bytes()


def test_records_have_the_common_fields_and_no_gold(files):
  pair = {"id", "prompt", "chosen", "rejected", "annotator", "family"}
  fields = {
    "sft": {"id", "messages"},
    "preference": pair,
    "eval_preference": pair,
    "eval_prompts": {"id", "prompt", "family"},
  }
  for name, keys in fields.items():
    rows = records(files[name])
    assert all(set(row) == keys for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


def test_rankings_and_answers_in_steps_come_where_asked_for(files, tmp_path):
  more = testbed.write(tmp_path, **SIZES, ranked=40, stepwise=60)
  assert more.keys() == files.keys() | {"ranked", "stepwise"}
  assert all(path.read_bytes() == more[name].read_bytes() for name, path in files.items() if name != "README")
  assert "| stepwise.jsonl | 60 |" in more["README"].read_text()
  rankings, answers = records(more["ranked"]), records(more["stepwise"])
  assert (len(rankings), len(answers)) == (40, 60)
  for row in rankings:
    worth = [testbed.reward(row["prompt"], response).total for response in row["responses"]]
    assert len(set(row["responses"])) == 4
    assert row["rankings"] == [1 + len({w for w in worth if w > value + 1e-6}) for value in worth]
  assert {label for row in answers for label in row["labels"]} == {True, False, None}
  for row in answers:
    answer = world.parse(row["prompt"]).answer
    for step, label in zip(row["completions"], row["labels"], strict=True):
      assert (label is None) == (step in behaviour.FILLERS)
      assert label is None or step.endswith(f" is {answer}.") == label
  training = {row["prompt"] for row in (*rankings, *answers)}
  assert not any(world.held_out(world.parse(text).family, world.parse(text).slots) for text in training)


def test_counts_are_as_asked(files):
  names = {"sft": "sft", "preference": "preference"}
  names |= {"evaluation": "eval_preference", "prompts": "eval_prompts"}
  for argument, name in names.items():
    assert len(records(files[name])) == SIZES[argument]


def test_sides_of_a_pair_differ(files):
  assert all(row["chosen"] != row["rejected"] for row in records(files["preference"]))


def test_evaluation_prompts_and_facts_are_not_in_training(files):
  training = {row["messages"][0]["content"] for row in records(files["sft"])}
  training |= {row["prompt"] for row in records(files["preference"])}
  evaluation = {row["prompt"] for name in ("eval_preference", "eval_prompts") for row in records(files[name])}
  assert not training & evaluation
  held_out = lambda text: world.held_out(world.parse(text).family, world.parse(text).slots)
  assert not any(map(held_out, training))
  assert all(map(held_out, evaluation))


def test_tokenizer_text_is_training_text_only(files):
  lines = files["text"].read_text(encoding="utf-8").splitlines()
  assert len(lines) == 2 * SIZES["sft"] + 3 * SIZES["preference"]
  assert not {row["prompt"] for row in records(files["eval_prompts"])} & set(lines)


def test_best_accuracy_leaves_room_above_chance_and_below_one(files):
  pairs = records(files["preference"])
  assert 0.72 <= testbed.bayes_accuracy(pairs) <= 0.85


def test_labels_are_right_as_often_as_the_best_predictor_says(files):
  pairs = records(files["preference"])
  p = [annotator.preference_probability("default", r["prompt"], r["chosen"], r["rejected"]) for r in pairs]
  bayes = testbed.bayes_accuracy(pairs)
  spread = np.sqrt(bayes * (1 - bayes) / len(pairs))
  assert np.mean(np.array(p) > 0.5) == pytest.approx(bayes, abs=4 * spread)


@pytest.mark.parametrize("population", ["noisy", "length_biased", testbed.POPULATIONS["careful"]])
def test_other_annotators_label_the_same_responses(files, tmp_path, population):
  other = testbed.write(tmp_path, population=population, **SIZES)
  assert other["sft"].read_bytes() == files["sft"].read_bytes()
  assert "Annotators" in other["README"].read_text(encoding="utf-8")


def test_noise_lowers_the_best_accuracy_as_it_should(files):
  pairs = records(files["preference"])
  clean = testbed.bayes_accuracy(pairs, "default")
  noisy = testbed.bayes_accuracy(pairs, testbed.noisier(testbed.POPULATIONS["default"], 0.2))
  assert noisy - 0.5 == pytest.approx(0.6 * (clean - 0.5))


def test_bad_arguments_are_named(tmp_path):
  with pytest.raises(InputError, match="sft=-1"):
    testbed.write(tmp_path, sft=-1)
  with pytest.raises(InputError, match="default, careful"):
    testbed.write(tmp_path, population="kind")
