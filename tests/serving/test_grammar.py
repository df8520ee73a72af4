"""An answer that must fit a JSON schema fits it, whatever the model would say, and nobody else's answer changes."""

import json
import threading

import httpx2 as httpx
import jsonschema
import pytest

from alignjax.data.tokenizer import load_tokenizer
from alignjax.serving.grammar import Grammars, text_of
from tests import smoke

SCHEMA = {
  "type": "object",
  "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
  "required": ["colour", "count"],
  "additionalProperties": False,
}


def chat(url, **fields):
  body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60, "seed": 3} | fields
  return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)


def form(schema):
  return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_answers_fit_the_schema_and_others_are_as_before(url):
  plain = chat(url, max_tokens=12).json()["choices"][0]["message"]["content"]
  beside = []
  thread = threading.Thread(target=lambda: beside.append(chat(url, max_tokens=12).json()))
  thread.start()
  answer = chat(url, response_format=form(SCHEMA), n=3, temperature=1.2).json()
  thread.join()
  for choice in answer["choices"]:
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
  assert beside[0]["choices"][0]["message"]["content"] == plain
  again = chat(url, response_format=form(SCHEMA), n=3, temperature=1.2).json()
  assert again["choices"] == answer["choices"]


@pytest.mark.parametrize(
  ("given", "param"),
  [
    ({"type": "xml"}, "response_format.type"),
    ({"type": "json_schema"}, "response_format.json_schema"),
    ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
    (form({"type": "wizard"}), "response_format"),
    (form({"type": "string", "not": {"const": "a"}}), "response_format"),
    ({"type": "text", "more": 1}, "response_format.more"),
  ],
  ids=str,
)
def test_a_form_that_cannot_be_held_is_refused(url, given, param):
  response = chat(url, response_format=given)
  assert response.status_code == 400
  assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["tokenizer.model", "qwen3"])
def test_both_kinds_of_tokenizers_spell_what_a_grammar_allows(path):
  tokenizer = load_tokenizer(str(smoke.CONFIGS / "smoke" / path))
  grammars = Grammars(tokenizer, tokenizer.vocab_size + 3)
  text = '{"colour":"red","count":12}'
  growing = grammars.begin(text_of(SCHEMA))
  for token in tokenizer.encode(text):
    assert growing.allowed()[token // 32] >> (token % 32) & 1, tokenizer.piece(token)
    growing.add([token])
  stop = tokenizer.stop_id
  assert growing.allowed()[stop // 32] >> (stop % 32) & 1
  assert growing.add([stop])
