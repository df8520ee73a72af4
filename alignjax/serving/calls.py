"""Calls of tools in a completion's text, found by the form in which the model's own chat template writes them."""

import json
import uuid
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from alignjax.data.field import Dialogue, Tool
from alignjax.data.tokenizer import Tokenizer
from alignjax.errors import InputError

_NAME = "zzprobe"
_ARGUMENTS = {"zzkey": "zzvalue"}
_PARAMETERS = {"type": "object", "properties": {"zzkey": {"type": "string"}}}


class Form(NamedTuple):
  """How a template writes a call: an object with a name and arguments.

  Attributes:
    before: the line before the object; "" if nothing is: the object is then the whole answer.
    after: the line after it.
    name: the key of the function's name.
    arguments: the key of the arguments.
  """

  before: str
  after: str
  name: str
  arguments: str


def form_of(tokenizer: Tokenizer) -> Form | None:
  """Finds how the template writes a call, by one that it writes; None if it has no place for one, or not as JSON."""
  function = {"name": _NAME, "arguments": _ARGUMENTS}
  tool = {"type": "function", "function": {"name": _NAME, "description": "", "parameters": _PARAMETERS}}
  question: Dialogue = [{"role": "user", "content": "Hi"}]
  answer: Dialogue = [
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function, "id": "zz"}]}
  ]
  try:
    text = tokenizer.decode(tokenizer.complete(question, answer, [tool])[0])
  except InputError:
    return None
  for start in (place for place, letter in enumerate(text) if letter == "{"):
    found = _object(text, start)
    if found is None:
      continue
    value, end = found
    names = [key for key, part in value.items() if part == _NAME]
    arguments = [key for key, part in value.items() if part in (_ARGUMENTS, json.dumps(_ARGUMENTS))]
    if names and arguments:
      before = text[:start].strip().rpartition("\n")[2]
      return Form(before, text[end:].strip(), names[0], arguments[0])
  return None


def read(form: Form, text: str, names: Collection[str]) -> tuple[str, list[dict[str, Any]]]:
  """Returns the text before the first call, and the calls of OpenAI's form; the whole text if it holds none.

  A call that is no JSON, or of a function that was not offered, makes the answer a text: nothing is guessed.

  Args:
    form: of the template.
    text: of a completion.
    names: of the functions that were offered.
  """
  content = ""
  parts: Sequence[str] = [text]
  if form.before:
    content, *parts = text.split(form.before)
  calls = []
  for part in parts:
    part = part.strip()
    found = _object(part, 0)
    if found is None:
      return text, []
    value, end = found
    name, arguments = value.get(form.name), value.get(form.arguments)
    rest = part[end:].strip()
    if name not in names or not isinstance(arguments, dict | str) or rest not in ("", form.after):
      return text, []
    if isinstance(arguments, dict):
      arguments = json.dumps(arguments, ensure_ascii=False)
    calls.append(
      {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": {"name": name, "arguments": arguments}}
    )
  return content.rstrip(), calls


def names_of(tools: Sequence[Tool]) -> set[str]:
  """Returns the names of functions that a request offers."""
  functions = [tool.get("function", tool) for tool in tools]
  return {function["name"] for function in functions if isinstance(function, dict) and "name" in function}


def _object(text: str, start: int) -> tuple[dict[str, Any], int] | None:
  """Parses the JSON object at a place of a text; returns it and the place behind it, or None."""
  try:
    value, end = json.JSONDecoder().raw_decode(text, start)
  except (ValueError, RecursionError):
    return None
  if isinstance(value, dict):
    return value, end
  return None
