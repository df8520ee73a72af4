"""The form in which a template takes the arguments of a call: most write an object with `tojson`, some print text."""

import json
from collections.abc import Sequence
from typing import Any

from alignjax.data import strict_json
from alignjax.data.jinja_template import JinjaTemplate
from alignjax.errors import InputError

_PROBE = {"k": "v"}
_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}


def takes_text(template: JinjaTemplate) -> bool:
  """True if a template takes arguments as JSON text: with an object it fails, or prints Python instead of JSON."""
  as_object = _written(template, _PROBE)
  if as_object is None:
    return _written(template, json.dumps(_PROBE)) is not None
  return repr(_PROBE) in as_object


def with_arguments(messages: Sequence[dict[str, Any]], as_text: bool) -> list[dict[str, Any]]:
  """Returns messages whose calls have their arguments as JSON text, or as objects."""
  converted = []
  for message in messages:
    if message.get("tool_calls"):
      message = message | {"tool_calls": [_call(call, as_text) for call in message["tool_calls"]]}
    converted.append(message)
  return converted


def _call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
  function = call.get("function")
  if not isinstance(function, dict):
    return call
  arguments = function.get("arguments")
  if as_text and isinstance(arguments, dict):
    arguments = json.dumps(arguments, ensure_ascii=False)
  elif not as_text and isinstance(arguments, str):
    arguments = _parsed(arguments)
  else:
    return call
  return call | {"function": function | {"arguments": arguments}}


def _parsed(arguments: str) -> Any:
  """Returns the object that a JSON text writes; other texts stay as they are."""
  try:
    value = strict_json.loads(arguments)
  except strict_json.MalformedError:
    return arguments
  if isinstance(value, dict):
    return value
  return arguments


def _written(template: JinjaTemplate, arguments: Any) -> str | None:
  """Renders a call with these arguments; None if the template cannot."""
  call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
  turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
  for tools in ([], [_TOOL]):
    try:
      return template.render(turns, tools=tools).text
    except InputError:
      continue
  return None
