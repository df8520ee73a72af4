import json

import pytest

from alignjax.data import census, open_source
from alignjax.data.cache import digest
from alignjax.data.format import KINDS, flaw, parse, read
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


def test_a_completion_beside_a_pair_is_refused_where_either_could_be_meant():
  both = {"prompt": "q", "completion": "a", "chosen": "b", "rejected": "c"}
  for record, other in ((both, "completion"), (both | {"label": True}, "unpaired")):
    with pytest.raises(InputError, match=f"both there; set data.format={other} or data.format=preference, or rename"):
      parse(record, "sft")
    assert parse(record, "sft", other).completions == ([assistant("a")],)
    assert parse(record, "sft", "preference").completions == ([assistant("b")],)
    assert len(parse(record, "preference").completions) == 2
    assert parse(record, "prompt").prompt == [user("q")]
  assert len(parse(both, "unpaired").completions) == 2  # without a label the completion can not be meant
  with pytest.raises(InputError, match="'messages' and 'completion' are both there"):
    parse({"prompt": "q", "completion": "a", "messages": [user("q"), assistant("b")]}, "sft")


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
    (
      {"messages": [user("q"), {"role": "assistant", "content": None}]},
      "sft",
      r"field 'messages\[1\]\.content' is .*null",
    ),
    ({"messages": [None]}, "sft", r"field 'messages\[0\]' is null"),
    (PAIR | {"chosen": None}, "preference", "field 'chosen' is .*null"),
    (PAIR | {"chosen": float("nan")}, "preference", "field 'chosen' is NaN"),
    (PAIR | {"margin": 10**400}, "preference", "field 'margin' is an integer of 401 digits"),
    (PAIR | {"weight": 1e39}, "preference", r"field 'weight' is 1e\+39; it must be from 0 to 3.4e\+38"),
    (PAIR | {"margin": -1e39}, "preference", r"field 'margin' is -1e\+39; it must be from -3.4e\+38"),
    (PAIR | {"weight": float("inf")}, "preference", "must be finite"),
  ],
)
def test_a_malformed_record_is_named_with_its_field_and_place(tmp_path, record, kind, message):
  (tmp_path / "a.jsonl").write_text("\n" + json.dumps(record))
  with pytest.raises(InputError, match=rf"a\.jsonl:2: .*{message}"):
    read(open_source(tmp_path / "a.jsonl"), 0, kind)


@pytest.mark.parametrize("kind", ["sft", "unpaired", "mismatched"])
@pytest.mark.parametrize("label", [0, 1, 0.0, 1.0, "true", "false", "", [], 2, -1, "good"])
def test_a_label_is_true_or_false_in_every_kind(kind, label):
  with pytest.raises(InputError, match=r"field 'label' is .*; it must be true or false"):
    parse({"prompt": "q", "completion": "a", "label": label}, kind)
  if kind == "sft":
    with pytest.raises(InputError, match=r"field 'label' is .*; it must be true or false"):
      parse({"messages": [user("q"), assistant("a")], "label": label}, kind)


def test_a_label_of_nothing_is_none():
  record = {"prompt": "q", "completion": "a", "label": None}
  assert flaw(parse(record, "sft"), "sft") is None
  assert flaw(parse(record | {"label": True}, "sft"), "sft") is None
  assert flaw(parse(record | {"label": False}, "sft"), "sft") == "undesirable completion"
  with pytest.raises(InputError, match="no field 'label'"):
    parse(record, "unpaired")


LEAD = [SYSTEM]
WHOLE = [user("q"), assistant("x"), user("r")]


@pytest.mark.parametrize(
  ("prompt", "before", "expected"),
  [
    ("q", [SYSTEM, user("q")], [SYSTEM, user("q")]),  # whole dialogues, with a system turn that the prompt lacks
    ([user("q")], [SYSTEM, user("q")], [SYSTEM, user("q")]),
    ([SYSTEM, user("q")], [user("q")], [SYSTEM, user("q")]),  # and the other way round
    ([SYSTEM, user("q")], [SYSTEM, user("q")], [SYSTEM, user("q")]),
    (WHOLE, [SYSTEM, *WHOLE], [SYSTEM, *WHOLE]),
    ("r", WHOLE, WHOLE),  # the last question alone
    ("q", [], [user("q")]),
  ],
)
def test_a_prompt_that_the_sides_repeat_is_said_once(prompt, before, expected):
  pair = {"prompt": prompt, "chosen": [*before, assistant("a")], "rejected": [*before, assistant("b")]}
  example = parse(pair | {"reference": [*before, assistant("c")]}, "triple")
  assert (example.prompt, *example.completions) == (expected, [assistant("a")], [assistant("b")], [assistant("c")])
  assert flaw(example) is None
  assert parse(pair, "preference").completions == example.completions[:2]
  alone = parse({"prompt": prompt, "completion": pair["chosen"]}, "sft")
  assert (alone.prompt, alone.completions) == (expected, ([assistant("a")],))
  ranked = parse({"prompt": prompt, "responses": [pair["chosen"], pair["rejected"]], "rankings": [1, 2]}, "ranked")
  assert (ranked.prompt, *ranked.completions) == (expected, [assistant("a")], [assistant("b")])


