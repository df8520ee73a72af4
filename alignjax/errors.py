"""The errors that a user's input, disk, memory or interrupt can cause, and how a command reports them.

All other errors are bugs of the program, and keep their traceback.
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
CLOSED = 141  # 128 + SIGPIPE: the reader of the output has ended, as after `| head -1`


class Refusal(NamedTuple):
  """An error of the operating system, for people: its reason, and the remedy."""

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
  """An error in the user's input; its text is one line with the value, the place (file, line, field) and the remedy.

  The command line prints it without a traceback and exits with status 2.
  """


def check_path(name: str, value: Any) -> None:
  """Raises InputError if the argument `name` is no path: of another type, empty, or with a null byte."""
  if not isinstance(value, str | os.PathLike):
    kind = f"a {type(value).__name__}"
    if value is None:
      kind = "None"
    raise InputError(f"{name} is {kind}; give the path of a file or folder")
  if not os.fspath(value) or "\0" in os.fspath(value):
    raise InputError(f"{name}={os.fspath(value)!r}: is no path; name a file or folder")


def explain(error: BaseException) -> tuple[int, str] | None:
  """Returns the exit status and the line ("" for none) of an error; None if the error is a bug of the program."""
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
  """Describes an error of the operating system in one line: the paths, the reason and the remedy."""
  names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
  place = " and ".join(names) or "an input or output"
  return " ".join(f"{place}: {'; '.join(refusal(error))}".split())


def refusal(error: OSError) -> Refusal:
  """Returns the reason of an error of the operating system, and the remedy; for an unknown one, its own text."""
  again = "look at this file, device or connection, then run the same command again"
  if error.errno in _REFUSALS:
    return _REFUSALS[error.errno]
  return Refusal(error.strerror or _text(error), again)


def exit_status(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
  """Runs main(argv) and returns its status; for an error that `explain` knows, prints its line and returns its status.

  A loop that saved everything and ended early because of Ctrl-C has the status INTERRUPTED: a script must not continue
  with its next command.
  """
  _interrupts.noted = False
  try:
    status = main(argv)
    if not status and _interrupts.noted:
      return INTERRUPTED
    return status
  except (Exception, KeyboardInterrupt) as error:
    explained = explain(error)
    if explained is None:
      raise
    status, line = explained
    tell(line)
    return status


def note_interrupt(line: str) -> None:
  """Writes the line of a loop that saves and ends at Ctrl-C, and makes the command's status INTERRUPTED."""
  _interrupts.noted = True
  tell(line)


def tell(line: str) -> None:
  """Writes a line to standard error, which may be closed."""
  if line:
    with contextlib.suppress(OSError, ValueError, AttributeError):
      sys.stderr.write(f"alignjax: {line}\n")
      sys.stderr.flush()


def watch_interrupts() -> None:
  """Makes Ctrl-C end this process at once, with one line and status 130.

  Call it in the first lines of a program, before the imports that take seconds.
  """
  _interrupts.watch()


def run_process(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
  """Runs exit_status(main, argv) in a process that runs nothing else; returns only if the status is 0.

  Any other status ends the process at once. After an error, threads of JAX, Orbax and Grain are still running: a normal
  exit of the interpreter would wait for them, print tracebacks, or end in a segmentation fault.
  """
  watch_interrupts()
  status = exit_status(main, argv)
  try:
    if sys.stdout is not None:
      sys.stdout.flush()
  except (OSError, ValueError) as error:
    failure, line = explain(error) or (1, "")
    if not status:
      tell(line)
      status = failure
    leave(status)
  if status:
    leave(status)
  return 0


def leave(status: int) -> NoReturn:
  """Ends this process at once, without the interpreter's cleanup; its children see the end of their pipes."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      stream.flush()
  os._exit(status)


@contextlib.contextmanager
def ctrl_c_raises() -> Iterator[None]:
  """A context in which Ctrl-C raises KeyboardInterrupt, for the caller to handle, instead of ending the process."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, previous)


class _Interrupts:
  """Ends a process that we own at Ctrl-C, at once, with one line; all files are written so that they survive a kill.

  A KeyboardInterrupt is not enough: in a callback or an import, libraries swallow it or turn it into an ImportError,
  and during a compilation Python handles no signal for minutes.
  """

  def __init__(self):
    self.noted = False  # whether a loop has ended early because of Ctrl-C
    self._owner = 0  # the process's id; 0: nothing is watched
    self._ending = threading.Lock()

  def watch(self) -> None:
    if self._owner or threading.current_thread() is not threading.main_thread():
      return
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # set by nohup, or for a shell's background job
      return
    self._owner = os.getpid()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGINT, self._handle)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=self._end_on_signal, args=(reader,), daemon=True).start()

  def _handle(self, signum, frame) -> None:
    self._end()

  def _end_on_signal(self, reader: int) -> None:
    """Runs in a thread of its own, which receives the signal even while the main thread compiles."""
    while signum := os.read(reader, 1):
      if signum[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) == self._handle:
        self._end()

  def _end(self) -> None:
    if os.getpid() != self._owner:  # a forked child, which ends with its parent
      os._exit(INTERRUPTED)
    if self._ending.acquire(blocking=False):
      tell(_INTERRUPTED)
      leave(INTERRUPTED)


_interrupts = _Interrupts()


def _reader_gone() -> bool:
  """Whether the reader of a pipe behind standard output or error has ended."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      poll = select.poll()
      poll.register(stream.fileno(), 0)
      if any(event & select.POLLERR for _, event in poll.poll(0)):
        return True
  return False


def _text(error: BaseException, most: int = 160) -> str:
  """The start of an error's message, in one line."""
  return (" ".join(str(error).split()) or type(error).__name__)[:most]
