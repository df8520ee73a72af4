"""JSON text as a value, with a one-line message for each flaw.

Python's own parser raises four kinds of exceptions, takes the last of two equal keys, and accepts half a character.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from alignjax.data.first_bytes import BOM

DEEPEST = 100  # lists and objects in each other: the code that reads a value is recursive
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
# All that decides the end of a value. An object without others inside is one token, because most records are such.
TOKEN = re.compile(rb"%s|\{(?:[^\"{}\[\]]++|%s)*+\}|[\[\]{},]" % (_STRING, _STRING), re.DOTALL)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class MalformedError(ValueError):
  """A text that is not one JSON value; the message is the cause."""


def loads(text: bytes | str) -> Any:
  """Parses a JSON text.

  NaN and Infinity, which JSON does not have but Python writes, are accepted: the reader of a number refuses them.

  Raises:
    MalformedError: it is not JSON, not UTF-8, or not usable: it has equal keys in one object, half a
      surrogate pair, an integer of thousands of digits, or more than `DEEPEST` levels.
  """
  try:
    if isinstance(text, bytes):
      text = str(text.removeprefix(BOM), "utf-8")
    value = _DECODER.decode(text)
  except json.JSONDecodeError as error:
    raise MalformedError(f"not valid JSON ({error.msg} at column {error.colno})") from error
  except UnicodeDecodeError as error:
    raise MalformedError(f"not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
  except RecursionError as error:
    raise MalformedError(_TOO_DEEP) from error
  except MalformedError:
    raise
  except ValueError as error:  # Python's limit
    raise MalformedError("not usable JSON (an integer of thousands of digits)") from error
  if text.count("[") + text.count("{") > DEEPEST:
    for _ in _walk(value):
      pass
  if "\\" in text and _HALF.search(text):
    _check_whole(value)
  return value


_TOO_DEEP = f"not usable JSON (more than {DEEPEST} lists and objects in each other)"


def described(value: Any) -> str:
  """Names the type of a JSON value for people: "null", "NaN", "a str"."""
  if value is None:
    return "null"
  if isinstance(value, float) and value != value:
    return "NaN, which is no value"
  return f"a {type(value).__name__}"


def is_open(text: bytes) -> bool:
  """True if a text begins a list, an object or a string that it does not end."""
  depth, end = 0, 0
  for match in TOKEN.finditer(text):
    depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match[0], 0)
    end = match.end()
  return depth > 0 or b'"' in text[end:]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    keys = [key for key, _ in pairs]
    duplicate = next(key for key in keys if keys.count(key) > 1)
    raise MalformedError(f"the key {json.dumps(duplicate)[:80]} occurs twice in one object; keep one")
  return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
  """Iterates (path, value) of all parts of a value, itself included.

  Raises:
    MalformedError: a part is too deep.
  """
  stack = [("", value, 0)]
  while stack:
    path, item, depth = stack.pop()
    if depth > DEEPEST:
      raise MalformedError(_TOO_DEEP)
    yield path, item
    if isinstance(item, dict):
      stack += [(f"{path}.{key}" if path else key, inner, depth + 1) for key, inner in item.items()]
    elif isinstance(item, list):
      stack += [(f"{path}[{i}]", inner, depth + 1) for i, inner in enumerate(item)]


def _check_whole(value: Any) -> None:
  """Raises MalformedError if a key or text has half a surrogate pair."""
  for path, item in _walk(value):
    for text in (path, item):
      if not isinstance(text, str):
        continue
      try:
        text.encode()
      except UnicodeEncodeError as error:
        place = path.encode(errors="replace").decode()
        raise MalformedError(
          f"field '{place}' holds half a surrogate pair at character {error.start}; write whole characters"
        ) from error
