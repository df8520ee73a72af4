"""Completions as JSON lines keep their prompts' fields, are those of `run.sample`, and survive an interruption."""

import io
import json
from unittest import mock

import pytest

from alignjax import cli
from alignjax.commands import completions
from alignjax.commands.best_of import Request
from alignjax.data.format import detect, parse, read
from alignjax.data.source import Source, open_source
from alignjax.errors import InputError, exit_status
from alignjax.runs.run import load, sample
from tests import smoke

PROMPTS = smoke.DATA / "eval_prompts.jsonl"
REQUEST = Request(n=2, max_new_tokens=6, batch_size=16)


@pytest.fixture(autouse=True)
def data_cache(monkeypatch, tmp_path_factory):
  monkeypatch.setenv("ALIGNJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def sft():
  return load(smoke.finished("sft")[0])


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def records(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_records_keep_their_fields_and_have_the_samples_of_the_run(sft, tmp_path):
  user = lambda text: {"role": "user", "content": text}
  dialogue = [user("Hi"), {"role": "assistant", "content": "Yes?"}, user("No")]
  rows = [{"prompt": "Why?", "id": 7, "completion": "gold"}, {"prompt": dialogue}]
  source = open_source(records(tmp_path / "prompts.jsonl", *rows))
  found = list(completions.answer(sft, source, REQUEST, token_ids=True))
  drawn = [one for prompt in sample(sft, ["Why?", dialogue], num=2, max_new_tokens=6) for one in prompt]
  assert [row["tokens"] for row in found] == [one.tokens for one in drawn]
  assert [row["completion"] for row in found] == [one.text for one in drawn]
  assert [row["logp"] for row in found] == pytest.approx([one.logps.sum() for one in drawn], abs=1e-4)
  assert [row["finished"] for row in found] == [one.finished for one in drawn]
  assert {(row["prompt"], row["id"], row["given_completion"]) for row in found[:2]} == {("Why?", 7, "gold")}
  assert [row["prompt"] for row in found[2:]] == [dialogue] * 2


def test_a_line_is_read_as_its_completion_whatever_its_prompt_came_from(sft, tmp_path):
  user, assistant = lambda text: {"role": "user", "content": text}, lambda text: {"role": "assistant", "content": text}
  turns = [{"role": "system", "content": "Be brief."}, user("Why?")]
  rows = [
    {"prompt": "Why?", "chosen": "a", "rejected": "b", "margin": 1},
    {"chosen": "\n\nHuman: Why?\n\nAssistant: a", "rejected": "\n\nHuman: Why?\n\nAssistant: b"},
    {"prompt": "Why?", "chosen": [*turns, assistant("a")], "rejected": [*turns, assistant("b")]},
    {"prompt": "Why?", "completion": "a", "label": False},
    {"prompt": "Why?", "responses": ["a", "b"], "rankings": [1, 2]},
    {"prompt": "Why?", "completions": ["a"], "labels": [True]},
    {"messages": [*turns, assistant("a")]},
    {"messages": [*turns, assistant("a")], "prompt": 7},
    {"question": "Why?", "answer": "a"},
  ]
  source = open_source(records(tmp_path / "prompts.jsonl", *rows))
  found = list(completions.answer(sft, source, REQUEST._replace(n=1)))
  for number, (given, row) in enumerate(zip(rows, found, strict=True)):
    example = parse(row, "sft")
    assert detect(row) == "completion"
    assert example.prompt == read(source, number, "prompt").prompt
    assert [turn["content"] for turn in example.completions[0]] == [row["completion"]]
    assert all(value in row.values() for value in given.values())  # nothing is lost
  assert found[0]["given_chosen"] == "a"
  assert found[2]["prompt"] == turns
  assert found[2]["given_prompt"] == "Why?"


def test_file_that_was_interrupted_goes_on_and_is_whole_or_not_there(sft, tmp_path):
  source, whole, killed = open_source(PROMPTS), tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
  assert completions.write(sft, source, whole, REQUEST) == whole
  drawn, asked = completions.draw, []

  def dying(policy, source, numbers, request):
    asked.append(list(numbers))
    if len(asked) == 2:
      raise smoke.Killed
    return drawn(policy, source, numbers, request)

  with mock.patch.object(completions, "draw", dying):
    with pytest.raises(smoke.Killed):
      completions.write(sft, source, killed, REQUEST)
    assert not killed.exists()
    with pytest.raises(InputError, match="holds samples of another request"):
      completions.write(sft, source, killed, REQUEST._replace(seed=1))
    completions.write(sft, source, killed, REQUEST)
  assert asked == [list(range(8)), list(range(8, 12)), list(range(8, 12))]
  assert killed.read_bytes() == whole.read_bytes()
  assert [row["id"] for row in lines(killed)[::2]] == [row["id"] for row in lines(PROMPTS)]
  assert [path.name for path in sorted(tmp_path.iterdir())] == ["killed.jsonl", "whole.jsonl"]


def test_file_that_is_there_stays(sft, tmp_path):
  out = records(tmp_path / "out.jsonl", {"mine": 1})
  with pytest.raises(InputError, match="is there already; delete it, or choose another"):
    completions.write(sft, open_source(PROMPTS), out, REQUEST)
  assert lines(out) == [{"mine": 1}]


@pytest.mark.parametrize("prompt", ["", "  ", [], [{"role": "user", "content": ""}]])
def test_empty_prompt_is_named_before_anything_is_sampled(prompt, sft, tmp_path):
  path = records(tmp_path / "prompts.jsonl", {"prompt": "Hi"}, {"prompt": prompt})
  with (
    mock.patch.object(completions, "draw", side_effect=AssertionError),
    pytest.raises(InputError, match=rf"{path}:2: the prompt is empty"),
  ):
    completions.write(sft, open_source(path), tmp_path / "out.jsonl", REQUEST)
  assert [one.name for one in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_field_that_would_take_the_place_of_another_is_named_before_anything_is_sampled(sft, tmp_path):
  pair = {"prompt": "Hi", "chosen": "new", "rejected": "b"}
  kept = {"prompt": "Hi", "tokens": 2, "given_tokens": 1}
  path = records(tmp_path / "prompts.jsonl", pair | {"given_prompt": "old"}, kept, pair | {"given_chosen": "old"})
  with mock.patch.object(completions, "draw", side_effect=AssertionError):
    for token_ids, said in ((False, "3: field 'chosen' is kept"), (True, "2: field 'tokens' is kept")):
      with pytest.raises(InputError, match=rf"{path}:{said}.*; rename one"):
        next(completions.answer(sft, open_source(path), REQUEST, token_ids))


def test_reward_model_leaves_no_file(tmp_path):
  reward = load(smoke.finished("reward")[0])
  with pytest.raises(InputError, match="a reward model scores and does not write"):
    completions.write(reward, open_source(PROMPTS), tmp_path / "out.jsonl", REQUEST)
  assert not list(tmp_path.iterdir())


def test_prompts_of_the_command_line_are_a_source():
  source = Source([completions.Typed(["Why?", "Né?"])])
  assert [source[i] for i in range(len(source))] == [{"prompt": "Why?"}, {"prompt": "Né?"}]
  assert source.where(1) == "prompt 2"
  assert source.fingerprint != Source([completions.Typed(["Why?"])]).fingerprint


# --- the command -----------------------------------------------------------------------------------------------------


def generate(*options):
  return exit_status(cli.main, ["generate", "--workdir", str(smoke.finished("sft")[0]), *map(str, options)])


def test_command_prints_what_it_writes(tmp_path, capsys):
  given = ("--prompt", "Why?", "--prompt", "Hi", "--max-new-tokens", 4, "--num", 2, "--token-ids")
  assert generate(*given) == 0
  printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert generate(*given, "--out", tmp_path / "out.jsonl") == 0
  assert lines(tmp_path / "out.jsonl") == printed
  assert [row["prompt"] for row in printed] == ["Why?", "Why?", "Hi", "Hi"]
  assert list(printed[0]) == ["prompt", "completion", "finished", "logp", "tokens"]


@pytest.mark.parametrize(
  ("options", "said"),
  [
    (("--prompts", "absent.jsonl"), "absent.jsonl: no such file"),
    (("--prompt", ""), "prompt 1: the prompt is empty"),
    (("--prompt", "Hi", "--out", "out.txt"), "--out=out.txt: the records are JSON lines"),
    (("--prompt", "Hi", "--top-p", 0), "--top-p=0.0: must be more than 0"),
    (("--prompt", "Hi", "--num", 0), "--num=0: must be at least 1"),
    (("--interactive", "--out", "out.jsonl"), "--interactive: goes without --out"),
  ],
)
def test_bad_option_is_one_line(options, said, capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.stdin", io.StringIO())
  assert generate(*options) == 2
  error = capsys.readouterr().err.splitlines()
  assert len(error) == 1
  assert said in error[0]
  assert not list(tmp_path.glob("out*"))
