"""Writes every output under a temporary name, syncs it to disk, then renames it: a kill leaves the old or the new one.

An output that cannot be written is an InputError of one line, and no part of it stays. On an object store (gs://) an
object is always whole or absent, so there is no sync, a folder is filled in place, and there are no locks.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator
from typing import Any

from etils import epath

from alignjax.errors import InputError, refusal
from alignjax.system import disk, holding, reading

PARTIAL = ".partial"  # ending of outputs that are not complete
LOCK = ".lock"  # file in a folder in which a process works
_guard = threading.Lock()
_held: dict[str, tuple[int, int]] = {}  # folders that this process has locked: (thread, how often)


def write(path: epath.PathLike, content: str | bytes, option: str = "", parents: bool = True) -> epath.Path:
  """Writes a file completely or not at all, and returns its path.

  Args:
    path: the file; a symbolic link is followed.
    content: text is written as UTF-8.
    option: the flag that named the path, for the error.
    parents: True to make missing folders.

  Raises:
    InputError: it cannot be written.
  """
  with file(path, option, parents) as out:
    out.write(content)
  return epath.Path(path).expanduser()


@contextlib.contextmanager
def file(path: epath.PathLike, option: str = "", parents: bool = True) -> Iterator["File"]:
  """Opens a file under a temporary name, held by this process alone; at the end, without an error, it becomes `path`.

  Enter it before the work, so that no work begins if its output cannot be written.

  Raises:
    InputError: it cannot be written, or another process is writing it.
  """
  out = File(path, option, parents)
  try:
    yield out
    out.commit()
  except BaseException:
    out.abort()
    raise


class File:
  """The open file of the context `file`."""

  def __init__(self, path: epath.PathLike, option: str = "", parents: bool = True):
    self._given = _path(path, option)
    self._option = option
    self._begun = False
    self._made = []
    self._open = False  # the local file
    self._remote = None
    if not local(self._given):
      self._remote = beside(self._given)
    with failing(self._given, option):
      if self._remote is not None:
        self._file = self._remote.open("wb")
        return
      self._path = _target(self._given, option)
      if parents:
        self._made = disk.make_folders(os.path.dirname(self._path))
      try:
        self._fd = holding.take(f"{self._path}{PARTIAL}", "writes", _named(self._given, option))
        self._open = True
      except BaseException:
        disk.remove_empty(self._made)
        raise
    self._file = open(self._fd, "wb", buffering=1 << 20, closefd=False)  # noqa: SIM115
    _point("open", self._path)

  def write(self, content: str | bytes | memoryview) -> None:
    """Appends text, as UTF-8, or bytes."""
    data = self._encoded(content) if isinstance(content, str) else content
    with failing(self._given, self._option):
      self._begin()
      self._file.write(data)
      if self._remote is None:
        _point("write", self._path)

  def _encoded(self, text: str) -> bytes:
    try:
      return text.encode()
    except UnicodeEncodeError as error:
      half = text[error.start].encode("ascii", "backslashreplace").decode()
      named = _named(self._given, self._option)
      raise InputError(f"{named}: its text has {half}, half of a character; correct the record it is of") from error

  def commit(self) -> None:
    """Syncs the content to disk, then renames the file to its path."""
    with failing(self._given, self._option):
      self._begin()
      if self._remote is not None:
        self._file.close()
        self._remote.replace(self._given)
        return
      self._file.flush()
      with contextlib.suppress(OSError):  # there is no old file, or the file system has no modes
        os.fchmod(self._fd, stat.S_IMODE(os.stat(self._path).st_mode))
      os.fsync(self._fd)
      _point("sync", self._path)
      os.replace(f"{self._path}{PARTIAL}", self._path)
      _point("rename", self._path)
      disk.sync_folder(os.path.dirname(self._path))
      self._close()

  def abort(self) -> None:
    """Removes the file."""
    if self._remote is not None:
      with contextlib.suppress(OSError):
        self._file.close()
        self._remote.unlink(missing_ok=True)
    elif self._open:
      with contextlib.suppress(OSError):
        holding.unlink_own(self._fd, f"{self._path}{PARTIAL}")
      self._close()
      disk.remove_empty(self._made)

  def _begin(self) -> None:
    """Removes the owner's record before the first write."""
    if not self._begun and self._remote is None:
      os.ftruncate(self._fd, 0)
      os.lseek(self._fd, 0, os.SEEK_SET)
    self._begun = True

  def _close(self) -> None:
    with contextlib.suppress(OSError):  # the disk is full
      self._file.close()
    os.close(self._fd)
    self._open = False


