"""The cache of what is computed once from a user's data: one folder per key, complete or absent.

A folder has a list of its files with sizes and checksums. If a folder differs from its list (a power cut, a failing
disk), it is made anew. The checksum of a copy of the records is not compared: each record has its own (`source.py`).

Data may be on a read-only disk, so nothing is ever written next to it. The folders are in the directory of the
`cache` argument, or of `$ALIGNJAX_CACHE`, or in `~/.cache/alignjax`. Any of them may be deleted at
any time, and is made again.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from alignjax.errors import InputError
from alignjax.system import disk, output, reading

_LIST = "files.json"


def directory(cache: str = "") -> Path:
  """Returns the cache directory as an absolute path."""
  home = cache or os.environ.get("ALIGNJAX_CACHE") or "~/.cache/alignjax"
  return Path(home).expanduser().absolute()


def digest(*parts: str | int | float | Sequence | Mapping) -> str:
  """Returns the hex sha256 of a tuple of plain values."""
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def folder(cache: str, key: str, make: Callable[[Path], None]) -> Path:
  """Returns the folder of a `key` (hex); on first use `make(folder)` fills it, completely or not at all.

  Raises:
    InputError: the cache cannot be written.
  """
  path = directory(cache) / key[:32]
  if path.is_dir() and _is_whole(path):
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}."))
  except OSError as error:
    raise _unwritable(path.parent, error) from error
  try:
    _fill(unfinished, make)
    with output.failing(unfinished):
      disk.sync_tree(unfinished)
      if path.is_dir() and not _is_whole(path):
        shutil.rmtree(path, ignore_errors=True)
      try:
        unfinished.rename(path)
      except OSError:
        if not path.is_dir():  # otherwise another process was first, with the same content
          raise
      disk.sync_folder(path.parent)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
  return path


def _fill(folder: Path, make: Callable[[Path], None]) -> None:
  """Makes a folder's files and their list."""
  try:
    make(folder)
    record = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(folder.iterdir())}
    output.write(folder / _LIST, json.dumps(record))
  except OSError as error:
    if error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):  # an OSError of NumPy has no number
      raise _unwritable(folder.parent, error) from error
    raise


def _is_whole(folder: Path) -> bool:
  """True if a folder's files are as listed."""
  try:
    record = json.loads(reading.read_text(folder / _LIST))
    return all(
      (folder / name).stat().st_size == size and checksum == _checksum(folder / name)
      for name, (size, checksum) in record.items()
    )
  except (OSError, ValueError, TypeError, AttributeError):
    return False


def _checksum(path: Path) -> int:
  """Returns the crc32 of an array or JSON file; 0 for others."""
  if path.suffix in (".npy", ".json"):
    return zlib.crc32(path.read_bytes())
  return 0


def _unwritable(place: Path, error: OSError) -> InputError:
  return InputError(
    f"{place}: the data cache cannot be written ({error.strerror or error}); "
    "set ALIGNJAX_CACHE or data.cache to a folder that can"
  )
