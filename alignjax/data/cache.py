"""What is made once from a user's data and kept: one folder per key, complete or absent.

A folder has a list of its files with sizes and checksums. One that is not as listed (a power cut, a failing disk) is
made anew. The checksum of a copy of the records is not looked at: each record has its own (`source.py`).

Data may lie on a read-only disk, so nothing is ever written beside it. The folders live under the
`cache` argument, else `$ALIGNJAX_CACHE`, else `~/.cache/alignjax`; any of them may be deleted at
any time and is made again.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from alignjax.errors import InputError
from alignjax.system import output, reading

_LIST = "files.json"


def directory(cache: str = "") -> Path:
  """The cache directory, absolute."""
  home = cache or os.environ.get("ALIGNJAX_CACHE") or "~/.cache/alignjax"
  return Path(home).expanduser().absolute()


def digest(*parts: str | int | float | Sequence) -> str:
  """Hex sha256 of a tuple of plain values."""
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def folder(cache: str, key: str, make: Callable[[Path], None]) -> Path:
  """The folder kept under `key` (hex); on first use `make(folder)` fills it, all or nothing.

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
      output.sync_tree(unfinished)
      if path.is_dir() and not _is_whole(path):
        shutil.rmtree(path, ignore_errors=True)
      try:
        unfinished.rename(path)
      except OSError:
        if not path.is_dir():  # else another process was first, with the same content
          raise
      output.sync_folder(path.parent)
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
    if error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):  # NumPy's own has no number
      raise _unwritable(folder.parent, error) from error
    raise


def _is_whole(folder: Path) -> bool:
  """Whether a folder's files are as listed."""
  try:
    record = json.loads(reading.read_text(folder / _LIST))
    return all(
      (folder / name).stat().st_size == size and checksum == _checksum(folder / name)
      for name, (size, checksum) in record.items()
    )
  except (OSError, ValueError, TypeError, AttributeError):
    return False


def _checksum(path: Path) -> int:
  return zlib.crc32(path.read_bytes()) if path.suffix in (".npy", ".json") else 0


def _unwritable(place: Path, error: OSError) -> InputError:
  return InputError(
    f"{place}: the data cache cannot be written ({error.strerror or error}); "
    "set ALIGNJAX_CACHE or data.cache to a folder that can"
  )