@contextlib.contextmanager
def folder(path: epath.PathLike, option: str = "") -> Iterator[epath.Path]:
  """Makes the empty folder `beside(path)`, held by this process; at the end, without an error, it becomes `path`.

  Args:
    path: a folder that does not exist, or is empty.
    option: the flag that named it, for the error.

  Raises:
    InputError: it cannot be written, is not empty, or another process is writing it.
  """
  given = _path(path, option)
  not_empty = InputError(f"{_named(given, option)}: is not empty; choose another {option or 'place'}")
  if not local(given):
    if given.exists() and any(given.iterdir()):
      raise not_empty
    given.mkdir(parents=True, exist_ok=True)
    yield given
    return
  with failing(given, option):
    whole = os.path.realpath(given)
    if os.path.ismount(whole):
      raise InputError(f"{_named(given, option)}: is the root of a file system; name a folder in it")
    partial = os.fspath(beside(given))
    if os.path.isfile(whole):
      raise InputError(f"{_named(given, option)}: is a file; choose another {option or 'place'}")
    if os.path.lexists(whole) and os.listdir(whole):
      raise not_empty
    made = disk.make_folders(os.path.dirname(whole))
    fd = None
    try:
      fd = _take_folder(partial, _named(given, option))
      disk.try_folder(partial)
    except BaseException:
      _drop_folder(fd, partial, made)
      raise
  _point("open", partial)
  try:
    yield epath.Path(partial)
    with failing(given, option):
      os.unlink(os.path.join(partial, LOCK))
      disk.sync_tree(partial)
      _point("sync", partial)
      os.rename(partial, whole)
      _point("rename", partial)
      disk.sync_folder(os.path.dirname(whole))
    os.close(fd)
  except BaseException:
    _drop_folder(fd, partial, made)
    raise


def beside(path: epath.PathLike) -> epath.Path:
  """Returns the temporary name of a file or folder, under which it is written."""
  path = epath.Path(path).expanduser()
  if local(path):
    path = epath.Path(os.path.realpath(path))
  return path.with_name(f"{path.name}{PARTIAL}")


def check_file(path: epath.PathLike, option: str = "", parents: bool = True) -> None:
  """Tries to write a file, and leaves nothing; InputError if it cannot be written."""
  File(path, option, parents).abort()


def check_folder(path: epath.PathLike, option: str = "") -> None:
  """Tries to write into a folder, which need not exist, and leaves nothing; InputError if it cannot be written."""
  given = _path(path, option)
  if not local(given):
    return
  with failing(given, option):
    whole = os.path.realpath(given)
    if os.path.exists(whole) and not os.path.isdir(whole):
      raise InputError(f"{_named(given, option)}: is a file; choose another {option or 'place'}")
    disk.try_folder(disk.nearest(whole))


@contextlib.contextmanager
def lock(path: epath.PathLike, doing: str, option: str = "") -> Iterator[None]:
  """Locks a folder against other processes; it is made if missing, and removed at the end if it is empty.

  The kernel's lock ends with the process, however that ends. The thread that holds the lock may take it again.

  Args:
    path: the folder.
    doing: what the process does in it, for the error of another process: "trains".
    option: the flag that named it, for the error.

  Raises:
    InputError: another process works in it, or the folder cannot be written.
  """
  given = _path(path, option)
  if not local(given):
    yield
    return
  with failing(given, option):
    real = os.path.realpath(given)
    if os.path.exists(real) and not os.path.isdir(real):
      raise InputError(f"{_named(given, option)}: is a file; choose another {option or 'place'}")
  this_thread = threading.get_ident()
  with _guard:
    thread, times = _held.get(real, (this_thread, 0))
    if thread != this_thread:
      raise InputError(f"{_named(given, option)}: another thread of this process {doing} here; wait for it")
    _held[real] = (this_thread, times + 1)
  try:
    if times:
      yield
    else:
      with _locked(given, real, doing, option):
        yield
  finally:
    with _guard:
      _held[real] = (this_thread, times)
      if not times:
        del _held[real]