@pytest.mark.parametrize(
  ("chosen", "rejected"),
  [
    ([SYSTEM, user("q"), assistant("a")], [{"role": "system", "content": "t"}, user("q"), assistant("b")]),
    ([SYSTEM, user("q"), assistant("a")], "b"),
    ([user("other"), assistant("a")], [user("other"), assistant("b")]),
  ],
)
def test_sides_of_another_prompt_are_dropped_for_that_reason(chosen, rejected):
  example = parse({"prompt": "q", "chosen": chosen, "rejected": rejected}, "preference")
  assert flaw(example) == "no assistant turn after the prompt"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_dialogue_as_text_may_have_any_line_ends(end):
  text = f"{end}{end}Human: q{end}{end}Assistant: x{end}Human: y{end}{end}Human: r{end}{end}Assistant: "
  example = parse({"chosen": f"{text}a", "rejected": f"{text}b"}, "preference")
  assert example.prompt == [user("q"), assistant(f"x{end}Human: y"), user("r")]
  assert example.completions == ([assistant("a")], [assistant("b")])


def calling(*calls, **more):
  return {"role": "assistant", "content": None, "tool_calls": list(calls)} | more


CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Lyon", "n": [1, None]}}}


@pytest.mark.parametrize(
  "call",
  [
    CALL,
    {"type": "function", "function": {"name": "f", "arguments": '{"city": "Lyon", "n": [1, null]}'}},
    {"name": "f", "arguments": {"city": "Lyon", "n": [1, None]}},
    {"name": "f", "arguments": ' {"city":"Lyon","n":[1,null]} ', "function": None},
  ],
)
def test_a_call_is_the_same_however_it_is_written(call):
  turns = [user("q"), calling(call), {"role": "tool", "content": "4"}, user("r"), calling(call, call)]
  example = parse({"messages": turns}, "sft")
  assert [turn["tool_calls"] for turn in example.completions[0] if "tool_calls" in turn] == [[CALL], [CALL, CALL]]
  prompt = parse({"prompt": turns[:3]}, "prompt").prompt
  assert prompt[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("arguments", ["", " ", None, {}, "{}"])
def test_a_call_without_arguments_has_an_empty_object(arguments):
  call = {"id": "a", "function": {"name": "f", "arguments": arguments}}
  turn = parse({"messages": [user("q"), calling(call)]}, "sft").completions[0][0]
  assert turn["tool_calls"] == [{"id": "a", "function": {"name": "f", "arguments": {}}}]
  del call["function"]["arguments"]
  assert parse({"messages": [user("q"), calling(call)]}, "sft").completions[0][0] == turn


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      {"name": "f", "arguments": "{city: Lyon}"},
      r"tool_calls\[0\]\.function\.arguments' is no JSON text: not valid JSON",
    ),
    ({"name": "f", "arguments": '{"a": 1, "a": 2}'}, "arguments' is no JSON text: the key .a. occurs twice"),
    ({"name": "f", "arguments": "[1]"}, "arguments' is a list; it must be an object"),
    ({"name": "f", "arguments": 3}, "arguments' is a int; it must be an object"),
    ({"name": "f", "arguments": '"{}"'}, "arguments' is a str; it must be an object"),
    ({"name": "f", "arguments": {"x": float("nan")}}, r"tool_calls\[0\]\.arguments\.x' is nan, which JSON does not"),
    ({"arguments": {}}, r"tool_calls\[0\]' names no function"),
    ({"function": "f"}, r"tool_calls\[0\]' names no function"),
    ({"function": {"arguments": {}}}, r"tool_calls\[0\]' names no function"),
  ],
)
def test_a_call_that_is_none_is_named(call, message):
  with pytest.raises(InputError, match=message):
    parse({"messages": [user("q"), calling(call)]}, "sft")


