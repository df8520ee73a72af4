"""A tokenizer as Hugging Face stores it: tokenizer.json, and beside it the template and the special tokens' names.

Both generations: transformers 4 writes a special token as an object or a text and the template into
tokenizer_config.json, transformers 5 writes texts and chat_template.jinja.
"""

from typing import Any, NamedTuple

from etils import epath

from alignjax.data import strict_json
from alignjax.data.strict_json import described
from alignjax.errors import InputError

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
    if isinstance(more, dict):  # {"image_token": ...}: transformers 5 names them
      named |= {name: _text(value) for name, value in more.items()}
    special += [_text(value) for value in (more.values() if isinstance(more, dict) else more)]
  added = {int(number): entry for number, entry in (config.get("added_tokens_decoder") or {}).items()}
  return Folder(read_text(path), _template(path.parent, config), named, special, added, generation)


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
    entries = [entry for entry in found if isinstance(entry, dict)]
    found = {entry.get("name"): entry.get("template") for entry in entries}
  if isinstance(found, dict):
    if "default" not in found:
      raise InputError(
        f"{path}: none of its chat templates ({', '.join(map(str, found))}) is the default; "
        "write the one that you mean to chat_template.jinja beside it"
      )
    found = found["default"]
  if not isinstance(found, str):
    raise InputError(f"{path}: its chat_template is {described(found)}; it must be a string")
  return found


def _text(token: Any) -> str:
  """The text of a token that is written as text, or as an object with flags; "" if it is neither."""
  text = token.get("content") if isinstance(token, dict) else token
  return text if isinstance(text, str) else ""


def _json(path: epath.Path) -> dict[str, Any]:
  """The object in a JSON file; empty where there is no file."""
  if not path.exists():
    return {}
  try:
    value = strict_json.loads(read_text(path))
  except strict_json.MalformedError as error:
    raise InputError(f"{path}: no JSON: {error}; fetch it again") from error
  if not isinstance(value, dict):
    raise InputError(f"{path}: holds a {type(value).__name__}, where an object should be; fetch it again")
  return value


def read_text(path: epath.Path) -> str:
  """A file's text.

  Raises:
    InputError: it can not be read.
  """
  try:
    return path.read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path}: the tokenizer cannot be read ({error}); give a tokenizer.json, or its folder") from error
