"""Every output: written beside its place, put on disk, then renamed: a kill leaves the old one or the new one, whole.

What cannot be written is an InputError of one line, and nothing of it stays. On an object store (gs://) an object is
whole or absent by itself: there is no sync, a folder is filled in place, and there are no locks.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from alignjax.errors import InputError, refusal
from alignjax.system import reading

PARTIAL = ".partial"  # ending of what is not yet whole
LOCK = ".lock"  # in a folder that a process works in
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
_guard = threading.Lock()
_held: dict[str, tuple[int, int]] = {}  # folders that this process has locked: the thread, and how often


def write(path: epath.PathLike, content: str | bytes, option: str = "", parents: bool = True) -> epath.Path:
  """Writes a file whole or not at all, and returns its path.

  Args:
    path: of the file; a symbolic link is followed.
    content: text is written as UTF-8.
    option: the flag that named the path, for the error.
    parents: whether missing folders are made.

  Raises:
    InputError: it cannot be written.
  """
  with file(path, option, parents) as out:
    out.write(content)
  return epath.Path(path).expanduser()


@contextlib.contextmanager
def file(path: epath.PathLike, option: str = "", parents: bool = True) -> Iterator["File"]:
  """Within, a file beside `path`, held by this process alone; at the end, without an error, it takes that place.

  Enter it before the work, and the work is not begun where its output cannot be written.

  Raises:
    InputError: it cannot be written, or another process writes it now.
  """
  out = File(path, option, parents)
  try:
    yield out
    out.commit()
  except BaseException:
    out.abort()
    raise


class File:
  """What `file` gives."""

  def __init__(self, path: epath.PathLike, option: str = "", parents: bool = True):
    self._given, self._option, self._begun, self._made = _path(path, option), option, False, []
    self._remote = None if local(self._given) else beside(self._given)
    with failing(self._given, option):
      if self._remote is not None:
        self._file = self._remote.open("wb")
        return
      self._path = _target(self._given, option)
      if parents:
        self._made = _make_folders(os.path.dirname(self._path))
      try:
        self._fd = _take(f"{self._path}{PARTIAL}", "writes", _named(self._given, option))
      except BaseException:
        _remove_empty(self._made)
        raise
    self._file = open(self._fd, "wb", buffering=1 << 20, closefd=False)  # noqa: SIM115
    _point("open", self._path)

  def write(self, content: str | bytes) -> None:
    """Appends text, as UTF-8, or bytes."""
    try:
      data = content.encode() if isinstance(content, str) else content
    except UnicodeEncodeError as error:
      half = content[error.start].encode("ascii", "backslashreplace").decode()
      named = _named(self._given, self._option)
      raise InputError(f"{named}: its text has {half}, half of a character; correct the record it is of") from error
    with failing(self._given, self._option):
      self._begin()
      self._file.write(data)
      if self._remote is None:
        _point("write", self._path)

  def commit(self) -> None:
    """Puts the content on disk, then in its place."""
    with failing(self._given, self._option):
      self._begin()
      if self._remote is not None:
        self._file.close()
        self._remote.replace(self._given)
        return
      self._file.flush()
      with contextlib.suppress(OSError):  # there is none yet, or the file system has no modes
        os.fchmod(self._fd, stat.S_IMODE(os.stat(self._path).st_mode))
      os.fsync(self._fd)
      _point("sync", self._path)
      os.replace(f"{self._path}{PARTIAL}", self._path)
      _point("rename", self._path)
      sync_folder(os.path.dirname(self._path))
      self._close()

  def abort(self) -> None:
    """Leaves nothing."""
    if self._remote is not None:
      with contextlib.suppress(OSError):
        self._file.close()
        self._remote.unlink(missing_ok=True)
    elif self._fd is not None:
      with contextlib.suppress(OSError):
        _unlink_own(self._fd, f"{self._path}{PARTIAL}")
      self._close()
      _remove_empty(self._made)

  def _begin(self) -> None:
    """Removes the record of the owner, once."""
    if not self._begun and self._remote is None:
      os.ftruncate(self._fd, 0)
      os.lseek(self._fd, 0, os.SEEK_SET)
    self._begun = True

  def _close(self) -> None:
    with contextlib.suppress(OSError):  # what a full disk did not take
      self._file.close()
    os.close(self._fd)
    self._fd = None


@contextlib.contextmanager
def folder(path: epath.PathLike, option: str = "") -> Iterator[epath.Path]:
  """Within, the empty folder `beside(path)`, held by this process; at the end, without an error, it is `path`.

  Args:
    path: not there, or empty.
    option: the flag that named it.

  Raises:
    InputError: it cannot be written, something is in it, or another process writes it now.
  """
  given = _path(path, option)
  taken = InputError(f"{_named(given, option)}: is not empty; choose another {option or 'place'}")
  if not local(given):
    if given.exists() and any(given.iterdir()):
      raise taken
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
      raise taken
    made = _make_folders(os.path.dirname(whole))
    fd = None
    try:
      fd = _take_folder(partial, _named(given, option))
      _try(partial)
    except BaseException:
      _drop_folder(fd, partial, made)
      raise
  _point("open", partial)
  try:
    yield epath.Path(partial)
    with failing(given, option):
      os.unlink(os.path.join(partial, LOCK))
      sync_tree(partial)
      _point("sync", partial)
      os.rename(partial, whole)
      _point("rename", partial)
      sync_folder(os.path.dirname(whole))
    os.close(fd)
  except BaseException:
    _drop_folder(fd, partial, made)
    raise


def beside(path: epath.PathLike) -> epath.Path:
  """Where a file or folder is written before it takes its place."""
  path = epath.Path(path).expanduser()
  real = epath.Path(os.path.realpath(path)) if local(path) else path
  return real.with_name(f"{real.name}{PARTIAL}")


def check_file(path: epath.PathLike, option: str = "", parents: bool = True) -> None:
  """Tries to write a file there, and leaves nothing; InputError where it cannot be."""
  File(path, option, parents).abort()


def check_folder(path: epath.PathLike, option: str = "") -> None:
  """Tries to write into a folder, which need not be there yet, and leaves nothing; InputError where it cannot be."""
  given = _path(path, option)
  if not local(given):
    return
  with failing(given, option):
    whole = os.path.realpath(given)
    if os.path.exists(whole) and not os.path.isdir(whole):
      raise InputError(f"{_named(given, option)}: is a file; choose another {option or 'place'}")
    _try(_nearest(whole))


@contextlib.contextmanager
def lock(path: epath.PathLike, doing: str, option: str = "") -> Iterator[None]:
  """Within, no other process works in this folder; it is made if missing, and goes again if nothing came into it.

  The kernel's lock ends with the process, however that ends. The thread that holds it may take it again.

  Args:
    path: the folder.
    doing: what the process does there, for the refusal of another: "trains".
    option: the flag that named it.

  Raises:
    InputError: another process works there, or the folder cannot be written.
  """
  given = _path(path, option)
  if not local(given):
    yield
    return
  with failing(given, option):
    real, me = os.path.realpath(given), threading.get_ident()
    if os.path.exists(real) and not os.path.isdir(real):
      raise InputError(f"{_named(given, option)}: is a file; choose another {option or 'place'}")
  with _guard:
    thread, times = _held.get(real, (me, 0))
    if thread != me:
      raise InputError(f"{_named(given, option)}: another thread of this process {doing} here; wait for it")
    _held[real] = (me, times + 1)
  try:
    if times:
      yield
    else:
      with _locked(given, real, doing, option):
        yield
  finally:
    with _guard:
      _held[real] = (me, times)
      if not times:
        del _held[real]


@contextlib.contextmanager
def _locked(given: epath.Path, real: str, doing: str, option: str) -> Iterator[None]:
  path = os.path.join(real, LOCK)
  with failing(given, option):
    made = _make_folders(real)
    try:
      fd = _take(path, doing, _named(given, option), option)
    except BaseException:
      _remove_empty(made)
      raise
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      _unlink_own(fd, path)
    os.close(fd)
    _remove_empty(made)


def write_json(path: epath.PathLike, record: dict[str, Any], option: str = "") -> None:
  """Writes an object that is read back: with its digest, as its last entry "sha256"."""
  write(path, json.dumps(record | {"sha256": _digest(record)}, indent=2) + "\n", option)


def read_json(path: epath.PathLike, remedy: str = "bring it back from a copy", alone: str = "") -> dict[str, Any]:
  """The object that `write_json` wrote; one without a digest, of an earlier version, is taken as it is.

  Args:
    path: of the file.
    remedy: the end of the error.
    alone: the entry of the object that is a list, which earlier versions wrote alone.

  Raises:
    DamagedError: it is not what was written, or cannot be read.
  """
  path = epath.Path(path)
  damaged = lambda why: DamagedError(f"{path}: is damaged ({' '.join(why.split())}); {remedy}")
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
  """A file that is not what was written."""


def remove(path: epath.PathLike, at_once: bool = False) -> None:
  """Removes a file, a folder with all that is in it, or a symbolic link and not what it points to, if it is there.

  Args:
    path: of it.
    at_once: a kill leaves all of a folder under its name, or nothing; what is left beside it goes when it is made anew.
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
        (path / "config.json").unlink(missing_ok=True)  # first: what is left by a kill is known as no run
        path.rmtree()
      elif path.exists():
        path.unlink()
    elif os.path.isdir(path) and not os.path.islink(path):
      shutil.rmtree(path)
    elif os.path.lexists(path):
      os.unlink(path)


