import json

import pytest

from alignjax.data import open_source
from alignjax.data.format import flaw, parse, read
from alignjax.errors import InputError


def user(content):
  return {"role": "user", "content": content}


def assistant(content):
  return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
  ("record", "prompt", "chosen", "rejected"),
  [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, [user("q")], [assistant("a")], [assistant("b")]),
    (
      {"prompt": [SYSTEM, user("q")], "chosen": [assistant("a")], "rejected": "b"},
      [SYSTEM, user("q")],
      [assistant("a")],
      [assistant("b")],
    ),
    (  # the prompt repeated at the front of the sides, as in UltraFeedback
      {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
      [user("q")],
      [assistant("a")],
      [assistant("b")],
    ),
    (  # the prompt implied by what the sides share
      {
        "chosen": [user("q"), assistant("x"), user("r"), assistant("a")],
        "rejected": [user("q"), assistant("x"), user("r"), assistant("b"), user("t"), assistant("c")],
      },
      [user("q"), assistant("x"), user("r")],
      [assistant("a")],
      [assistant("b"), user("t"), assistant("c")],
    ),
    (  # one side goes on after the other has ended
      {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a"), user("r"), assistant("b")]},
      [user("q")],
      [assistant("a")],
      [assistant("a"), user("r"), assistant("b")],
    ),
    (  # Anthropic HH-RLHF
      {
        "chosen": "\n\nHuman: q\n\nAssistant: x\n\ny\n\nHuman: r\n\nAssistant: a",
        "rejected": "\n\nHuman: q\n\nAssistant: x\n\ny\n\nHuman: r\n\nAssistant: a b",
      },
      [user("q"), assistant("x\n\ny"), user("r")],
      [assistant("a")],
      [assistant("a b")],
    ),
  ],
)
def test_a_pair_is_prompt_and_two_completions(record, prompt, chosen, rejected):
  example = parse(record, "preference")
  assert (example.prompt, *example.completions) == (prompt, chosen, rejected)
  assert flaw(example) is None
  assert parse(record, "sft").completions == (chosen,)
  assert parse(record, "prompt") == parse({"prompt": prompt}, "prompt")


def test_supervised_records():
  turns = [SYSTEM, user("q"), assistant("a"), user("r"), assistant("b")]
  example = parse({"messages": turns}, "sft")
  assert (example.prompt, example.completions) == (turns[:2], (turns[2:],))
  example = parse({"prompt": turns[:4], "completion": "b"}, "sft")
  assert (example.prompt, example.completions) == (turns[:4], (turns[4:],))


def test_a_question_is_a_prompt_and_its_answer_in_words_a_completion():
  words = {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2", "id": 7}
  assert parse(words, "prompt") == parse({"prompt": "1 + 1?"}, "prompt")
  assert parse(words, "sft").completions == ([assistant(words["answer"])],)
  assert parse(words | {"answer": 2}, "prompt").prompt == [user("1 + 1?")]
  assert parse({"prompt": "q"} | words, "prompt").prompt == [user("q")]
  with pytest.raises(InputError, match="with an answer in words"):
    parse(words | {"answer": 2}, "sft")


def test_margin_and_weight_default_to_zero_and_one_and_null_is_absent():
  example = parse({"prompt": "q", "completion": "a", "margin": None, "chosen": None}, "sft")
  assert (example.margin, example.weight) == (0.0, 1.0)
  example = parse({"prompt": "q", "chosen": "a", "rejected": "b", "margin": -2, "weight": 0.5, "id": "x"}, "preference")
  assert (example.margin, example.weight) == (-2.0, 0.5)


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
  ("record", "kind", "message"),
  [
    ({"prompt": "q", "chosen": "a"}, "preference", "field 'rejected' is missing"),
    ({"chosen": "a", "rejected": "b"}, "preference", "field 'prompt' is missing"),
    ({"prompt": "q", "completion": "a"}, "preference", "no field 'chosen' and 'rejected'"),
    ({"prompt": "q"}, "sft", "no field 'completion'"),
    ({"question": "q"}, "prompt", r"none of the known fields among \['question'\]"),
    (PAIR | {"chosen": 3}, "preference", "field 'chosen' is a int"),
    (PAIR | {"prompt": ["q"]}, "preference", r"field 'prompt\[0\]' is a str"),
    (PAIR | {"prompt": [{"role": "human", "content": "q"}]}, "sft", r"field 'prompt\[0\].role' is 'human'"),
    (PAIR | {"prompt": [{"role": "user"}]}, "sft", r"field 'prompt\[0\].content' is missing"),
    (PAIR | {"prompt": [assistant("q")]}, "sft", "ends with an assistant turn"),
    (PAIR | {"margin": "big"}, "preference", "field 'margin' is a str"),
    (PAIR | {"margin": float("nan")}, "preference", "must be finite"),
    (PAIR | {"weight": -1}, "preference", "field 'weight' is -1"),
    (PAIR | {"chosen": "\ud800"}, "preference", "surrogate"),
    ({"messages": "q"}, "sft", "field 'messages' is a str"),
  ],
)
def test_a_malformed_record_is_named_with_its_field_and_place(tmp_path, record, kind, message):
  (tmp_path / "a.jsonl").write_text("\n" + json.dumps(record))
  with pytest.raises(InputError, match=rf"a\.jsonl:2: .*{message}"):
    read(open_source(tmp_path / "a.jsonl"), 0, kind)


def test_a_forced_format_refuses_other_records():
  with pytest.raises(InputError, match="no dialogue that starts with"):
    parse(PAIR, "preference", "hh")


@pytest.mark.parametrize(
  ("record", "kind", "reason"),
  [
    (PAIR | {"prompt": " "}, "preference", "empty prompt"),
    (PAIR | {"rejected": "\n"}, "preference", "empty completion"),
    (PAIR | {"rejected": "a"}, "preference", "chosen equal to rejected"),
    (PAIR | {"rejected": "a"}, "sft", None),
    (PAIR | {"rejected": "\n"}, "prompt", None),
    ({"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]}, "preference", "empty prompt"),
    ({"prompt": "q", "completion": "a", "finished": False}, "sft", "cut-off completion"),
    ({"prompt": "q", "completion": "a", "finished": False, "label": True}, "unpaired", "cut-off completion"),
    ({"prompt": "q", "completion": "a", "finished": False}, "prompt", None),
    ({"prompt": "q", "completion": "a", "finished": True}, "sft", None),
    ({"prompt": "q", "completion": "a", "finished": None}, "sft", None),
    ({"messages": [user("q")]}, "sft", "no assistant turn at the end"),
    ({"messages": [user("q"), assistant("a"), user("r")]}, "sft", "no assistant turn at the end"),
    ({"messages": [user("q"), assistant(""), user("r"), assistant("b")]}, "sft", "empty completion"),
    (
      {"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: a"},
      "preference",
      "empty completion",
    ),
  ],
)
def test_a_degenerate_record_has_a_reason(record, kind, reason):
  assert flaw(parse(record, kind)) == reason
