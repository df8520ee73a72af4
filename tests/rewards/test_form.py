"""Forms, patterns and schemas."""

import json
import re
import socket

import pytest

from alignjax.errors import InputError
from alignjax.rewards import make, score
from alignjax.rewards.form import FORMS
from tests import golden


def ask(spec, completions, **settings):
  count = len(completions)
  scores = score(make(spec, **settings), ["p"] * count, completions, [[]] * count, report=lambda line: None)
  return scores.values.ravel().tolist(), scores


@pytest.mark.parametrize(
  ("form", "kept", "broken"),
  [
    ("think", ["<think>a</think>b", "<think></think>"], ["b<think>a</think>", "<think>a", "<think><think></think>"]),
    (
      "think_answer",
      ["<think>a</think>\n<answer>b</answer>\n"],
      ["<think>a</think>", "<think>a</think>x<answer>b</answer>", "<answer>b</answer><think>a</think>"],
    ),
    ("hashes", ["a\n#### 12", "#### -1,000\n"], ["#### 12 apples", "12", "#### x", "a #### 12", "#### 12\nmore"]),
    ("boxed", ["so \\boxed{1}"], ["1", "\\boxed{1"]),
  ],
)
def test_forms(form, kept, broken):
  assert ask("format", kept + broken, form=form)[0] == [1.0] * len(kept) + [0.0] * len(broken)


def test_every_form_is_tested():
  assert set(FORMS) == {"think", "think_answer", "hashes", "boxed"}
  with pytest.raises(InputError, match="no form 'thinks'"):
    make("format", form="thinks")


def test_a_pattern_is_searched_and_a_hopeless_one_is_cut_off():
  values, scores = ask("regex", ["aab", "a\nb", "c"], pattern="a.b")
  assert values == [1, 1, 0]
  values, scores = ask("regex", ["aa", "a" * 60 + "b"], pattern=r"\A(a+)+\Z", match_limit_s=1.0)
  assert values[0] == 1
  assert [failure.kind for failure in scores.failures] == ["timed out"]


@pytest.mark.parametrize(("pattern", "message"), [("", "needs a pattern"), ("(", "is no regular expression")])
def test_a_pattern_that_is_none_is_refused(pattern, message):
  with pytest.raises(InputError, match=message):
    make("regex", pattern=pattern)


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}


def test_json_that_fits_a_schema(tmp_path):
  pytest.importorskip("jsonschema")
  completions = [
    '{"age": 3}',
    'Here:\n```json\n{"age": 4}\n```\nDone.',
    '{"age": -1}',
    "{}",
    "no json",
    "[" * 100_000,
    "9" * 5000,
    '```json\n{"age": 4}\n```\n```json\n{"age": 4}\n```',
  ]
  expected = [1, 1, 0, 0, 0, 0, 0, 0]
  assert ask("json_schema", completions, schema=json.dumps(SCHEMA))[0] == expected
  path = tmp_path / "schema.json"
  path.write_text(json.dumps(SCHEMA))
  assert ask("json_schema", completions, schema=str(path))[0] == expected


NO_SCHEMAS = (
  *("", "missing.json", "{", '{"type": "thing"}', '{"n": ' + "9" * 5000, "a\0b", '{"$schema": 5}'),
  '{"$defs": {"a": {"$id": "http://[bad", "$ref": "x"}}}',
  '{"$schema": "http://json-schema.org/draft-03/schema#", "extends": {"$ref": "#/x"}, "x": {}}',
  '{"$ref": "#/x", "x": {"maxItems": [1]}}',
)


@pytest.mark.parametrize("schema", NO_SCHEMAS)
def test_a_schema_that_is_none_is_refused(schema):
  pytest.importorskip("jsonschema")
  with pytest.raises(InputError, match="reward json_schema"):
    make("json_schema", schema=schema)


def test_a_schema_fetches_nothing(monkeypatch):
  pytest.importorskip("jsonschema")
  from alignjax.rewards.schema import fits, parsed

  monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("a socket was opened"))
  for reference in ("http://127.0.0.1:9/a.json", "other.json", "#/$defs/missing", "#there"):
    for schema in ({"$ref": reference}, {"$defs": {"x": {"items": {"$ref": reference}}}, "$ref": "#/$defs/x"}):
      with pytest.raises(InputError, match=f"refers to '{re.escape(reference)}', which is not in it") as caught:
        parsed(json.dumps(schema))
      assert "\n" not in str(caught.value)
  with pytest.raises(Exception, match="Unresolvable"):  # of a schema that nobody looked at
    fits({"$ref": "http://127.0.0.1:9/a.json"}, [""], ["{}"], [], {})
  draft = "https://json-schema.org/draft/2020-12/schema"
  whole = {"$id": "https://x.org/a", "$defs": {"n": {"$anchor": "n", "type": "integer"}, "me": {"$ref": "a"}}}
  for reference, text, expected in (("#n", "3", 1), ("#/$defs/n", '"3"', 0), (draft, '{"type": "thing"}', 0)):
    found = parsed(json.dumps(whole | {"$ref": reference}))
    assert fits(found, [""], [text], [], {}) == [expected]


@pytest.mark.parametrize("name", golden.entries("rewards", {"in", "out"}))
def test_golden_think_format(name):
  case = golden.section("rewards")[name]
  assert ask("format", case["in"], form="think")[0] == case["out"]


DRAFT_07 = "http://json-schema.org/draft-07/schema#"


@pytest.mark.parametrize("draft", [DRAFT_07, "https://json-schema.org/draft/2019-09/schema"])
def test_what_a_reference_leads_to_is_of_the_draft_of_what_refers_to_it(draft):
  pytest.importorskip("jsonschema")
  from alignjax.rewards.schema import fits, parsed

  pair = {"items": [{"type": "integer"}, {"$ref": "#/parts/text"}]}
  schema = {"$schema": draft, "parts": {"pair": pair, "text": {"type": "string"}}}
  found = parsed(json.dumps(schema | {"properties": {"a": {"$ref": "#/parts/pair"}}}))
  assert fits(found, [""] * 2, ['{"a": [1, "x"]}', '{"a": [1, 2]}'], [], {}) == [1, 0]


def test_a_schema_that_an_older_draft_refers_to_fetches_nothing():
  pytest.importorskip("jsonschema")
  from alignjax.rewards.schema import parsed

  outward = {"dependencies": {"k": {"$ref": "http://127.0.0.1:9/a.json"}}}
  schema = {"$schema": DRAFT_07, "parts": {"x": outward}, "properties": {"a": {"$ref": "#/parts/x"}}}
  with pytest.raises(InputError, match=r"refers to 'http://127\.0\.0\.1:9/a\.json', which is not in it"):
    parsed(json.dumps(schema))


def test_a_schema_may_be_true(tmp_path):
  pytest.importorskip("jsonschema")
  (tmp_path / "any.json").write_text("true")
  assert ask("json_schema", ["3", "no"], schema=str(tmp_path / "any.json"))[0] == [1, 0]
