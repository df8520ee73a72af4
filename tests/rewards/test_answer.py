"""Final answers: what is read out of a text, and which are equal."""

import os

import pytest

from alignjax.data import DataConfig, Dataset, load_tokenizer
from alignjax.errors import InputError
from alignjax.rewards import make, score
from alignjax.rewards.final_answer import equal, last_boxed, last_number_of, marked_number, number, reference
from alignjax.rewards.protocol import question


def ask(spec, completions, answers, **settings):
  rewards = make(spec, **settings)
  count = len(completions)
  scores = score(rewards, ["p"] * count, completions, [[]] * count, {"answer": answers}, report=lambda line: None)
  return [[None if v != v else v for v in row] for row in scores.values.tolist()], scores


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("72", 72),
    ("-3", -3),
    ("−3", -3),
    ("$1,250.50", 1250.5),
    ("1250.500", 1250.5),
    (".5", 0.5),
    ("3/4", 0.75),
    ("\\frac{3}{4}", 0.75),
    ("-\\dfrac{3}{4}", -0.75),
    ("50\\%", 50),
    ("\\$18", 18),
    ("12\\text{ cm}", 12),
    ("18.", 18),
    ("2e3", 2000),
    ("1/0", None),
    ("12 13", None),
    ("1,23", None),
    ("x", None),
    ("", None),
    ("12 apples", None),
    ("9" * 100, None),
    ("1e99999999", None),
  ],
)
def test_numbers_are_read_exactly(text, value):
  assert number(text) == value


@pytest.mark.parametrize(
  ("said", "right", "same"),
  [
    ("0.5", "1/2", True),
    ("0.333", "1/3", False),
    ("1,000", "1000.0", True),
    ("x + 1", "X+1", True),
    ("x + 1", "1 + x", False),
    ("12 13", "1213", False),
  ],
)
def test_answers_are_equal_as_numbers_or_as_texts(said, right, same):
  assert equal(said, right) is same


@pytest.mark.parametrize(
  ("text", "last"),
  [
    ("48 + 24 = 72.", "72"),
    ("it is -5", "-5"),
    ("10-5", "5"),
    ("x2 and H2O", None),
    ("$1,250 in all (see 3)", "3"),
    ("3rd of 4", "4"),
    ("so 3/4", "3/4"),
    ("none", None),
    ("version 1.2.3", "1.2"),
  ],
)
def test_the_last_number_of_a_text(text, last):
  assert last_number_of(text) == last


def test_marks_and_boxes():
  assert marked_number("a 5\n#### 7 and 8\nb 9") == "7"
  assert marked_number("#### 1\n#### $2") == "$2"
  assert marked_number("#### none") == "none"
  assert marked_number("7") is None
  assert last_boxed("\\boxed{1} then \\boxed{\\frac{1}{2}} end") == "\\frac{1}{2}"
  assert last_boxed("\\boxed{1} \\boxed{2") is None
  assert last_boxed("1") is None
  assert [reference(text) for text in ("a\n#### 7", "so \\boxed{8}.", " 9 ")] == ["7", "8", "9"]


def test_verifiers_differ_in_the_form_they_ask_for():
  completions = ["It is 72", "#### 72", "\\boxed{72.0}", "#### 71, no: 72", "nothing"]
  values, scores = ask("gsm8k+boxed+last_number", completions, ["... #### 72"] * 5)
  assert values == [[0, 0, 1], [1, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]
  assert not scores.failures


def test_a_record_without_an_answer_has_no_reward():
  assert ask("last_number", ["3", "3", "3"], [3, None, "3.0"])[0] == [[1], [None], [1]]


def test_a_column_that_is_missing_is_a_failure_with_its_name():
  _, scores = ask("gsm8k", ["3"], ["3"], answer_column="solution")
  assert scores.failures[0].cause == "LookupError: \"no column 'solution'; the records have answer\"".replace('"', "")


def test_hard_text_is_read_in_linear_time():
  for text in ("9" * 200_000, "1," * 100_000, "\\boxed{" * 30_000, "-" * 200_000, "1/" * 100_000, "1 " * 100_000):
    last_number_of(text), last_boxed(text), marked_number(f"####{text}"), equal(text, "1")


def test_gsm8k_is_prompts_and_answers_that_their_verifier_knows(tmp_path):
  folder = os.environ.get("ALIGNJAX_DATA")
  if not folder:
    pytest.skip("ALIGNJAX_DATA names no folder of real data")
  config = DataConfig(train=f"{folder}/gsm8k/test.jsonl.gz", holdout=0, rows=4, cache=str(tmp_path))
  dataset = Dataset.open(config, load_tokenizer(f"{folder}/tokenizers/mistral-v3.model"), "prompt")
  ids = range(0, len(dataset.source), 5)
  columns = dataset.columns(ids)
  prompts = [dataset.example(i).prompt for i in ids]
  assert len(dataset) == len(dataset.source) > 100
  assert [question(prompt) for prompt in prompts] == columns["question"]
  rewards = make("gsm8k+last_number+format", form="hashes")
  scores = score(rewards, prompts, columns["answer"], [[]] * len(ids), columns)
  assert (scores.values == 1).all()
  others = columns["answer"][1:] + columns["answer"][:1]
  assert score(rewards, prompts, others, [[]] * len(ids), columns).values[:, 0].mean() < 0.1


SYMBOLIC = [
  ("so $x^2 + 2x + 1$", "(x+1)^2", 1),
  ("\\boxed{\\frac{\\sqrt{2}}{2}}", "1/\\sqrt{2}", 1),
  ("it is 0.5", "\\frac12", 1),
  ("\\boxed{x+2}", "x+1", 0),
  ("nothing", "7", 0),
  ("\\boxed{7}", None, None),
]


@pytest.mark.slow
def test_symbolic_equality():
  pytest.importorskip("math_verify")
  completions, answers, values = zip(*SYMBOLIC, strict=True)
  assert ask("symbolic", completions, answers)[0] == [[value] for value in values]


@pytest.mark.slow
def test_an_expression_that_takes_forever_costs_itself_alone():
  pytest.importorskip("math_verify")
  values, scores = ask("symbolic", ["$9^{9^{9^{9}}}$", "\\boxed{7}"], ["7", "7"], symbolic_limit_s=3.0)
  assert values[1] == [1]
  assert values[0] in ([None], [0])  # the library may well see at once that it is not 7
  assert len(scores.failures) == (values[0] == [None])


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  for spec in ("symbolic", "json_schema"):
    with pytest.raises(InputError, match=r"pip install 'alignjax\[verify\]'"):
      make(spec)
