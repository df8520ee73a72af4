"""A tokenizer as Hugging Face stores it: tokenizer.json, and beside it the template and the special tokens' names.

Both generations are read. Transformers 4 writes a special token as an object or a text, and the template into
tokenizer_config.json. Transformers 5 writes texts and chat_template.jinja.
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
  """The content of a tokenizer's folder.

  Attributes:
    tokenizer: the text of tokenizer.json.
    template: the chat template.
    named: the texts of special tokens by name, as in {"bos_token": "<s>"}.
    special: the texts of more special tokens.
    added: the flags of added tokens by id, if tokenizer_config.json has them.
    generation: the content of generation_config.json: bos_token_id and such.
  """

  tokenizer: str
  template: str
  named: dict[str, str]
  special: list[str]
  added: dict[int, dict[str, Any]]
  generation: dict[str, Any]


def read_folder(path: epath.Path) -> Folder:
  """Reads a tokenizer.json, and those of its companion files that exist.

  Raises:
    InputError: a file cannot be read or is no JSON, or there is no chat template.
  """
  config, names, generation = (_json(path.parent / part) for part in PARTS)
  both = names | config
  named = {key: _text(value) for key, value in both.items() if key.endswith("_token") and _text(value)}
  special: list[str] = []
  for key in ("additional_special_tokens", "extra_special_tokens"):
    more = both.get(key) or []
    if isinstance(more, dict):  # {"image_token": ...}: transformers 5 names them
      named |= {name: _text(value) for name, value in more.items()}
      more = list(more.values())
    if not isinstance(more, list):
      part = PARTS[0] if key in config else PARTS[1]
      raise InputError(f"{path.parent / part}: {key} is {shown(more)}; it must be a list or an object of tokens")
    special += map(_text, more)
  added = _added(config, f"{path.parent / PARTS[0]}")
  _check_ids(generation, f"{path.parent / PARTS[2]}")
  return Folder(read_text(path), _template(path.parent, config), named, special, added, generation)


def _added(config: dict[str, Any], where: str) -> dict[int, dict[str, Any]]:
  """Returns the flags of added tokens by id, as tokenizer_config.json at `where` has them."""
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
  """Raises InputError if a value of generation_config.json is no id; -1 says that there is no such token."""
  for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
    value = generation.get(name)
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
      is_id = isinstance(number, int) and not isinstance(number, bool) and -1 <= number <= LARGEST_ID
      if number is not None and not is_id:
        raise InputError(f"{where}: {name} is {shown(value)}; it must be an id or a list of them")


def _template(folder: epath.Path, config: dict[str, Any]) -> str:
  """Returns the chat template: of the .jinja file, or of tokenizer_config.json, or of chat_template.json.

  If one of them has several templates, the default one counts.
  """
  file = folder / "chat_template.jinja"
  if file.exists():
    return read_text(file)
  separate = "chat_template.json"  # of models that take more than text; their other files may have no template
  for part, source in ((PARTS[0], config), (separate, _json(folder / separate))):
    if template := source.get("chat_template"):
      return _default(folder / part, template)
  others = ""
  if names := [path.name for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))]:
    others = f" but {', '.join(names)} in additional_chat_templates"
  raise InputError(
    f"{folder}: there is no chat template{others}; write one to chat_template.jinja beside tokenizer.json "
    "(a base model has none: take that of its instruction-tuned sibling)"
  )


def _default(path: epath.Path, value: Any) -> str:
  """Returns the only template of a file, or the default of several; `value` is its "chat_template"."""
  if isinstance(value, list):
    if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in value):
      raise InputError(f'{path}: chat_template is {shown(value)}; a list of them has a "name" and a "template" each')
    value = {entry["name"]: entry.get("template") for entry in value}
  if isinstance(value, dict):
    if "default" not in value:
      raise InputError(
        f"{path}: none of its chat templates ({', '.join(value)}) is the default; "
        "write the one that you mean to chat_template.jinja beside it"
      )
    value = value["default"]
  if not isinstance(value, str):
    raise InputError(f"{path}: its chat_template is {shown(value)}; it must be a string")
  return value


def _text(token: Any) -> str:
  """Returns the text of a token that is written as text, or as an object with flags; "" if it is neither."""
  if isinstance(token, dict):
    token = token.get("content")
  if isinstance(token, str):
    return token
  return ""


def _json(path: epath.Path) -> dict[str, Any]:
  """Reads the object in a JSON file; {} if there is no file."""
  if path.exists():
    return hub.read_json(path)
  return {}


def read_text(path: epath.Path) -> str:
  """Reads a file of the tokenizer as text.

  Raises:
    InputError: it does not exist, or cannot be read (see `hub.read_text`).
  """
  if not path.exists():
    raise InputError(f"{path}: the tokenizer cannot be read (no such file); give a tokenizer.json, or its folder")
  return hub.read_text(path)
