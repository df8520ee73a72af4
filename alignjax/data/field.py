"""The fields of a user's record, read with errors that name them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

from alignjax.data import strict_json
from alignjax.data.source import Record
from alignjax.data.strict_json import described
from alignjax.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
MESSAGE = '{"role", "content"}'
CALL = '{"type": "function", "function": {"name", "arguments"}}'
_LARGEST = 3.4e38  # of float32, as which numbers reach the loss
EXTRAS = {  # fields besides role and content that a message may have, by role; others are not read
  "assistant": ("tool_calls", "reasoning_content"),
  "tool": ("name", "tool_call_id"),
}


class Message(TypedDict):
  """One turn of a dialogue; the content of one that calls tools may be empty."""

  role: str
  content: str
  tool_calls: NotRequired[list[dict[str, Any]]]
  reasoning_content: NotRequired[str]
  name: NotRequired[str]
  tool_call_id: NotRequired[str]


Dialogue = list[Message]
Tool = dict[str, Any]  # a function that a model may call, as a JSON schema


def required(record: Record, name: str, parent: str = "") -> Any:
  """Returns the value of a field that must be present; `parent` is the path of the object that has it."""
  value = record.get(name)
  if value is None:
    field = ".".join(filter(None, (parent, name)))
    if name in record:
      raise InputError(f"field '{field}' is missing: it is null; write its value, or leave the record out")
    raise InputError(f"field '{field}' is missing; the fields are {', '.join(sorted(record))}")
  return value


def text(value: Any, field: str) -> str:
  """Returns a value that must be a string of whole characters."""
  if not isinstance(value, str):
    raise InputError(f"field '{field}' is {described(value)}; it must be a string")
  if not value.isascii():
    try:
      value.encode()
    except UnicodeEncodeError as error:
      raise InputError(
        f"field '{field}' holds half a surrogate pair at character {error.start}; write whole characters"
      ) from error
  return value


def listed(record: Record, field: str) -> list:
  """Returns the value of a field that must be a list."""
  value = required(record, field)
  if not isinstance(value, list):
    raise InputError(f"field '{field}' is {described(value)}; it must be a list")
  return value


def as_many(record: Record, field: str, of: str) -> list:
  """Returns the list of a field, which must be as long as the list in the field `of`."""
  values = listed(record, field)
  count = len(record[of])
  if len(values) != count:
    raise InputError(f"field '{field}' holds {len(values)}; it must hold one for each of the {count} {of}")
  return values


def flag(value: Any, field: str) -> float:
  """Returns 1.0 or 0.0 for a value that must be true or false."""
  if not isinstance(value, bool):
    raise InputError(f"field '{field}' is {value!r}; it must be true or false: rename a field that means another thing")
  return float(value)


def number(value: Any, field: str, default: float | None, least: float, most: float = _LARGEST) -> float:
  """Returns a value that must be a number from `least` to `most`; `default`, if there is one, replaces a null."""
  if value is None and default is not None:
    return default
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise InputError(f"field '{field}' is {described(value)}; it must be a number")
  if isinstance(value, float) and not math.isfinite(value):
    raise InputError(f"field '{field}' is {value}; it must be finite")
  if not max(least, -_LARGEST) <= value <= most:
    raise InputError(f"field '{field}' is {_shown(value)}; it must be from {max(least, -_LARGEST):g} to {most:g}")
  return float(value)


def _shown(value: float) -> str:
  if isinstance(value, float) or abs(value) <= _LARGEST:
    return f"{value:g}"
  return f"an integer of {len(str(abs(value)))} digits"


def dialogue(record: Record, field: str, role: str = "") -> Dialogue:
  """Returns the messages of a field that must be present; `role` as in `as_dialogue`."""
  return as_dialogue(required(record, field), field, role)


def as_dialogue(value: Any, field: str, role: str = "") -> Dialogue:
  """Returns a value that must be a list of messages.

  With a `role`, a string may be in place of the list: it is one message of that role.
  """
  if role and isinstance(value, str):
    return [{"role": role, "content": text(value, field)}]
  if not isinstance(value, list):
    wanted = "a list of messages"
    if role:
      wanted = "a string or a list of messages"
    raise InputError(f"field '{field}' is {described(value)}; it must be {wanted}")
  return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def plain(prompt: Dialogue) -> str | Dialogue:
  """Returns a prompt as a record holds it: a single turn of a user as its text alone."""
  if len(prompt) == 1 and prompt[0]["role"] == "user":
    return prompt[0]["content"]
  return prompt


def _message(value: Any, field: str) -> Message:
  if not isinstance(value, dict):
    raise InputError(f"field '{field}' is {described(value)}; a message is {MESSAGE}")
  role = required(value, "role", field)
  if role not in ROLES:
    raise InputError(f"field '{field}.role' is {role!r}; the roles are {', '.join(ROLES)}")
  _refuse_unread(value, role, field)
  extras = {}
  for name in EXTRAS.get(role, ()):
    extra = value.get(name)
    if extra in (None, "", [], {}):
      continue
    read = _calls if name == "tool_calls" else text
    extras[name] = read(extra, f"{field}.{name}")
  content = ""
  if "tool_calls" not in extras or value.get("content") is not None:
    content = text(required(value, "content", field), f"{field}.content")
  return cast(Message, {"role": role, "content": content} | extras)  # the keys are those of EXTRAS


def _refuse_unread(message: Record, role: str, field: str) -> None:
  """Raises InputError if a message has a field that is not read, although its meaning would change the message."""
  if message.get("function_call") not in (None, "", {}):
    raise InputError(f"field '{field}.function_call' is the old form of a call; write it to 'tool_calls' as {CALL}")
  if role == "assistant" and message.get("weight") not in (None, 1):
    raise InputError(
      f"field '{field}.weight' is {message['weight']!r}: the loss is on all of a completion's turns; put those before "
      "the last one into 'prompt', or leave the weight out"
    )


def _calls(value: Any, field: str) -> list[dict[str, Any]]:
  """Returns the calls of a message, each as `CALL`; arguments written as JSON text become the object."""
  return [_call(call, f"{field}[{i}]") for i, call in enumerate(_objects(value, field))]


def _call(call: dict[str, Any], field: str) -> dict[str, Any]:
  if call.get("function") is None and "name" in call:
    bare = {name: call[name] for name in ("name", "arguments") if name in call}
    rest = {name: part for name, part in call.items() if name not in ("name", "arguments", "function")}
    call = {"type": "function"} | rest | {"function": bare}
  function = call.get("function")
  if not isinstance(function, dict) or not isinstance(function.get("name"), str):
    raise InputError(f"field '{field}' names no function; a call is {CALL}")
  place = f"{field}.function.arguments"
  arguments = function.get("arguments")
  if isinstance(arguments, str) and not arguments.strip():
    arguments = None
  if isinstance(arguments, str):
    arguments = _parsed(arguments, place)
  if arguments is None:
    arguments = {}
  if not isinstance(arguments, dict):
    raise InputError(f"field '{place}' is {described(arguments)}; it must be an object, or the JSON text of one")
  return call | {"function": function | {"arguments": arguments}}


def _parsed(value: str, field: str) -> Any:
  """Parses the value of a field that is JSON text."""
  try:
    return _json(strict_json.loads(value), field)
  except strict_json.MalformedError as error:
    raise InputError(f"field '{field}' is no JSON text: {error}; write the value itself, or its JSON text") from error


def tools(record: Record) -> tuple[Tool, ...]:
  """Returns the field "tools": a list of JSON schemas, or that list as JSON text; () if it is absent or empty."""
  value = record.get("tools")
  if isinstance(value, str) and value:
    value = _parsed(value, "tools")
  if not value:
    return ()
  return tuple(_objects(value, "tools"))


def _objects(value: Any, field: str) -> list[dict[str, Any]]:
  """Returns a value that must be a list of JSON objects."""
  if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
    raise InputError(f"field '{field}' is no list of objects; write each as one")
  try:
    return _json(value, field)
  except RecursionError as error:
    raise InputError(f"field '{field}' is nested too deeply; write it flatter") from error


def _json(value: Any, field: str) -> Any:
  """Copies a value that must be plain JSON with whole characters in its strings."""
  if isinstance(value, dict):
    return {text(key, field): _json(item, f"{field}.{key}") for key, item in value.items()}
  if isinstance(value, list):
    return [_json(item, f"{field}[{i}]") for i, item in enumerate(value)]
  if isinstance(value, float) and not math.isfinite(value):
    raise InputError(f"field '{field}' is {value}, which JSON does not have; write a number, null or text")
  if value is None or isinstance(value, bool | int | float):
    return value
  return text(value, field)


def columns(records: Sequence[Mapping[str, Any]]) -> dict[str, list]:
  """Returns the fields of records as lists, in the order of the records; None if a record lacks the field."""
  fields = dict.fromkeys(field for record in records for field in record)
  return {field: [record.get(field) for record in records] for field in fields}
