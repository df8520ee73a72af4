"""The errors that a user's input, disk, memory or interrupt can cause, and how a command reports them.

Everything else is a fault of the program, and keeps its traceback.
"""

import contextlib
import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
CLOSED = 141  # 128 + SIGPIPE: whoever read the output has gone, as after `| head -1`


class Refusal(NamedTuple):
  """An error of the operating system, for people: what is the case, and what to do about it."""

  reason: str
  remedy: str


_ROOM = "make room, or choose another place; then run the same command again"
_PERMISSION = "get the permission, or choose another place"
_REFUSALS = {
  errno.EACCES: Refusal("permission denied", _PERMISSION),
  errno.EPERM: Refusal("not permitted", _PERMISSION),
  errno.EROFS: Refusal("the file system is read-only", "choose a place that can be written"),
  errno.ENOENT: Refusal("no such file or folder", "correct the path, or make its folder"),
  errno.EISDIR: Refusal("is a folder", "name a file"),
  errno.ENOTDIR: Refusal("a part of this path is a file, not a folder", "correct the path"),
  errno.EEXIST: Refusal("is there already", "delete it, or choose another place"),
  errno.ENOTEMPTY: Refusal("is not empty", "choose another place"),
  errno.ELOOP: Refusal("a loop of symbolic links", "correct the link, or choose another place"),
  errno.ENAMETOOLONG: Refusal("the name is too long", "choose a shorter one"),
  errno.ENOSPC: Refusal("the disk is full", _ROOM),
  errno.EDQUOT: Refusal("the disk quota is used up", _ROOM),
  errno.EFBIG: Refusal("larger than the limit on a file's size", "raise it (ulimit -f), or choose another place"),
  errno.EMFILE: Refusal("too many open files", "raise the limit (ulimit -n)"),
  errno.ENFILE: Refusal("too many open files in the system", "end other programs, or raise the limit"),
  errno.ENOMEM: Refusal("not enough memory", "free memory, or make the work smaller"),
}
_INTERRUPTED = "interrupted; run the same command again to go on"


class InputError(ValueError):
  """What is wrong, where (file, line, field) and the remedy, in one line.

  The command line prints it without a traceback and exits with status 2.
  """


def check_path(name: str, value: Any) -> None:
  """Raises InputError where the argument `name` is no path: of another type, empty, or with a null byte."""
  if not isinstance(value, str | os.PathLike):
    kind = "None" if value is None else f"a {type(value).__name__}"
    raise InputError(f"{name} is {kind}; give the path of a file or folder")
  if not os.fspath(value) or "\0" in os.fspath(value):
    raise InputError(f"{name}={os.fspath(value)!r}: is no path; name a file or folder")


def explain(error: BaseException) -> tuple[int, str] | None:
  """The exit status and the line ("" for none) of an error that is no fault of the program; None if it is one."""
  if isinstance(error, KeyboardInterrupt):
    return INTERRUPTED, _INTERRUPTED
  if isinstance(error, InputError):
    return BAD_INPUT, " ".join(str(error).split())
  if isinstance(error, BrokenPipeError) and _reader_gone():
    return CLOSED, ""
  if isinstance(error, OSError):
    return BAD_INPUT, os_error(error)
  if isinstance(error, MemoryError):
    return BAD_INPUT, f"this machine has not enough memory ({_text(error)}); {_SMALLER}"
  if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error):
    return BAD_INPUT, f"the device has not enough memory ({_text(error)}); {_SMALLER}"
  return None


_SMALLER = (
  "lower data.rows, data.row_length or --batch-size, or raise optimizer.microbatches (alignjax compile says what fits)"
)


def os_error(error: OSError) -> str:
  """One line for what the operating system refused: the paths, its reason and a remedy."""
  names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
  place = " and ".join(names) or "an input or output"
  return " ".join(f"{place}: {'; '.join(refusal(error))}".split())


