"""The places of Hugging Face models: a folder, on a disk or in a bucket, or a name on the hub; and their small files,
which are read with care, because somebody else wrote them.
"""

import functools
import json
import os
import pathlib
import re
from typing import Any

from etils import epath

from alignjax.errors import InputError
from alignjax.system import reading

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
REMOTE = "hf://"
LARGEST = 200_000_000  # bytes of a file that is read as text: published tokenizers take up to 40 million
_SHOWN = 60  # characters of a value in a message


def is_folder(path: epath.PathLike) -> bool:
  """True if a path names Hugging Face weights: hf://org/name, or a folder with a model's config.json or weights.

  A folder of weights with a damaged config.json counts too, so that reading it reports the damage.
  """
  if str(path).startswith(REMOTE):
    return True
  if not str(path):
    return False  # "" would mean the current folder
  folder = epath.Path(path).expanduser()
  try:
    if "model_type" in read_json(folder / CONFIG):
      return True
  except InputError:
    pass
  try:
    return any((folder / name).exists() for name in (WEIGHTS, INDEX))
  except OSError:
    return False


def hint(path: str) -> str:
  """A part of the message about a path that does not exist: how to write a name on the hub; "" if it cannot be one."""
  is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path)
  if not is_name or epath.Path(path).parent.exists() or path.endswith((".json", ".model", ".jsonl")):
    return ""
  return f"if it is a model of the hub, write {REMOTE}{path}; "


@functools.cache
def local(path: str) -> epath.Path:
  """Returns the folder of weights that a path names; a name on the hub is fetched once, to huggingface_hub's cache.

  Raises:
    InputError: huggingface_hub is not installed, does not know the model, or cannot reach it.
  """
  if not path.startswith(REMOTE):
    return epath.Path(path).expanduser()
  try:
    import huggingface_hub  # optional
  except ImportError as error:
    raise InputError(f"{path} needs huggingface_hub; pip install huggingface_hub, or name a folder") from error
  name, _, revision = path.removeprefix(REMOTE).partition("@")
  wanted = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model"]
  try:
    return epath.Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=wanted))
  except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
    reason = " ".join(str(error).split())[:200]
    raise InputError(f"{path}: cannot be fetched ({reason}); check the name and the network, or log in") from error


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads the object in a JSON file of a model's folder.

  Raises:
    InputError: as in `read_text`; or it is no JSON, is nested too deeply, or is no object.
  """
  text = read_text(path)
  try:
    value = json.loads(text)
  except RecursionError as error:
    raise InputError(f"{path}: its JSON is nested too deeply; fetch it again") from error
  except ValueError as error:
    raise InputError(f"{path}: no JSON ({error}); fetch it again") from error
  if not isinstance(value, dict):
    raise InputError(f"{path}: holds a {type(value).__name__}, where an object should be; fetch it again")
  return value


def read_text(path: epath.Path) -> str:
  """Reads the text of a file of a model's folder.

  Raises:
    InputError: it cannot be read, is longer than `LARGEST`, or is a link to a place outside of its folder.
  """
  return _read(path, lambda: reading.read_text(path))


def read_bytes(path: epath.Path) -> bytes:
  """Reads the bytes of a file of a model's folder; errors as in `read_text`."""
  return _read(path, lambda: reading.read_bytes(path))


def _read(path, read):
  check_link(path)
  try:
    size = path.stat().length
    if size > LARGEST:
      raise InputError(f"{path}: holds {size} bytes, more than the {LARGEST} of any such file; fetch it again")
    return read()
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error}); fetch it again") from error


def check_link(path: epath.Path) -> None:
  """Raises InputError if a file is a link to a place outside of its folder.

  So a model of somebody else cannot make us read, or `export` copy, other files. In the hub's cache the files of
  `snapshots/REVISION` are links to `blobs` next to it; these are allowed.
  """
  name = os.fspath(path)
  if not os.path.islink(name):
    return
  folder = pathlib.Path(os.path.realpath(os.path.dirname(name) or "."))
  target = pathlib.Path(os.path.realpath(name))
  homes = [folder, *(above.parent / "blobs" for above in folder.parents if above.name == "snapshots")]
  if not any(target.is_relative_to(home) for home in homes):
    raise InputError(f"{path}: is a link to {target}, outside of its folder; put a copy there")


def shown(value: Any) -> str:
  """Shows a value of a file in a message: short, in one line."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):  # an integer of thousands of digits, or a deeply nested value
    return f"a {type(value).__name__}"
  if len(text) > _SHOWN:
    return f"{text[: _SHOWN - 3]}..."
  return text


def called(name: str) -> str:
  """Shows a name of a file in a message: unchanged if it is short and in one line."""
  if name.isprintable() and len(name) <= 2 * _SHOWN:
    return name
  return shown(name)
