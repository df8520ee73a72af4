"""Files that one process holds alone, through the kernel's lock, with a record of the owner."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time

from alignjax.errors import InputError
from alignjax.system.disk import making

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


def take(path: str, doing: str, named: str, option: str = "") -> int:
  """Opens a file, which is made if missing, locks it, and writes the record of its owner into it.

  Args:
    path: the file.
    doing: what this process does with it, for the error of another process: "writes".
    named: the name of the output for the error.
    option: the flag that named it, for the error.

  Returns:
    The descriptor; its lock ends when it is closed.

  Raises:
    InputError: another process holds it.
  """
  while True:
    with making(path):
      fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
      if not flock(fd):
        raise InputError(refusal(os.pread(fd, 1000, 0), doing, named, option))
      if is_same(fd, path):
        break
    except BaseException:
      os.close(fd)
      raise
    os.close(fd)  # its owner removed it between our two calls
  try:
    os.ftruncate(fd, 0)
    os.write(fd, owner_record(doing))
    os.fsync(fd)
  except BaseException:
    with contextlib.suppress(OSError):
      unlink_own(fd, path)
    os.close(fd)
    raise
  return fd


def flock(fd: int) -> bool:
  """Locks an open file; True if this process has it now. A file system without locks gives it to all."""
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EAGAIN, errno.EACCES):
      return False
    if error.errno not in _NO_LOCKS:
      raise
  return True


def is_same(fd: int, path: str) -> bool:
  """True if the path still names the file that was opened."""
  try:
    return os.path.samestat(os.fstat(fd), os.lstat(path))
  except FileNotFoundError:
    return False


def unlink_own(fd: int, path: str) -> None:
  """Removes a file that was opened, unless the path names another by now."""
  if is_same(fd, path):
    os.unlink(path)


def owner_record(doing: str) -> bytes:
  """The record of this process as an owner: a JSON object in one line."""
  since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
  record = {"pid": os.getpid(), "host": socket.gethostname(), "doing": doing, "since": since}
  return json.dumps(record).encode() + b"\n"


def refusal(owner: bytes, doing: str, named: str, option: str) -> str:
  """The error's line for the process that comes second; `owner` is the record of the first."""
  try:
    record = json.loads(owner)
    who = f"process {record['pid']} on {record['host']} {record['doing']} here since {record['since']}"
  except (ValueError, TypeError, KeyError):  # the owner has not written its record yet
    who = f"another process {doing} here"
  return f"{named}: {who}; wait for it, stop it, or choose another {option or 'place'}"
