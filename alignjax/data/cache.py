"""What is made once from a user's data and kept: one folder per key, complete or absent.

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
from collections.abc import Callable, Sequence
from pathlib import Path

from alignjax import output
from alignjax.errors import InputError


def directory(cache: str = "") -> Path:
  """The cache directory, absolute."""
  home = cache or os.environ.get("ALIGNJAX_CACHE") or "~/.cache/alignjax"
  return Path(home).expanduser().absolute()


def digest(*parts: str | int | float | Sequence) -> str:
  """Hex sha256 of a tuple of plain values."""
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def folder(cache: str, key: str, make: Callable[[Path], None]) -> Path:
  """The folder kept under `key` (hex); on first use `make(folder)` fills it, all or nothing."""
  path = directory(cache) / key[:32]
  if path.is_dir():
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}."))
  except OSError as error:
    raise InputError(
      f"{path.parent}: the data cache cannot be written ({error.strerror}); "
      "set ALIGNJAX_CACHE or data.cache to a folder that can"
    ) from error
  try:
    try:
      make(unfinished)
    except OSError as error:
      if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # of the cache, not of the data
        raise
      raise InputError(
        f"{path.parent}: the data cache cannot be written ({error.strerror}); free some space, or set "
        "ALIGNJAX_CACHE or data.cache to a folder that can"
      ) from error
    with output.failing(unfinished):
      output.sync_tree(unfinished)
      try:
        unfinished.rename(path)
      except OSError:
        if not path.is_dir():  # else another process was first, with the same content
          raise
      output.sync_folder(path.parent)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
  return path
