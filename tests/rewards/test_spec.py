"""Rewards by name."""

import inspect
import sys

import pytest

from alignjax.environments.testbed import gold
from alignjax.errors import InputError
from alignjax.rewards import MONITORS, REWARDS, make, options, score, weights


def test_names_and_weights():
  assert weights("gsm8k:1.0+length:-0.1+testbed_gold:0+os.path:join+my.module:score:2") == {
    "gsm8k": 1.0,
    "length": -0.1,
    "testbed_gold": 0.0,
    "os.path:join": 1.0,
    "my.module:score": 2.0,
  }
  assert weights("") == {}
  assert make("") == {}


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("gsm8", "no reward 'gsm8'; .*; the nearest is gsm8k"),
    ("gsm8:0.5", "no reward 'gsm8'"),
    ("gsm8k+gsm8k:2", "gsm8k comes twice"),
    ("gsm8k:0,5", "'0,5' is no number; write gsm8k:0.5"),
    ("mine:0.5x", "'0.5x' is no number; write mine:0.5"),
    ("gsm8k:nan", "'nan' is no weight"),
    ("a:b:c", "'c' is no number; write a:b:0.5"),
    ("testbed_gold", "testbed_gold is a monitor, not to be trained on; write testbed_gold:0"),
  ],
)
def test_a_spec_that_means_nothing_is_refused(spec, message):
  with pytest.raises(InputError, match=message):
    weights(spec)


def test_what_follows_a_colon_and_is_no_number_is_a_function(tmp_path, monkeypatch):
  (tmp_path / "gsm8k.py").write_text("def paid(prompts, completions, **columns):\n  return [1.0 for _ in prompts]\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  assert weights("gsm8k:paid:0.5+gsm8k:2") == {"gsm8k:paid": 0.5, "gsm8k": 2.0}
  try:
    assert make("gsm8k:paid")["gsm8k:paid"](["a"], ["b"]) == [1.0]
  finally:
    sys.modules.pop("gsm8k", None)
  with pytest.raises(InputError, match=r"reward length:much: .*, or a number as the weight \(length:0\.5\)"):
    make("length:much")


def test_settings_go_to_the_rewards_that_take_them():
  spec = "gsm8k+cosine+length"
  assert options(spec) == {"answer_column": "answer", "max_completion": 0, "cosine_verifier": "last_number"}
  rewards = make(spec, max_completion=10, answer_column="right")
  assert [getattr(reward, "needs", ()) for reward in rewards.values()] == [("right",), ("right",), ()]
  with pytest.raises(
    InputError, match="no setting 'max_len'; they take answer_column, max_completion, cosine_verifier"
  ):
    make(spec, max_len=10)


@pytest.mark.parametrize(
  ("key", "value", "said"),
  [
    ("code_wall_s", "10", "give a finite number, such as 10.0"),
    ("code_wall_s", float("nan"), "give a finite number"),
    ("code_cpu_s", 2.5, "give a whole number, such as 5"),
    ("code_memory_mib", True, "give a whole number"),
    ("code_isolation", 5, "give a text, such as 'all'"),
    ("tests_column", None, "give a text, such as 'tests'"),
  ],
)
def test_a_setting_of_another_kind_is_refused(key, value, said):
  with pytest.raises(InputError, match=f"rewards 'code_tests': {key} is .*; {said}"):
    make("code_tests", **{key: value})


def test_every_reward_has_settings_by_name_with_defaults():
  for name, factory in REWARDS.items():
    for parameter in inspect.signature(factory).parameters.values():
      assert parameter.kind is parameter.KEYWORD_ONLY, name
      assert parameter.default is not parameter.empty, name
  assert set(MONITORS) <= set(REWARDS)


def test_a_function_of_the_user_is_imported(tmp_path, monkeypatch):
  (tmp_path / "my_rewards.py").write_text(
    "def short(prompts, completions, token_ids, columns):\n  return [-len(text) for text in completions]\nN = 3\n"
  )
  (tmp_path / "broken_rewards.py").write_text("missing\n")
  monkeypatch.syspath_prepend(tmp_path)
  scores = score(make("my_rewards:short:0.5"), ["p"], ["abc"], [[]])
  assert scores.total(weights("my_rewards:short:0.5")).tolist() == [-1.5]
  for name, message in (
    ("my_rewards:long", "no attribute 'long'"),
    ("no_such:f", "No module named"),
    (".no_such:f", "relative import"),
    ("broken_rewards:f", "NameError: name 'missing' is not defined"),
    ("my_rewards:N", "is a int"),
  ):
    with pytest.raises(InputError, match=message):
      make(name)


def test_the_testbeds_rewards_follow_its_gold_reward():
  dialogue = [{"role": "user", "content": "What is 47 plus 2?"}]
  prompts = ["What is 47 plus 2?", dialogue, "How do I kill a wasp?"]
  completions = ["The result is 49.", "The result is 48.", "I cannot help."]
  scores = score(make("testbed_answer+testbed_gold:0"), prompts, completions, [[]] * 3)
  assert scores.values[:2, 0].tolist() == [1, 0]
  assert scores.values[2, 0] != scores.values[2, 0]
  expected = [gold.reward(prompts[i if i != 1 else 0], completions[i]).total for i in range(3)]
  assert scores.values[:, 1].tolist() == expected
  assert not scores.failures
