"""`alignjax judge`: what it writes, that a kill changes none of it, and its exit status."""

import json
from pathlib import Path
from unittest import mock

import pytest

from alignjax import cli
from alignjax.commands import judge
from alignjax.data.format import parse
from alignjax.environments import testbed
from alignjax.errors import InputError, exit_status
from alignjax.feedback import comparison
from alignjax.feedback.judge import rubric
from alignjax.feedback.judge.rule import find
from alignjax.feedback.judge.verdict import Answer
from tests import killed, smoke

RUBRIC = "helpful-harmless-honest"


@pytest.fixture(autouse=True)
def data_cache(monkeypatch, tmp_path_factory):
  monkeypatch.setenv("ALIGNJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
  folder = tmp_path_factory.mktemp("testbed")
  return str(testbed.write(folder, sft=1, preference=1, evaluation=1, prompts=1, judged=24)["judged"])


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def run(what, *flags):
  return exit_status(cli.main, ["judge", what, *map(str, flags)])


def test_pairs_are_records_to_train_on_and_comparisons_are_kept(judged, tmp_path):
  out = tmp_path / "pairs.jsonl"
  flags = ("--judge", "rule:fair", "--judge", "rule:wordy", "--rubric", RUBRIC, "--input", judged)
  assert run("pairs", *flags, "--out", out) == 0
  records = lines(out)
  for record in records:
    assert 0.5 <= parse(record, "preference").confidence <= 1
    assert [vote["judge"] for vote in record["votes"]] == ["rule:fair", "rule:wordy"]
  summary = json.loads((tmp_path / "pairs.json").read_text())
  assert summary["records"] + summary["left_out"]["tie"] == summary["pairs"] == 24
  read = comparison.read(str(tmp_path / "pairs.comparisons.jsonl"))
  assert len(read) == 24 * 2 * 2
  assert {one.annotator for one in read} == {"rule:fair", "rule:wordy"}
  assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "pairs.json", "pairs.comparisons.jsonl"}


@pytest.mark.parametrize("what", ["pairs", "score", "bias"])
def test_a_kill_at_any_write_changes_no_byte(judged, tmp_path, what):
  root = tmp_path / "root"
  found = rubric.load("checks" if what == "score" else RUBRIC)
  one = find("biased")
  work = {
    "pairs": lambda: judge.pairs([one], found, judged, root / "out.jsonl"),
    "score": lambda: judge.grade(one, found, judged, root / "out.jsonl"),
    "bias": lambda: judge.biases(one, found, judged, root / "out.json", judge.Request(samples=2)),
  }[what]
  with mock.patch.object(judge, "PART", 12):
    assert killed.at_every_write(root, work, most=14) > 8


def test_what_is_there_is_not_asked_again(judged, tmp_path):
  out = tmp_path / "out.jsonl"
  found = rubric.load(RUBRIC)
  one = find("fair")
  asked = []

  class Counting:
    name = one.name
    identity = one.identity

    def ask(self, questions):
      asked.append(len(questions))
      if len(asked) == 2:
        raise smoke.Killed
      return one.ask(questions)

  with mock.patch.object(judge, "PART", 12):
    with pytest.raises(smoke.Killed):
      judge.pairs([Counting()], found, judged, out)
    judge.pairs([Counting()], found, judged, out)
    assert asked == [24, 24, 24]
    asked.clear()
    with pytest.raises(smoke.Killed):
      judge.pairs([Counting()], found, judged, out)
    with pytest.raises(InputError, match="holds samples of another request"):
      judge.pairs([one], found, judged, out, judge.Request(seed=1))


def test_a_judge_whose_answers_are_no_verdicts_fails(judged, tmp_path):
  silent = lambda self, questions: [Answer("I would say A.") for _ in questions]
  with mock.patch("alignjax.feedback.judge.rule.RuleJudge.ask", silent):
    flags = ("--judge", "rule:fair", "--rubric", RUBRIC, "--input", judged)
    assert run("pairs", *flags, "--out", tmp_path / "out.jsonl") == 1
  assert (tmp_path / "out.jsonl").read_text() == ""
  summary = json.loads((tmp_path / "out.json").read_text())
  assert summary["left_out"]["no verdict"] == 24
  assert summary["null"] == {"share": 1.0, "count": 48, "outcome": "fail"}


def test_agreement_with_people(judged, tmp_path):
  votes = tmp_path / "votes.jsonl"
  records = []
  for record in lines(Path(judged)):
    for name in ("ann", "bob", "cy"):
      records.append({"verdict": record["gold"], "annotator": name} | record)
  votes.write_text("".join(json.dumps(one) + "\n" for one in records))
  flags = ("--judge", "rule:fair", "--rubric", RUBRIC, "--input", votes, "--out", tmp_path / "a.json")
  assert run("agreement", *flags) == 0
  report = json.loads((tmp_path / "a.json").read_text())
  assert report["units"] == 24
  assert report["gold"]["accuracy"]["value"] > 0.9


def test_grades_keep_the_fields_of_their_records(tmp_path):
  path = tmp_path / "in.jsonl"
  path.write_text('{"prompt": "p", "completion": "one two", "id": 7, "score": 3}\n')
  out = tmp_path / "out.jsonl"
  assert run("score", "--judge", "rule:longer", "--rubric", "checks", "--input", path, "--out", out) == 0
  (record,) = lines(out)
  assert record["id"] == 7
  assert record["given_score"] == 3
  assert record["score"] == pytest.approx(0.8808, abs=1e-4)
  assert set(record["checks"]) == {"answers", "factual", "safe", "form", "brief"}


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (("pairs", "--judge", "rule:none", "--rubric", RUBRIC, "--out", "o.jsonl"), "no such rule"),
    (("pairs", "--judge", "openai:x", "--rubric", RUBRIC, "--out", "o.jsonl"), "write openai:URL#MODEL"),
    (("pairs", "--judge", "rule:fair", "--rubric", "checks", "--out", "o.jsonl"), "of the form checks"),
    (("pairs", "--judge", "rule:fair", "--rubric", RUBRIC, "--out", "o.json"), "ending .jsonl"),
    (("bias", "--judge", "rule:fair", "--rubric", RUBRIC, "--out", "o.jsonl"), "ending .json"),
    (("bias", "--judge", "rule:fair", "--judge", "rule:vain", "--rubric", RUBRIC, "--out", "o.json"), "a panel"),
    (("score", "--judge", "rule:fair", "--rubric", RUBRIC, "--out", "o.jsonl"), "of the form pairwise"),
    (("pairs", "--judge", "rule:fair", "--judge", "rule:fair", "--rubric", RUBRIC, "--out", "o.jsonl"), "given twice"),
  ],
)
def test_a_flag_that_does_not_fit_is_said_before_the_work(flags, said, judged, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert run(*flags, "--input", judged) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert said in line
  assert not list(tmp_path.iterdir())
