"""A tokenizer as Hugging Face stores it: tokenizer.json, and beside it the template and the special tokens' names.

Both generations: transformers 4 writes a special token as an object or a text and the template into
tokenizer_config.json, transformers 5 writes texts and chat_template.jinja.
"""

from typing import Any, NamedTuple

from etils import epath

from alignjax.errors import InputError
from alignjax.system import hub
from alignjax.system.hub import shown

LARGEST_ID = 2**31 - 1
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
PARTS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class Folder(NamedTuple):
  """What is in it.

  Attributes:
    tokenizer: the text of tokenizer.json.
    template: the chat template.
    named: what special tokens are called, as in {"bos_token": "<s>"}.
    special: the texts of more special tokens.
    added: the flags of added tokens by id, where tokenizer_config.json has them.
    generation: of generation_config.json: bos_token_id and such.
  """

  tokenizer: str
  template: str
  named: dict[str, str]
  special: list[str]
  added: dict[int, dict[str, Any]]
  generation: dict[str, Any]


def read_folder(path: epath.Path) -> Folder:
  """Reads a tokenizer.json, and what there is of its companions.

  Raises:
    InputError: a file can not be read or is no JSON, or there is no chat template.
  """
  config, names, generation = (_json(path.parent / part) for part in PARTS)
  both = names | config
  named = {key: _text(value) for key, value in both.items() if key.endswith("_token") and _text(value)}
  special = []
  for key in ("additional_special_tokens", "extra_special_tokens"):
    more = both.get(key) or []
    if not isinstance(more, dict | list):
      where = path.parent / PARTS[0 if key in config else 1]
      raise InputError(f"{where}: {key} is {shown(more)}; it must be a list or an object of tokens")
    if isinstance(more, dict):  # {"image_token": ...}: transformers 5 names them
      named |= {name: _text(value) for name, value in more.items()}
    special += [_text(value) for value in (more.values() if isinstance(more, dict) else more)]
  added = _added(config, f"{path.parent / PARTS[0]}")
  _check_ids(generation, f"{path.parent / PARTS[2]}")
  return Folder(read_text(path), _template(path.parent, config), named, special, added, generation)


def _added(config: dict[str, Any], where: str) -> dict[int, dict[str, Any]]:
  """The flags of added tokens by id."""
  entries = config.get("added_tokens_decoder") or {}
  if not isinstance(entries, dict):
    raise InputError(f"{where}: added_tokens_decoder is {shown(entries)}; it must be an object of tokens by id")
  for number, entry in entries.items():
    if not (number.isascii() and number.isdecimal() and len(number) < 11 and int(number) <= LARGEST_ID):
      raise InputError(f"{where}: added_tokens_decoder has a token {shown(number)}; it must be an id, a whole number")
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
      raise InputError(f"{where}: added_tokens_decoder has {shown(entry)} as token {number}; it must have a content")
    for flag in FLAGS:
      if not isinstance(entry.get(flag, False), bool):
        raise InputError(f"{where}: token {number} has {flag}={shown(entry[flag])}; it must be true or false")
  return {int(number): entry for number, entry in entries.items()}


def _check_ids(generation: dict[str, Any], where: str) -> None:
  """Raises InputError where an id of generation_config.json is none; -1 says that there is no such token."""
  for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
    found = generation.get(name)
    for number in found if isinstance(found, list) else [found]:
      right = isinstance(number, int) and not isinstance(number, bool) and -1 <= number <= LARGEST_ID
      if number is not None and not right:
        raise InputError(f"{where}: {name} is {shown(found)}; it must be an id or a list of them")


def _template(folder: epath.Path, config: dict[str, Any]) -> str:
  """The chat template: the file's, else that of tokenizer_config.json or chat_template.json, of several the default."""
  file = folder / "chat_template.jinja"
  if file.exists():
    return read_text(file)
  alone = "chat_template.json"  # of models that take more than text, whose other files may have none
  for part, source in ((PARTS[0], config), (alone, _json(folder / alone))):
    if found := source.get("chat_template"):
      return _default(folder / part, found)
  others = [path.name for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))]
  held = f" but {', '.join(others)} in additional_chat_templates" if others else ""
  raise InputError(
    f"{folder}: there is no chat template{held}; write one to chat_template.jinja beside tokenizer.json "
    "(a base model has none: take that of its instruction-tuned sibling)"
  )


def _default(path: epath.Path, found: Any) -> str:
  """The one template of a file, or of several the default."""
  if isinstance(found, list):
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in found]
    if not all(isinstance(name, str) for name in names):
      raise InputError(f'{path}: chat_template is {shown(found)}; a list of them has a "name" and a "template" each')
    found = {entry["name"]: entry.get("template") for entry in found}
  if isinstance(found, dict):
    if "default" not in found:
      raise InputError(
        f"{path}: none of its chat templates ({', '.join(found)}) is the default; "
        "write the one that you mean to chat_template.jinja beside it"
      )
    found = found["default"]
  if not isinstance(found, str):
    raise InputError(f"{path}: its chat_template is {shown(found)}; it must be a string")
  return found


def _text(token: Any) -> str:
  """The text of a token that is written as text, or as an object with flags; "" if it is neither."""
  text = token.get("content") if isinstance(token, dict) else token
  return text if isinstance(text, str) else ""


def _json(path: epath.Path) -> dict[str, Any]:
  """The object in a JSON file; empty where there is no file."""
  return hub.read_json(path) if path.exists() else {}


def read_text(path: epath.Path) -> str:
  """A file's text.

  Raises:
    InputError: it can not be read, or as `hub.read_text`.
  """
  if not path.exists():
    raise InputError(f"{path}: the tokenizer cannot be read (no such file); give a tokenizer.json, or its folder")
  return hub.read_text(path)