@pytest.mark.parametrize(
  ("turn", "message"),
  [
    (assistant("a") | {"function_call": {"name": "f"}}, r"messages\[1\]\.function_call' is the old form of a call"),
    (assistant("a") | {"weight": 0}, r"messages\[1\]\.weight' is 0"),
  ],
)
def test_what_would_change_a_message_and_is_not_read_is_refused(turn, message):
  with pytest.raises(InputError, match=message):
    parse({"messages": [user("q"), turn]}, "sft")


def test_fields_of_a_message_that_are_null_are_absent():
  padded = {"tool_calls": None, "name": None, "function_call": None, "weight": None, "tool_call_id": None}
  example = parse({"messages": [user("q") | padded, assistant("a") | padded]}, "sft")
  assert (example.prompt, example.completions) == ([user("q")], ([assistant("a")],))


TOOL_TURN = {"role": "tool", "content": ""}


@pytest.mark.parametrize(
  ("prompt", "reason"),
  [
    ([user("q"), calling(CALL), TOOL_TURN], None),
    ([user("q"), calling(CALL), TOOL_TURN, TOOL_TURN], None),
    ([{"role": "system", "content": ""}, user("q")], None),
    ([user("q"), {"role": "system", "content": " "}], None),
    ([SYSTEM, user("\n")], "empty prompt"),
    ([{"role": "system", "content": ""}], "empty prompt"),
    ([TOOL_TURN], "empty prompt"),
    ([], "empty prompt"),
  ],
)
def test_an_empty_result_or_system_turn_is_no_empty_prompt(prompt, reason):
  assert flaw(parse({"prompt": prompt, "completion": "a"}, "sft"), "sft") == reason


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


def test_measures_of_records_have_the_number_of_the_rules_by_which_they_are_read():
  """Where this fails, a rule has changed: count census._VERSION up, or measures of before stand for today's."""
  turns = [user("q"), assistant("a"), user("r"), assistant("b")]
  fields = (
    {"prompt": "q", "chosen": "b", "rejected": "c"},
    {"chosen": "\n\nHuman: q\n\nAssistant: b", "rejected": "\n\nHuman: q\n\nAssistant: c"},
    {"messages": turns},
    {"prompt": [SYSTEM, user("q")], "completion": "a"},
    {"prompt": "q", "responses": ["a", "b", "c"], "rankings": [1, 2, 2]},
    {"prompt": "q", "completions": ["a", "b"], "labels": [True, None]},
    {"question": "q", "answer": "a"},
  )
  beside = ({}, {"completion": "a"}, {"label": False}, {"finished": False}, {"reference": "d"}, {"prompt": ""})
  found = []
  for record in (one | more for one in fields for more in beside):
    for kind in KINDS:
      try:
        example = parse(record, kind)
        found.append([example.prompt, example.completions, example.labels, flaw(example, kind)])
      except InputError:
        found.append("refused")
  assert (census._VERSION, digest(*found)[:16]) == (6, "fa3140ff78b9ec10")


# --- confidence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("kind", "fields", "labels", "confidence"),
  [
    ("preference", {}, (), 0.8),
    ("unpaired", {}, (0.8, 1 - 0.8), 0.8),
    ("mismatched", {}, (0.8, 1 - 0.8), 0.8),
    ("sft", {}, (), 1.0),
    ("prompt", {}, (), 1.0),
  ],
)
def test_confidence_is_of_the_label(kind, fields, labels, confidence):
  example = parse({"prompt": "p", "chosen": "a", "rejected": "b", "confidence": 0.8} | fields, kind)
  assert (example.labels, example.confidence) == (labels, confidence)


@pytest.mark.parametrize("label", [True, False])
def test_confidence_of_a_label_is_the_probability_of_that_label(label):
  example = parse({"prompt": "p", "completion": "a", "label": label, "confidence": 0.75}, "unpaired")
  assert example.labels == (0.75 if label else 0.25,)


@pytest.mark.parametrize("confidence", [-0.1, 1.5, "high", True, float("nan")])
def test_a_confidence_that_is_no_probability_is_refused(confidence):
  with pytest.raises(InputError, match="field 'confidence' is"):
    parse({"prompt": "p", "chosen": "a", "rejected": "b", "confidence": confidence}, "preference")


def test_a_ranking_refuses_doubt_and_other_formats_pass_the_field_on():
  record = {"prompt": "p", "chosen": "a", "rejected": "b", "confidence": 0.8}
  with pytest.raises(InputError, match=r"field 'confidence' is 0\.8: the loss of a ranking takes its labels for right"):
    parse(record, "ranked")
  assert parse(record | {"confidence": 1}, "ranked").labels == (1.0, 2.0)
  assert parse({"prompt": "p", "completion": "a", "confidence": "high"}, "sft").completions