def copy_folder(source: epath.PathLike, path: epath.PathLike, option: str = "") -> None:
  """Copies a folder, but a process's hold on it, to a place where nothing is: whole, or not at all.

  On an object store its config.json comes last: without it, it is known as none.
  """
  with folder(path, option) as to, failing(path, option):
    names = sorted(child.name for child in epath.Path(source).iterdir())
    for name in sorted(names, key=lambda name: name == "config.json"):
      if name == LOCK:
        continue
      there = epath.Path(source) / name
      if there.is_dir():
        shutil.copytree(there, to / name)
      else:
        there.copy(to / name)
      _point("write", os.fspath(to / name))


def rename(path: epath.Path, to: epath.Path) -> None:
  """Renames a file or folder to a name that is free, and puts that on disk."""
  with failing(to):
    path.rename(to)
    _point("rename", os.fspath(to))
    if local(to):
      sync_folder(os.path.dirname(os.path.abspath(to)))


def sync_tree(path: epath.PathLike) -> None:
  """Puts a folder on disk, with all that is in it."""
  for where, _, names in os.walk(path, topdown=False):
    for name in names:
      _sync(os.path.join(where, name), os.O_RDONLY)
    sync_folder(where)


def sync_folder(path: epath.PathLike) -> None:
  """Puts the names in a folder on disk."""
  _sync(path, os.O_RDONLY | os.O_DIRECTORY)


