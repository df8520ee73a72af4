"""How a template takes the arguments of a call: most write an object with `tojson`, some (DeepSeek's) print text."""

import json
from collections.abc import Sequence
from typing import Any

from alignjax.data import strict_json
from alignjax.data.jinja_template import JinjaTemplate
from alignjax.errors import InputError

_PROBE = {"k": "v"}
_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}


def takes_text(template: JinjaTemplate) -> bool:
  """Whether a template wants arguments as JSON text: of an object it fails, or prints what is Python and no JSON."""
  as_object = _written(template, _PROBE)
  if as_object is None:
    return _written(template, json.dumps(_PROBE)) is not None
  return repr(_PROBE) in as_object


def with_arguments(messages: Sequence[dict[str, Any]], as_text: bool) -> list[dict[str, Any]]:
  """Messages whose calls have their arguments as text, or as objects."""
  return [
    message | {"tool_calls": [_call(call, as_text) for call in message["tool_calls"]]}
    if message.get("tool_calls")
    else message
    for message in messages
  ]


def _call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
  function = call.get("function")
  arguments = function.get("arguments") if isinstance(function, dict) else None
  if as_text and isinstance(arguments, dict):
    arguments = json.dumps(arguments, ensure_ascii=False)
  elif not as_text and isinstance(arguments, str):
    arguments = _parsed(arguments)
  else:
    return call
  return call | {"function": function | {"arguments": arguments}}


def _parsed(arguments: str) -> Any:
  try:
    value = strict_json.loads(arguments)
  except strict_json.MalformedError:
    return arguments
  return value if isinstance(value, dict) else arguments


def _written(template: JinjaTemplate, arguments: Any) -> str | None:
  """A call of these arguments as the template writes it; None where it cannot."""
  call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
  turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
  for tools in ([], [_TOOL]):
    try:
      return template.render(turns, tools=tools).text
    except InputError:
      continue
  return None