@contextlib.contextmanager
def _locked(given: epath.Path, real: str, doing: str, option: str) -> Iterator[None]:
  path = os.path.join(real, LOCK)
  with failing(given, option):
    made = disk.make_folders(real)
    try:
      fd = holding.take(path, doing, _named(given, option), option)
    except BaseException:
      disk.remove_empty(made)
      raise
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      holding.unlink_own(fd, path)
    os.close(fd)
    disk.remove_empty(made)


def write_json(path: epath.PathLike, record: dict[str, Any], option: str = "") -> None:
  """Writes an object that `read_json` reads back, with its digest as the last entry, "sha256"."""
  write(path, json.dumps(record | {"sha256": _digest(record)}, indent=2) + "\n", option)


def read_json(path: epath.PathLike, remedy: str = "bring it back from a copy", alone: str = "") -> dict[str, Any]:
  """Reads an object that `write_json` wrote; an object without a digest, of an earlier version, is not checked.

  Args:
    path: the file.
    remedy: the end of the error.
    alone: the entry of the object that is a list; earlier versions wrote this list alone.

  Raises:
    DamagedError: the content is not what was written, or cannot be read.
  """
  path = epath.Path(path)

  def damaged(reason: str) -> DamagedError:
    return DamagedError(f"{path}: is damaged ({' '.join(reason.split())}); {remedy}")

  try:
    record = json.loads(reading.read_bytes(path).decode())
  except (OSError, ValueError, RecursionError) as error:
    raise damaged(str(error)) from error
  if alone and isinstance(record, list):
    record = {alone: record}
  if not isinstance(record, dict):
    raise damaged("not a JSON object")
  name, seal = next(reversed(record.items()), ("", None))
  if name == "sha256" or (isinstance(seal, str) and re.fullmatch("[0-9a-f]{64}", seal)):
    del record[name]
    if name != "sha256" or seal != _digest(record):
      raise damaged("it changed since it was written: sha256 differs; if you changed it, delete its entry sha256")
  return record


class DamagedError(InputError):
  """A file whose content is not what was written."""


def remove(path: epath.PathLike, at_once: bool = False) -> None:
  """Removes a file, a folder with all its content, or a symbolic link (not its target), if it exists.

  Args:
    path: what is removed.
    at_once: True: a kill leaves all of a folder under its name, or nothing; a rest under the temporary name is removed
      when the folder is made anew.
  """
  path = epath.Path(path).expanduser()
  with failing(path):
    if at_once and local(path) and os.path.isdir(path) and not os.path.islink(path):
      remove(beside(path))
      os.rename(path, beside(path))
      _point("rename", os.fspath(path))
      path = beside(path)
    if not local(path):
      if path.is_dir():
        (path / "config.json").unlink(missing_ok=True)  # first, so that the rest after a kill is not taken for a run
        path.rmtree()
      elif path.exists():
        path.unlink()
    elif os.path.isdir(path) and not os.path.islink(path):
      shutil.rmtree(path)
    elif os.path.lexists(path):
      os.unlink(path)


def copy_folder(source: epath.PathLike, path: epath.PathLike, option: str = "") -> None:
  """Copies a folder, without its lock, to a path that does not exist: completely, or not at all.

  On an object store its config.json comes last, so that an incomplete copy is not taken for a whole one.
  """
  with folder(path, option) as to, failing(path, option):
    names = sorted(child.name for child in epath.Path(source).iterdir())
    for name in sorted(names, key=lambda name: name == "config.json"):
      if name == LOCK:
        continue
      child = epath.Path(source) / name
      if child.is_dir():
        shutil.copytree(child, to / name)
      else:
        child.copy(to / name)
      _point("write", os.fspath(to / name))


