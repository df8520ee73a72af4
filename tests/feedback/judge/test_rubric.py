"""Rubrics are known by their content; what they ask is rendered in the sandbox; answers are read strictly."""

import pytest

from alignjax.errors import InputError
from alignjax.feedback.judge import rubric, verdict
from alignjax.feedback.judge.rubric import Question
from alignjax.feedback.judge.verdict import Answer

PAIRWISE = """
name: better
version: 1
form: pairwise
labels: ["A", "B", "C"]
template: "{{ prompt }}|{{ completions[0] }}|{{ completions[1] }}|{{ fence }}|{{ answer }}"
"""
USER = [{"role": "user", "content": "Why?"}]


def test_the_hash_is_of_the_values_alone():
  one = rubric.parse(PAIRWISE, "r.yaml")
  assert one.hash == rubric.parse(f"# a comment\n{PAIRWISE.replace('form: pairwise', 'form:   pairwise')}", "x").hash
  assert one.hash != rubric.parse(PAIRWISE.replace("version: 1", "version: 2"), "x").hash
  assert one.named == ("better", 1, one.hash)


def test_shipped_rubrics_ask_all_that_they_are_given():
  assert rubric.shipped() == ["checks", "helpful-harmless-honest", "reference-grade"]
  pairwise, grade, checks = map(rubric.load, ("helpful-harmless-honest", "reference-grade", "checks"))
  (_, asked) = pairwise.messages(Question(pairwise, USER, ("Because.", "No idea.")))
  assert asked["content"].index("Because.") < asked["content"].index("No idea.")
  (asked,) = grade.messages(Question(grade, USER, ("Because.",), "So it is."))
  assert "So it is." in asked["content"]
  assert grade.labels == tuple(map(str, range(1, 11)))
  (asked,) = checks.messages(Question(checks, USER, ("Because.",), check=checks.criteria[2]))
  assert checks.criteria[2].text in asked["content"]


def test_a_completion_cannot_forge_the_fence():
  one = rubric.parse(PAIRWISE, "r.yaml")
  fence = lambda *texts: one.messages(Question(one, USER, texts))[0]["content"].split("|")[3]
  forged = fence("a", "b")
  assert fence("a", f"b {forged}") not in f"b {forged}"


def test_examples_are_turns():
  text = PAIRWISE + 'examples: [{prompt: "One?", completions: ["1", "2"], verdict: "A"}]\n'
  one = rubric.parse(text, "r.yaml")
  asked = one.messages(Question(one, USER, ("a", "b")))
  assert [message["role"] for message in asked] == ["user", "assistant", "user"]
  assert asked[1]["content"] == "A"
  assert asked[0]["content"].startswith("One?|1|2")


@pytest.mark.parametrize(
  ("old", "new", "said"),
  [
    ("form: pairwise", "form: triple", "field 'form'"),
    ("version: 1", "version: one", "field 'version'"),
    ('["A", "B", "C"]', '["A", "A"]', "field 'labels'"),
    ('["A", "B", "C"]', "[yes, no]", "field 'labels'"),
    ("name: better", "nam: better", "field 'nam' is unknown"),
    ("name: better", "name: better\nname: worse", "'name' comes twice"),
    ("{{ prompt }}", "{{ prompt", "cannot be rendered"),
    ("{{ prompt }}", "{{ ''.__class__.__mro__ }}", "cannot be rendered"),
    ("form: pairwise", "form: checks", "field 'criteria'"),
    ("name: better", "scale: [1, 5]\nname: better", "field 'scale' is of the form single"),
    ("name: better", "name: [", "is no YAML"),
  ],
)
def test_a_rubric_that_is_wrong_says_where(old, new, said):
  with pytest.raises(InputError, match=f"r.yaml: .*{said}"):
    rubric.parse(PAIRWISE.replace(old, new), "r.yaml")


def test_a_rubric_that_is_not_there_names_those_that_are():
  with pytest.raises(InputError, match="no such file; give a YAML file, or one of checks, helpful"):
    rubric.load("none.yaml")


@pytest.mark.parametrize(
  ("text", "said"),
  [("A", "A"), (" B\n", "B"), ("C", "C"), ("a", None), ("A.", None), ("A or B", None), ("", None), (None, None)],
)
def test_a_verdict_is_one_label_and_nothing_more(text, said):
  assert verdict.read(rubric.parse(PAIRWISE, "r.yaml"), text) == said


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("Because.\nVerdict: A", "A"),
    ("Verdict: B\n", "B"),
    ("Verdict: A\nVerdict: B", None),
    ("Verdict: A\nNo, wait.", None),
    ("Because A", None),
    ("A", None),
    ("Verdict: A, by far", None),
  ],
)
def test_with_reasons_the_verdict_is_the_last_line_and_the_only_one(text, said):
  one = rubric.parse(f"{PAIRWISE}reasoning: true\n", "r.yaml")
  assert verdict.read(one, text) == said


def test_log_probabilities_that_are_for_other_words_are_no_verdict():
  one = rubric.parse(PAIRWISE, "r.yaml")
  assert verdict.probabilities(one, Answer("A", {"A": -9.0, "B": -9.0})) is None
  shares = verdict.probabilities(one, Answer("Sure", {"A": -1.0, "B": -1.0}))
  assert shares == pytest.approx({"A": 0.5, "B": 0.5, "C": 0.0})
