"""A dialogue in the terminal answers as `run.sample` does with all that was said, until it is told to forget or end."""

import io

import pytest

from alignjax import cli
from alignjax.commands import chat
from alignjax.commands.best_of import Request
from alignjax.errors import InputError, exit_status
from alignjax.runs.run import load, sample
from alignjax.sampling import stream
from tests import smoke

GREEDY = Request(temperature=0.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def sft():
  return load(smoke.finished("sft")[0])


def session(run, *said, request=GREEDY):
  """Answers to the lines of a dialogue, as one text."""
  lines = iter(said)

  def ask():
    line = next(lines, None)
    if isinstance(line, str):
      return line
    raise line or EOFError

  chat.chat(run, request, ask)


def expected(run, *turns, **options):
  """The answer to the last of the user's turns, the others answered likewise."""
  dialogue = []
  for turn in turns:
    dialogue.append({"role": "user", "content": turn})
    answer = sample(run, [dialogue], max_new_tokens=8, **({"temperature": 0.0} | options))[0][0].text
    dialogue.append({"role": "assistant", "content": answer})
  return answer


def test_an_answer_takes_in_all_that_was_said(sft, capsys):
  session(sft, "Hi", "", "Who has the red ball?")
  assert capsys.readouterr().out == f"{expected(sft, 'Hi')}\n{expected(sft, 'Hi', 'Who has the red ball?')}\n"


def test_reset_forgets_and_exit_ends(sft, capsys):
  session(sft, "Hi", " /reset ", "Why?", "/exit", "Why?")
  printed = capsys.readouterr()
  assert printed.out == f"{expected(sft, 'Hi')}\n{expected(sft, 'Why?')}\n"
  assert chat.HELP in printed.err


def test_unknown_command_is_no_message(sft, capsys):
  session(sft, "/help", "/quit")
  printed = capsys.readouterr()
  assert not printed.out
  assert printed.err.count(chat.HELP) == 3


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_end_of_input_ends(sft, capsys, end):
  session(sft, end)
  assert not capsys.readouterr().out


def test_first_answer_is_the_sample_of_the_seed(sft, capsys):
  session(sft, "Hi", request=Request(max_new_tokens=8, seed=3, top_k=20))
  assert capsys.readouterr().out == f"{expected(sft, 'Hi', temperature=1.0, seed=3, top_k=20)}\n"


def test_answer_that_did_not_end_says_so(sft, capsys):
  session(sft, "Hi", request=Request(temperature=0.0, max_new_tokens=1))
  assert "[cut at --max-new-tokens=1]" in capsys.readouterr().err


def test_interrupted_answer_stays_as_far_as_it_came(sft, capsys, monkeypatch):
  pieces, asked = chat._pieces, []

  def interrupted(run, params, dialogue, *others):
    asked.append([message["content"] for message in dialogue])
    if len(asked) == 1:
      yield "So"
      raise KeyboardInterrupt
    yield from pieces(run, params, dialogue, *others)

  monkeypatch.setattr(chat, "_pieces", interrupted)
  session(sft, "Hi", "Why?")
  assert asked == [["Hi"], ["Hi", "So", "Why?"]]
  assert capsys.readouterr().out.startswith("So\n")


def test_characters_of_several_tokens_are_printed_whole(sft, monkeypatch):
  ids = sft.tokenizer.encode("né 😀!")
  monkeypatch.setattr(chat, "stream", lambda *a, **k: iter([*ids, sft.tokenizer.stop_id]))
  found = list(chat._pieces(sft, sft.params, [{"role": "user", "content": "Hi"}], GREEDY, 0))
  assert "".join(found) == "né 😀!"
  assert "\N{REPLACEMENT CHARACTER}" not in "".join(found)
  assert len(found) > 2


def test_programs_of_a_width_are_compiled_once(sft, capsys):
  request = Request(max_new_tokens=5)
  session(sft, "Hi", "/reset", "Why?", request=request)
  begin, extend = stream._programs(sft.model, 5)
  assert (begin._cache_size(), extend._cache_size()) == (1, 1)


def test_reward_model_does_not_talk():
  with pytest.raises(InputError, match="a reward model scores and does not write"):
    session(load(smoke.finished("reward")[0]), "Hi")


def test_command_reads_the_standard_input(sft, capsys, monkeypatch):
  monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/reset\nWhy?\n"))
  options = ["--interactive", "--temperature", "0", "--max-new-tokens", "8"]
  assert exit_status(cli.main, ["generate", "--workdir", str(smoke.finished("sft")[0]), *options]) == 0
  assert capsys.readouterr().out == f"{expected(sft, 'Hi')}\n{expected(sft, 'Why?')}\n"


def test_broken_bytes_are_asked_for_again(sft, capsys, monkeypatch):
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nHi\n"), encoding="utf-8"))
  chat.chat(sft, GREEDY)
  printed = capsys.readouterr()
  assert printed.out == f"{expected(sft, 'Hi')}\n"
  assert "this is not UTF-8; type it again" in printed.err


@pytest.mark.long
def test_factors_talk_with_their_base(capsys):
  run = load(smoke.finished("dpo_lora")[0])
  capsys.readouterr()
  session(run, "Hi")
  assert capsys.readouterr().out == f"{expected(run, 'Hi')}\n"
