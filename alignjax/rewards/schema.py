"""JSON that fits a schema; needs jsonschema, and is to run in a process that can be killed."""

import json
import re
from pathlib import Path

import jsonschema_specifications
import referencing
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing.jsonschema import specification_with

from alignjax.errors import InputError
from alignjax.system import reading

_KNOWN = jsonschema_specifications.REGISTRY  # the drafts themselves; it fetches nothing, unlike a validator's own
_BLOCK = re.compile(r"```json\s*\n(.*?)```", re.DOTALL)


def parsed(schema: str) -> dict:
  """A schema from JSON text or from the path of a file.

  Raises:
    InputError: it is none, or refers to what is not in it: nothing is fetched.
  """
  try:
    found = json.loads(schema if schema.lstrip().startswith("{") else reading.read_text(Path(schema).expanduser()))
    validator_for(found).check_schema(found)
    elsewhere = _outward(found)
  except Exception as error:  # of nonsense the libraries make anything
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise InputError(f"reward json_schema: {schema[:80]!r} is no schema ({reason})") from error
  if elsewhere:
    raise InputError(
      f"reward json_schema: {schema[:80]!r} refers to {elsewhere!r:.200}, which is not in it, and nothing is fetched; "
      "write that into its $defs"
    )
  return found


def _outward(schema: dict | bool) -> str:
  """The first reference to what is not in a schema; "" where there is none.

  As validators do, each part is read by the draft that its "$schema" names, or else by that of what led to it.

  Raises:
    jsonschema.SchemaError: what a reference leads to is no schema.
  """
  validator = validator_for(schema)
  root = _specification(validator).create_resource(schema)
  waiting, seen = [(schema, validator, _KNOWN.resolver_with_root(root), False)], set()
  while waiting:
    part, validator, resolver, referred = waiting.pop()
    validator = validator_for(part, default=validator)
    if (id(part), validator) in seen:
      continue
    seen.add((id(part), validator))
    if referred:  # which may be a place where no schema was looked for
      validator.check_schema(part)
    specification = _specification(validator)
    for inner in specification.subresources_of(part):
      own = _specification(validator_for(inner, default=validator)).create_resource(inner)
      waiting.append((inner, validator, resolver.in_subresource(own), False))
    for name in ("$ref", "$dynamicRef", "$recursiveRef"):
      if isinstance(part, dict) and isinstance(reference := part.get(name), str):
        try:
          to = resolver.lookup(reference)
        except referencing.exceptions.Unresolvable:
          return reference
        waiting.append((to.contents, validator, to.resolver, True))
  return ""


def _specification(validator: type[Validator]) -> referencing.Specification:
  """How a validator's draft names its parts."""
  return specification_with(validator.ID_OF(validator.META_SCHEMA))


def fits(schema: dict, prompts, completions: list[str], token_ids, columns) -> list[float]:
  """1 or 0 by completion."""
  validator = validator_for(schema)(schema, registry=_KNOWN)
  return [float(_is_valid(validator, text)) for text in completions]


def _is_valid(validator, text: str) -> bool:
  blocks = _BLOCK.findall(text)
  try:
    value = json.loads(blocks[0] if len(blocks) == 1 else text)
  except (ValueError, RecursionError):
    return False
  return validator.is_valid(value)