def rename(path: epath.Path, to: epath.Path) -> None:
  """Renames a file or folder to a name that does not exist, and syncs that to disk."""
  with failing(to):
    path.rename(to)
    _point("rename", os.fspath(to))
    if local(to):
      disk.sync_folder(os.path.dirname(os.path.abspath(to)))


@contextlib.contextmanager
def failing(path: epath.PathLike, option: str = "") -> Iterator[None]:
  """Turns an error of the operating system into an InputError of one line about this output.

  Raises:
    InputError: in place of the error.
  """
  try:
    yield
  except InputError:
    raise
  except OSError as error:
    reason, remedy = refusal(error)
    raise InputError(f"{_named(path, option)}: cannot be written ({reason}); {remedy}") from error
  except ValueError as error:  # a name with a null byte, or without an encoding
    if not isinstance(error, UnicodeError) and "null byte" not in str(error):
      raise
    raise InputError(f"{_named(path, option)!r}: is no name of a file ({error}); choose another") from error


def local(path: epath.PathLike) -> bool:
  """True for a path of this machine's file systems, False for one of an object store."""
  return "://" not in os.fspath(path)


def _path(path: Any, option: str) -> epath.Path:
  """Returns the path of an output; "" is refused, because it would mean the current folder."""
  if not isinstance(path, str | os.PathLike) or not os.fspath(path):
    raise InputError(f"{option or 'path'}={path!r}: is no path; name a file or folder")
  return epath.Path(path).expanduser()


def _named(path: epath.PathLike, option: str) -> str:
  """The name of an output in an error: with the flag that named it."""
  if option:
    return f"{option}={os.fspath(path)}"
  return os.fspath(path)


def _digest(record: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _point(what: str, path: str) -> None:
  """Does nothing; tests replace it to act at moments between which a kill would leave different states."""


def _target(given: epath.Path, option: str) -> str:
  """Returns the file that a path names, with links resolved; raises an error if it is no file."""
  try:
    mode = os.stat(given).st_mode
  except FileNotFoundError:  # or a link to a file that does not exist
    return os.path.realpath(given)
  if stat.S_ISDIR(mode):
    raise OSError(errno.EISDIR, "")
  if not stat.S_ISREG(mode):
    raise InputError(f"{_named(given, option)}: is a device or a pipe; name a file")
  os.close(os.open(given, os.O_WRONLY | os.O_CLOEXEC))  # a file that may not be written may not be replaced
  return os.path.realpath(given)


def _take_folder(path: str, named: str) -> int:
  """Makes a folder that this process alone holds, empty except its owner's record; returns its descriptor.

  Raises:
    InputError: another process holds it.
  """
  while True:
    with contextlib.suppress(FileExistsError), disk.making(path):
      os.mkdir(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    owner = os.path.join(path, LOCK)
    try:
      if not holding.flock(fd):
        raise InputError(holding.refusal(_head(owner), "writes", named, ""))
      if holding.is_same(fd, path):
        break
    except BaseException:
      os.close(fd)
      raise
    os.close(fd)
  try:
    for name in sorted(os.listdir(path)):  # the rest of a killed process
      remove(os.path.join(path, name))
    with open(owner, "wb") as out:
      out.write(holding.owner_record("writes"))
  except BaseException:
    _drop_folder(fd, path, [])
    raise
  return fd


def _head(path: str) -> bytes:
  """The first bytes of a file; b"" if it does not exist."""
  if not os.path.exists(path):
    return b""
  with open(path, "rb") as opened:
    return opened.read(1000)


def _drop_folder(fd: int | None, path: str, made: list[str]) -> None:
  """Removes a folder that this process holds, and the folders that were made for it."""
  if fd is None:
    disk.remove_empty(made)
    return
  with contextlib.suppress(OSError):
    if holding.is_same(fd, path):
      shutil.rmtree(path, ignore_errors=True)
  os.close(fd)
  disk.remove_empty(made)