def refusal(error: OSError) -> Refusal:
  """What an error of the operating system says, and the remedy; of one that is not known, its own words."""
  again = "look at this file, device or connection, then run the same command again"
  if error.errno in _REFUSALS:
    return _REFUSALS[error.errno]
  return Refusal(error.strerror or _text(error), again)


def exit_status(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
  """What main(argv) returns; another status after at most one line on standard error where `explain` has one.

  A loop that Ctrl-C made end early, with all saved, is no success: a script must not go on to the next command.
  """
  _interrupts.noted = False
  try:
    status = main(argv)
    return status or (INTERRUPTED if _interrupts.noted else 0)
  except (Exception, KeyboardInterrupt) as error:
    explained = explain(error)
    if explained is None:
      raise
    status, line = explained
    tell(line)
    return status


def note_interrupt(line: str) -> None:
  """For a loop that answers Ctrl-C by saving and leaving: tells so, and makes the command's status that of Ctrl-C."""
  _interrupts.noted = True
  tell(line)


def tell(line: str) -> None:
  """Writes a line to standard error, which may be closed."""
  if line:
    with contextlib.suppress(OSError, ValueError, AttributeError):
      sys.stderr.write(f"alignjax: {line}\n")
      sys.stderr.flush()


def watch_interrupts() -> None:
  """Makes Ctrl-C end this process with one line and status 130 from now on, whatever it is at.

  For the first lines of a program, before the imports that take seconds.
  """
  _interrupts.watch()


def run_process(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
  """exit_status(main, argv) of a process whose work is ours alone; returns only a status of 0.

  Any other ends the process at once. At the usual end the interpreter joins and frees what threads of JAX, Orbax and
  Grain still use after an error: it waits, prints tracebacks or dies of a segmentation fault.
  """
  watch_interrupts()
  status = exit_status(main, argv)
  try:
    if sys.stdout is not None:
      sys.stdout.flush()
  except (OSError, ValueError) as error:
    explained = explain(error)
    if explained and not status:
      tell(explained[1])
    leave(status or (explained[0] if explained else 1))
  if status:
    leave(status)
  return 0


def leave(status: int) -> NoReturn:
  """Ends this process at once; those that it started see the end of their pipes."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      stream.flush()
  os._exit(status)


@contextlib.contextmanager
def ctrl_c_raises() -> Iterator[None]:
  """Within, Ctrl-C is a KeyboardInterrupt that the caller answers, and ends no process."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, previous)


class _Interrupts:
  """Ctrl-C of a process that we own: one line and the end of it, at once; all that is written survives a kill.

  A KeyboardInterrupt would not do: libraries lose it, or make an ImportError of it, where it meets them in a callback
  or an import, and a compilation does not come back to Python for minutes.
  """

  def __init__(self):
    self.noted = False
    self._owner = 0  # the process; 0: nothing is watched
    self._ending = threading.Lock()

  def watch(self) -> None:
    if self._owner or threading.current_thread() is not threading.main_thread():
      return
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of nohup, or of a shell's background job
      return
    self._owner = os.getpid()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGINT, self._handle)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=self._beside, args=(reader,), daemon=True).start()

  def _handle(self, signum, frame) -> None:
    self._end()

  def _beside(self, reader: int) -> None:
    """A thread, which runs while the main one compiles."""
    while signum := os.read(reader, 1):
      if signum[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) == self._handle:
        self._end()

  def _end(self) -> None:
    if os.getpid() != self._owner:  # a forked child goes with its parent
      os._exit(INTERRUPTED)
    if self._ending.acquire(blocking=False):
      tell(_INTERRUPTED)
      leave(INTERRUPTED)


_interrupts = _Interrupts()


def _reader_gone() -> bool:
  """Whether a pipe behind standard output or error has nobody at its other end."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      poll = select.poll()
      poll.register(stream.fileno(), 0)
      if any(event & select.POLLERR for _, event in poll.poll(0)):
        return True
  return False


def _text(error: BaseException, most: int = 160) -> str:
  """The beginning of an error's message, in one line."""
  return (" ".join(str(error).split()) or type(error).__name__)[:most]
