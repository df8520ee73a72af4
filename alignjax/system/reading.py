"""Reads ordinary files alone: a pipe could block, and a device could be read without end."""

import os
import stat

from etils import epath

from alignjax.errors import InputError


def check(path: epath.PathLike) -> None:
  """Checks a path before another library opens it; an object of a store counts as a file.

  Raises:
    InputError: it is no file.
    OSError: it does not exist.
  """
  if "://" in os.fspath(path):
    return
  mode = os.stat(path).st_mode
  if stat.S_ISDIR(mode):
    raise InputError(f"{path}: is a folder; name a file")
  if not stat.S_ISREG(mode):
    raise InputError(f"{path}: is a pipe or a device, which is read once; name a file")


def read_bytes(path: epath.PathLike) -> bytes:
  """Reads the bytes of a file; errors as in `check`."""
  check(path)
  return epath.Path(path).read_bytes()


def read_text(path: epath.PathLike) -> str:
  """Reads the text of a file, in UTF-8.

  Raises:
    InputError: it is no UTF-8 text, or no file.
    OSError: it cannot be read.
  """
  check(path)
  try:
    return epath.Path(path).read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise InputError(f"{path}: cannot be read (byte {error.start} is not UTF-8); bring it back from a copy") from error