@contextlib.contextmanager
def failing(path: epath.PathLike, option: str = "") -> Iterator[None]:
  """Makes an error of the operating system one line about this output.

  Raises:
    InputError: in its place.
  """
  try:
    yield
  except InputError:
    raise
  except OSError as error:
    reason, remedy = refusal(error)
    raise InputError(f"{_named(path, option)}: cannot be written ({reason}); {remedy}") from error
  except ValueError as error:  # a name with a null byte, or that has no encoding
    if not isinstance(error, UnicodeError) and "null byte" not in str(error):
      raise
    raise InputError(f"{_named(path, option)!r}: is no name of a file ({error}); choose another") from error


def local(path: epath.PathLike) -> bool:
  """Whether a path is of this machine's file systems, and not an object store's."""
  return "://" not in os.fspath(path)


def _path(path: Any, option: str) -> epath.Path:
  """The path of an output; "" would be the folder that the process runs in."""
  if not isinstance(path, str | os.PathLike) or not os.fspath(path):
    raise InputError(f"{option or 'path'}={path!r}: is no path; name a file or folder")
  return epath.Path(path).expanduser()


def _named(path: epath.PathLike, option: str) -> str:
  return f"{option}={os.fspath(path)}" if option else os.fspath(path)


def _digest(record: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _point(what: str, path: str) -> None:
  """A moment at which a kill would leave something else than before: tests put themselves here."""


def _target(given: epath.Path, option: str) -> str:
  """The file that a path means, behind links; an error where it is something else."""
  try:
    mode = os.stat(given).st_mode
  except FileNotFoundError:  # or a link to what is not there yet
    return os.path.realpath(given)
  if stat.S_ISDIR(mode):
    raise OSError(errno.EISDIR, "")
  if not stat.S_ISREG(mode):
    raise InputError(f"{_named(given, option)}: is a device or a pipe; name a file")
  os.close(os.open(given, os.O_WRONLY | os.O_CLOEXEC))  # a file that is not to be written is not replaced either
  return os.path.realpath(given)


def _nearest(path: str) -> str:
  """The folder itself, or the nearest above it that is there."""
  while True:
    try:
      os.lstat(path)
      return path
    except FileNotFoundError:
      path = os.path.dirname(path)


def _make_folders(path: str) -> list[str]:
  """Makes a folder and those above it; returns those that were not there, from the top."""
  there = _nearest(path)
  if not os.path.isdir(there):
    raise OSError(errno.ENOTDIR, "")
  missing = []
  while path != there:
    missing.append(path)
    path = os.path.dirname(path)
  made: list[str] = []
  try:
    for one in reversed(missing):
      with contextlib.suppress(FileExistsError), _making(one):  # another process was first
        os.mkdir(one)
        made.append(one)
  except OSError:
    _remove_empty(made)
    raise
  return made


@contextlib.contextmanager
def _making(path: str) -> Iterator[None]:
  """Says "permission denied" where a kernel's own folder, such as /proc, calls a name that it does not take missing."""
  try:
    yield
  except FileNotFoundError as error:
    raise OSError(errno.EACCES if os.path.isdir(os.path.dirname(path)) else errno.ENOENT, "") from error


def _remove_empty(made: list[str]) -> None:
  """Removes folders that were made, from the bottom, up to one that holds something."""
  with contextlib.suppress(OSError):
    for one in reversed(made):
      os.rmdir(one)


def _try(path: str) -> None:
  """Writes a block into a folder and removes it."""
  fd, name = tempfile.mkstemp(dir=path, prefix=".alignjax-")
  try:
    os.write(fd, bytes(4096))
    os.fsync(fd)
  finally:
    os.close(fd)
    os.unlink(name)


def _take(path: str, doing: str, named: str, option: str = "") -> int:
  """Opens a file that this process alone holds, and writes into it who that is."""
  while True:
    with _making(path):
      fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
      if not _flock(fd):
        raise InputError(_refusal(os.pread(fd, 1000, 0), doing, named, option))
      if _same(fd, path):
        break
    except BaseException:
      os.close(fd)
      raise
    os.close(fd)  # it was removed by the one who had it, between our two calls
  try:
    os.ftruncate(fd, 0)
    os.write(fd, _owner(doing))
    os.fsync(fd)
  except BaseException:
    with contextlib.suppress(OSError):
      _unlink_own(fd, path)
    os.close(fd)
    raise
  return fd


def _take_folder(path: str, named: str) -> int:
  """Makes a folder, empty but for the record of its owner, which this process alone holds; its descriptor."""
  while True:
    with contextlib.suppress(FileExistsError), _making(path):
      os.mkdir(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    owner = os.path.join(path, LOCK)
    try:
      if not _flock(fd):
        with open(owner, "rb") if os.path.exists(owner) else contextlib.nullcontext() as found:
          raise InputError(_refusal(found.read(1000) if found else b"", "writes", named, ""))
      if _same(fd, path):
        break
    except BaseException:
      os.close(fd)
      raise
    os.close(fd)
  try:
    for name in sorted(os.listdir(path)):  # what a killed process left
      remove(os.path.join(path, name))
    with open(owner, "wb") as out:
      out.write(_owner("writes"))
  except BaseException:
    _drop_folder(fd, path, [])
    raise
  return fd


def _drop_folder(fd: int | None, path: str, made: list[str]) -> None:
  """Removes a folder that is held."""
  if fd is None:
    _remove_empty(made)
    return
  with contextlib.suppress(OSError):
    if _same(fd, path):
      shutil.rmtree(path, ignore_errors=True)
  os.close(fd)
  _remove_empty(made)


def _flock(fd: int) -> bool:
  """Whether this process has the file now; a file system without locks gives it to all."""
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EAGAIN, errno.EACCES):
      return False
    if error.errno not in _NO_LOCKS:
      raise
  return True


def _same(fd: int, path: str) -> bool:
  """Whether the path still means the file that was opened."""
  try:
    return os.path.samestat(os.fstat(fd), os.lstat(path))
  except FileNotFoundError:
    return False


def _unlink_own(fd: int, path: str) -> None:
  if _same(fd, path):
    os.unlink(path)


def _owner(doing: str) -> bytes:
  since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
  record = {"pid": os.getpid(), "host": socket.gethostname(), "doing": doing, "since": since}
  return json.dumps(record).encode() + b"\n"


def _refusal(owner: bytes, doing: str, named: str, option: str) -> str:
  """The line for who comes second."""
  try:
    record = json.loads(owner)
    who = f"process {record['pid']} on {record['host']} {record['doing']} here since {record['since']}"
  except (ValueError, TypeError, KeyError):  # it has only just begun
    who = f"another process {doing} here"
  return f"{named}: {who}; wait for it, stop it, or choose another {option or 'place'}"


def _sync(path: epath.PathLike, flags: int) -> None:
  fd = os.open(path, flags)
  try:
    os.fsync(fd)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # a file system that has no such thing
      raise
  finally:
    os.close(fd)
