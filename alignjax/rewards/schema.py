"""The check that JSON fits a schema; needs jsonschema, and must run in a process that can be killed."""

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

_KNOWN = jsonschema_specifications.REGISTRY  # the drafts of JSON Schema; unlike a validator's own it fetches nothing
_BLOCK = re.compile(r"```json\s*\n(.*?)```", re.DOTALL)


def parsed(schema: str) -> dict:
  """Parses a schema from JSON text that begins with "{", or from the path of a file.

  Raises:
    InputError: it is no schema, or has a reference to another one: nothing is fetched.
  """
  try:
    text = schema
    if not text.lstrip().startswith("{"):
      text = reading.read_text(Path(schema).expanduser())
    content = json.loads(text)
    validator_for(content).check_schema(content)
    elsewhere = _outward(content)
  except Exception as error:  # the libraries raise errors of any class for an invalid schema
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise InputError(f"reward json_schema: {schema[:80]!r} is no schema ({reason})") from error
  if elsewhere:
    raise InputError(
      f"reward json_schema: {schema[:80]!r} refers to {elsewhere!r:.200}, which is not in it, and nothing is fetched; "
      "write that into its $defs"
    )
  return content


def _outward(schema: dict | bool) -> str:
  """Returns the first reference to something outside of a schema; "" if there is none.

  As in validators, each part is read by the draft that its "$schema" names, or else by that of the part before it.

  Raises:
    jsonschema.SchemaError: the target of a reference is no schema.
  """
  validator = validator_for(schema)
  root = _specification(validator).create_resource(schema)
  waiting = [(schema, validator, _KNOWN.resolver_with_root(root), False)]
  seen = set()
  while waiting:
    part, validator, resolver, referred = waiting.pop()
    validator = validator_for(part, default=validator)
    if (id(part), validator) in seen:
      continue
    seen.add((id(part), validator))
    if referred:  # it may be at a place that was not checked as a schema
      validator.check_schema(part)
    specification = _specification(validator)
    for inner in specification.subresources_of(part):
      resource = _specification(validator_for(inner, default=validator)).create_resource(inner)
      waiting.append((inner, validator, resolver.in_subresource(resource), False))
    for name in ("$ref", "$dynamicRef", "$recursiveRef"):
      if isinstance(part, dict) and isinstance(reference := part.get(name), str):
        try:
          target = resolver.lookup(reference)
        except referencing.exceptions.Unresolvable:
          return reference
        waiting.append((target.contents, validator, target.resolver, True))
  return ""


def _specification(validator: type[Validator]) -> referencing.Specification:
  """Returns the specification of a validator's draft, which names the parts of a schema."""
  return specification_with(validator.ID_OF(validator.META_SCHEMA))


def fits(schema: dict, prompts, completions: list[str], token_ids, columns) -> list[float]:
  """Scores completions, as a reward does: 1 if one is, or has in its one ```json block, JSON that fits; 0 if not.

  Args:
    schema: of `parsed`.
    completions: the other arguments of a reward are unused.
  """
  validator = validator_for(schema)(schema, registry=_KNOWN)
  return [float(_is_valid(validator, text)) for text in completions]


def _is_valid(validator, text: str) -> bool:
  """Returns whether a text, or the one ```json block in it, is JSON that fits."""
  blocks = _BLOCK.findall(text)
  try:
    value = json.loads(blocks[0] if len(blocks) == 1 else text)
  except (ValueError, RecursionError):
    return False
  return validator.is_valid(value)
