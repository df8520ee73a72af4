"""JSON that fits a schema; needs jsonschema, and is to run in a process that can be killed."""

import json
import re
from pathlib import Path

from jsonschema import SchemaError
from jsonschema.validators import validator_for

from alignjax.errors import InputError

_BLOCK = re.compile(r"```json\s*\n(.*?)```", re.DOTALL)


def parsed(schema: str) -> dict:
  """A schema from JSON text or from the path of a file.

  Raises:
    InputError: it is none.
  """
  try:
    found = json.loads(schema if schema.lstrip().startswith("{") else Path(schema).expanduser().read_text())
    validator_for(found).check_schema(found)
  except (OSError, ValueError, RecursionError, SchemaError) as error:  # such as a number of thousands of digits
    raise InputError(f"reward json_schema: {schema[:80]!r} is no schema ({str(error).splitlines()[0]})") from error
  return found


def fits(schema: dict, prompts, completions: list[str], token_ids, columns) -> list[float]:
  """1 or 0 by completion."""
  validator = validator_for(schema)(schema)
  return [float(_is_valid(validator, text)) for text in completions]


def _is_valid(validator, text: str) -> bool:
  blocks = _BLOCK.findall(text)
  try:
    value = json.loads(blocks[0] if len(blocks) == 1 else text)
  except (ValueError, RecursionError):
    return False
  return validator.is_valid(value)
