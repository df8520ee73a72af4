"""Which files of records a path means: a file, a glob, several of them, a folder that `datasets` saved."""

import difflib
import glob
import json
import os
import re
from collections.abc import Sequence

from alignjax.errors import InputError
from alignjax.system import reading

FORMATS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".arrow", ".arrayrecord")
_SHARD = re.compile(r"-\d{5}-of-\d{5}.*?(?=\.)")  # of the files of one split
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_MOST = 4  # names in a message
_WALKED = 10_000  # files of a folder that are looked at for a message


def expand(path: str | os.PathLike | Sequence) -> list[str]:
  """The files that a path means, in order; `~` is the home folder.

  Args:
    path: a file, a folder of `datasets.save_to_disk`, a glob, several of them with commas between, or a list of such.

  Raises:
    InputError: there is none; the message names those that could be meant.
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
  """The Arrow files of a folder that `datasets.save_to_disk` wrote."""
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
  """The end of a message on a folder: what to name instead."""
  found = _data_files(folder)
  if found:
    return f"; name its files: {_listed(_patterns(found))}"
  others = sorted(os.listdir(folder))
  holds = f"it holds {_listed(others)}" if others else "it is empty"
  return f" without data ({holds}); give a path or a glob of {formats()} files"


def _data_files(folder: str) -> list[str]:
  """The files in a folder that end as data does; .json, as which settings are written too, where there is no other."""
  names = []
  for parent, folders, files in os.walk(folder):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    names += [os.path.join(parent, name) for name in sorted(files) if name.endswith(FORMATS)]
    if len(names) > _WALKED:
      break
  return [name for name in names if not name.endswith(".json")] or names


def _patterns(names: Sequence[str]) -> list[str]:
  """Globs, or names, that match all of these files, those of one split together."""
  patterns = list(dict.fromkeys(_SHARD.sub("-*", name) for name in names))
  if len(patterns) <= _MOST:
    return patterns
  return list(dict.fromkeys(f"{os.path.dirname(name)}/*{_suffix(name)}" for name in names))


def _suffix(name: str) -> str:
  return max((suffix for suffix in FORMATS if name.endswith(suffix)), key=len)


def _listed(names: Sequence[str]) -> str:
  more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
  return ", ".join(names[:_MOST]) + more


def _remote(path: str) -> str:
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
  """The end of a message on a file that is not there: what could be meant."""
  if os.path.islink(path):
    return f"it is a link to {os.readlink(path)}, which is not there; fetch that"
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
  try:
    value = json.loads(reading.read_text(path))
  except (OSError, ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}
