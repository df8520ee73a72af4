"""A call in the form of the model's own template becomes OpenAI's; whatever else it wrote stays a text."""

import json
from types import SimpleNamespace

import pytest

from alignjax.data.tokenizer import load_tokenizer
from alignjax.serving import calls, reply
from alignjax.serving.engine import Piece
from tests import chat_templates

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
  folder = tmp_path_factory.mktemp("qwen3")
  chat_templates.write(folder, "qwen3")
  return load_tokenizer(folder)


def test_the_form_is_that_of_the_template(qwen3):
  assert calls.form_of(qwen3) == calls.Form("<tool_call>", "</tool_call>", "name", "arguments")


def test_a_template_without_a_place_for_calls_has_no_form(run):
  assert calls.form_of(run.tokenizer) is None


def test_calls_are_read(qwen3):
  form = calls.form_of(qwen3)
  content, (first, second) = calls.read(form, f"Let me see.\n{CALL}\n{CALL}", {"weather"})
  assert content == "Let me see."
  assert first["function"]["name"] == "weather"
  assert json.loads(first["function"]["arguments"]) == {"city": "Köln"}
  assert first["id"] != second["id"]


@pytest.mark.parametrize(
  "text",
  [
    "No call.",
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Kö',
    '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "weather"}\n</tool_call>',
    '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call> and more',
    "<tool_call>\n[1]\n</tool_call>",
  ],
)
def test_what_is_no_call_stays_a_text(qwen3, text):
  assert calls.read(calls.form_of(qwen3), text, {"weather"}) == (text, [])


def test_a_call_without_a_mark_is_the_whole_answer():
  form = calls.Form("", "", "name", "parameters")
  text = '{"name": "weather", "parameters": {"city": "Bonn"}}'
  assert len(calls.read(form, text, {"weather"})[1]) == 1
  assert calls.read(form, f"See {text}", {"weather"}) == (f"See {text}", [])


def test_answers_and_streams_carry_calls(qwen3):
  served = SimpleNamespace(call_form=calls.form_of(qwen3))
  choice = reply.chat_choice(served, reply.Answer(0, CALL, finish="stop"), False, 0, TOOLS)
  assert choice["finish_reason"] == "tool_calls"
  assert choice["message"]["content"] is None
  assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
  chunk = reply.chat_delta(served, 0, Piece(CALL, finish="stop"), True, False, 0, TOOLS)
  assert chunk["delta"]["tool_calls"][0]["index"] == 0
  assert chunk["finish_reason"] == "tool_calls"
  without = reply.chat_choice(served, reply.Answer(0, CALL, finish="stop"), False, 0)
  assert without["message"]["content"] == CALL
