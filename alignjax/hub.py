"""Where models of Hugging Face's lie: a folder, on a disk or in a bucket, or a name on the hub."""

import functools
import json
import re

from etils import epath

from alignjax.errors import InputError

CONFIG = "config.json"
REMOTE = "hf://"


def is_folder(path: epath.PathLike) -> bool:
  """Whether a path names Hugging Face weights: hf://org/name, or a folder whose config.json is a model's."""
  if str(path).startswith(REMOTE):
    return True
  if not str(path):
    return False  # and not the folder that the process runs in
  config = epath.Path(path).expanduser() / CONFIG
  try:
    return "model_type" in json.loads(config.read_text())
  except (OSError, ValueError):
    return False


def hint(path: str) -> str:
  """A part of a message on a path that is not there: how a name on the hub is written; "" where it cannot be one."""
  is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path)
  if not is_name or epath.Path(path).parent.exists() or path.endswith((".json", ".model", ".jsonl")):
    return ""
  return f"if it is a model of the hub, write {REMOTE}{path}; "


@functools.cache
def local(path: str) -> epath.Path:
  """The folder of weights that a path names; what hf:// names is fetched, once, into the cache of huggingface_hub.

  Raises:
    InputError: huggingface_hub is not installed, or has no such model, or no way to it.
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
