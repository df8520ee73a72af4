"""The files of records that a path names: a file, a glob, several of them, a folder that `datasets` saved."""

import difflib
import glob
import json
import os
import re
from collections.abc import Sequence

from alignjax.errors import InputError
from alignjax.system import reading

FORMATS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".arrow", ".arrayrecord")
_SHARD = re.compile(r"-\d{5}-of-\d{5}.*?(?=\.)")  # part of the names of one split's files
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_MOST = 4  # names listed in a message
_WALKED = 10_000  # files of a folder that are searched for a message


def expand(path: str | os.PathLike | Sequence) -> list[str]:
  """Returns the files that a path names, in order; `~` is the home folder.

  Args:
    path: a file, a folder of `datasets.save_to_disk`, a glob, several of them with commas between, or a list of such.

  Raises:
    InputError: there is none; the message suggests others.
  """
  if not isinstance(path, str | os.PathLike):
    if not isinstance(path, Sequence) or isinstance(path, bytes):
      raise InputError(f"data files: {path!r:.60} is no path; give a path, or a list of paths")
    return [name for part in path for name in expand(part)]
  path = os.path.expanduser(os.fspath(path))
  if os.path.isfile(path):
    return [path]
  if os.path.isdir(path):
    return _saved(path)
  if "," in path:
    return [name for part in path.split(",") if part.strip() for name in expand(part.strip())]
  if "://" in path:
    raise InputError(f"{path}: {_remote(path)}")
  names = sorted(glob.glob(path, recursive=True))
  files = [name for name in names if not os.path.isdir(name)]
  for name in names or [path]:
    if not os.path.exists(name):  # a pattern that matched nothing, or a link to nothing
      raise InputError(f"{name or 'data'}: no such file; {_nearest(name)}")
    if not os.path.isfile(name) and not os.path.isdir(name):
      raise InputError(f"{name}: is a pipe or a device, which is read once; write the records to a file")
  return files or [name for folder in names for name in _saved(folder)]


def formats() -> str:
  """The endings of files of records, for messages."""
  return ", ".join(FORMATS)


def _saved(folder: str) -> list[str]:
  """Returns the Arrow files of a folder that `datasets.save_to_disk` wrote.

  Raises:
    InputError: it is another folder, or has several splits.
  """
  state = _json(os.path.join(folder, "state.json"))
  files = state.get("_data_files")
  if isinstance(files, list) and files and all(isinstance(file, dict) and "filename" in file for file in files):
    if state.get("_indices_data_files"):
      raise InputError(f"{folder}: is a data set with an index of its own; save it again with a newer `datasets`")
    return [os.path.join(folder, str(file["filename"])) for file in files]
  splits = _json(os.path.join(folder, "dataset_dict.json")).get("splits")
  if isinstance(splits, list) and splits:
    named = ", ".join(os.path.join(folder, str(split)) for split in splits[:_MOST])
    raise InputError(f"{folder}: is a data set of several splits; name one: {named}")
  raise InputError(f"{folder}: is a folder{_inside(folder)}")


def _inside(folder: str) -> str:
  """The end of the message about a folder: its data files, which are to be named instead."""
  if files := _data_files(folder):
    return f"; name its files: {_listed(_patterns(files))}"
  content = "it is empty"
  if names := sorted(os.listdir(folder)):
    content = f"it holds {_listed(names)}"
  return f" without data ({content}); give a path or a glob of {formats()} files"


def _data_files(folder: str) -> list[str]:
  """Finds data files in a folder by their endings; .json files, which may be settings, only if there are no others."""
  names = []
  for parent, folders, files in os.walk(folder):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    names += [os.path.join(parent, name) for name in sorted(files) if name.endswith(FORMATS)]
    if len(names) > _WALKED:
      break
  return [name for name in names if not name.endswith(".json")] or names


def _patterns(names: Sequence[str]) -> list[str]:
  """Returns globs or names that match all of these files; one glob matches the files of a split."""
  patterns = list(dict.fromkeys(_SHARD.sub("-*", name) for name in names))
  if len(patterns) <= _MOST:
    return patterns
  return list(dict.fromkeys(f"{os.path.dirname(name)}/*{_suffix(name)}" for name in names))


def _suffix(name: str) -> str:
  return max((suffix for suffix in FORMATS if name.endswith(suffix)), key=len)


def _listed(names: Sequence[str]) -> str:
  """Lists the first names for a message."""
  text = ", ".join(names[:_MOST])
  if len(names) > _MOST:
    text += f" and {len(names) - _MOST} more"
  return text


def _remote(path: str) -> str:
  """The end of the message about an address: how to get the data onto this machine."""
  scheme, _, rest = path.partition("://")
  if scheme == "hf":
    name = "/".join(rest.removeprefix("datasets/").split("/")[:2])
    folder = name.rpartition("/")[2]
    return (
      f"data is not fetched from the hub; run `hf download --repo-type dataset {name} --local-dir {folder}` and name "
      f"the files in it, for example '{folder}/**/*.parquet'"
    )
  if scheme in ("http", "https"):
    return "data is not fetched; download it (`curl -LO`) and name the file"
  return f"data is not read from {scheme}://; copy it to a disk and name the file"


def _nearest(path: str) -> str:
  """The end of the message about a file that does not exist: what could be meant."""
  if os.path.islink(path):
    return f"it is a link to {os.readlink(path)}, which does not exist; fetch that"
  folder = os.path.dirname(path) or "."
  if glob.has_magic(path):
    return f"the pattern matches nothing; give a path or a glob of {formats()} files"
  if os.path.isdir(folder):
    near = difflib.get_close_matches(os.path.basename(path), os.listdir(folder), n=1)
    if near:
      return f"the nearest is {os.path.join(os.path.dirname(path), near[0])}"
  elif _HUB_NAME.fullmatch(path) and not path.endswith(FORMATS):
    return f"if it is a data set of the hub: {_remote(f'hf://datasets/{path}')}"
  return f"give a path or a glob of {formats()} files"


def _json(path: str) -> dict:
  """Reads the object in a JSON file; {} if there is none."""
  try:
    value = json.loads(reading.read_text(path))
  except (OSError, ValueError, RecursionError):
    return {}
  if isinstance(value, dict):
    return value
  return {}
