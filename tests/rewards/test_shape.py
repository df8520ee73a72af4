"""Length, repetition and ensembles."""

import numpy as np
import pytest

from alignjax.errors import InputError
from alignjax.rewards import make
from alignjax.rewards.repetition import distinct_share
from tests import golden

KNOWN = ({"max_completion_len", "soft_punish_cache"}, {"ngram_size", "max_penalty"}, {"in", "out"})


def ask(spec, lengths=None, ids=None, completions=None, answers=None, **settings):
  ids = ids or [[1] * n for n in lengths]
  ((reward),) = make(spec, **settings).values()
  count = len(ids)
  return reward(["p"] * count, completions or [""] * count, ids, {"answer": answers})


@pytest.mark.parametrize("name", golden.entries("rewards", KNOWN[0]))
def test_golden_soft_overlong(name):
  case = golden.section("rewards")[name]
  settings = {"max_completion": case["max_completion_len"], "overlong_cache": case["soft_punish_cache"]}
  assert ask("soft_overlong", case["lengths"], **settings) == pytest.approx(case["out"], abs=1e-12)


@pytest.mark.parametrize("name", golden.entries("rewards", KNOWN[1]))
def test_golden_repetition(name):
  case = golden.section("rewards")[name]
  returned = ask("repetition", ids=case["ids"], ngram=case["ngram_size"], max_penalty=case["max_penalty"])
  assert returned == pytest.approx(case["out"], abs=1e-12)


def test_golden_rewards_are_all_walked():
  for name, case in golden.section("rewards").items():
    assert not isinstance(case, dict) or any(fields <= set(case) for fields in KNOWN), f"nothing compares with {name}"


def test_soft_overlong_is_continuous_and_needs_no_cache():
  assert ask("soft_overlong", [9, 10, 11], max_completion=10, overlong_cache=0) == [0, 0, -1]
  values = ask("soft_overlong", range(12), max_completion=10, overlong_cache=4)
  assert np.abs(np.diff(values)).max() == 0.25
  assert values[6] == 0
  assert values[10:] == [-1, -1]


def test_length_falls_to_minus_one():
  assert ask("length", [0, 5, 10, 20], max_completion=10) == [0, -0.5, -1, -1]


def test_cosine_wants_right_answers_short_and_wrong_ones_long():
  settings = {"max_completion": 10, "answers": ["1"] * 4}
  right = ask("cosine", [0, 5, 10, 11], completions=["1"] * 4, **settings)
  wrong = ask("cosine", [0, 5, 10, 11], completions=["2"] * 4, **settings)
  assert right == pytest.approx([1, 0.75, 0.5, -1])
  assert wrong == pytest.approx([-1, -0.75, -0.5, -1])
  assert ask("cosine", [5], completions=["1"], max_completion=10, answers=[None]) == [None]


def test_distinct_share_is_none_without_ngrams():
  assert distinct_share([1, 1, 1], 1) == pytest.approx(1 / 3)
  assert distinct_share([1, 2], 3) is None
  assert ask("distinct:0", ids=[[1, 2, 1, 2], [1]], ngram=2) == [pytest.approx(2 / 3), None]


@pytest.mark.parametrize(
  ("spec", "settings", "message"),
  [
    ("length", {}, "needs max_completion"),
    ("soft_overlong", {"max_completion": 4, "overlong_cache": 5}, "overlong_cache is 5; use 0 to"),
    ("cosine", {"max_completion": 4, "cosine_verifier": "x"}, "use one of gsm8k, boxed, last_number"),
    ("repetition", {"ngram": 0}, "it must be 1 or more"),
    ("repetition", {"max_penalty": 1.0}, "it must be 0 or less"),
  ],
)
def test_settings_that_mean_nothing_are_refused(spec, settings, message):
  with pytest.raises(InputError, match=message):
    make(spec, **settings)
