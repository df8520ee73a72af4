"""Folders on disk: makes, removes, tries and syncs them, so that their content survives a power cut."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator

from etils import epath


def sync_tree(path: epath.PathLike) -> None:
  """Syncs a folder with all its content to disk."""
  for where, _, names in os.walk(path, topdown=False):
    for name in names:
      _sync(os.path.join(where, name), os.O_RDONLY)
    sync_folder(where)


def sync_folder(path: epath.PathLike) -> None:
  """Syncs the names in a folder to disk."""
  _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def nearest(path: str) -> str:
  """Returns the path itself, or the nearest folder above it that exists."""
  while True:
    try:
      os.lstat(path)
      return path
    except FileNotFoundError:
      path = os.path.dirname(path)


def make_folders(path: str) -> list[str]:
  """Makes a folder and those above it; returns those that did not exist, from the top.

  Raises:
    OSError: one of them cannot be made; then none stays.
  """
  existing = nearest(path)
  if not os.path.isdir(existing):
    raise OSError(errno.ENOTDIR, "")
  missing = []
  while path != existing:
    missing.append(path)
    path = os.path.dirname(path)
  made: list[str] = []
  try:
    for folder in reversed(missing):
      with contextlib.suppress(FileExistsError), making(folder):  # another process may be first
        os.mkdir(folder)
        made.append(folder)
  except OSError:
    remove_empty(made)
    raise
  return made


@contextlib.contextmanager
def making(path: str) -> Iterator[None]:
  """Corrects the error of making `path` in a kernel's own folder, such as /proc: "permission denied", not "missing"."""
  try:
    yield
  except FileNotFoundError as error:
    if os.path.isdir(os.path.dirname(path)):
      raise PermissionError(errno.EACCES, "") from error
    raise FileNotFoundError(errno.ENOENT, "") from error


def remove_empty(made: list[str]) -> None:
  """Removes folders that `make_folders` made, from the bottom, up to one that is not empty."""
  with contextlib.suppress(OSError):
    for folder in reversed(made):
      os.rmdir(folder)


def try_folder(path: str) -> None:
  """Tries a folder: writes a block into it and removes it; OSError if that fails."""
  fd, name = tempfile.mkstemp(dir=path, prefix=".alignjax-")
  try:
    os.write(fd, bytes(4096))
    os.fsync(fd)
  finally:
    os.close(fd)
    os.unlink(name)


def _sync(path: epath.PathLike, flags: int) -> None:
  fd = os.open(path, flags)
  try:
    os.fsync(fd)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # the file system does not support it
      raise
  finally:
    os.close(fd)
