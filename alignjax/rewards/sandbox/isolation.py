"""A reward in a process of its own, which is killed if a completion takes too long."""

import contextlib
import math
import os
import pickle
import subprocess
import sys
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from alignjax.errors import InputError
from alignjax.rewards.protocol import Columns, Entry, Prompt, Reward

START_LIMIT_S = 60.0  # for a process to import the reward's module


class ReportedError(RuntimeError):
  """An error that a reward raised in its process, as text."""


class isolated:
  """A reward that is called for one completion at a time in a process of its own.

  If a completion takes longer than `time_limit_s`, needs more memory than `memory_mib` or ends the process, only that
  completion fails: the process is killed, and the next completion gets a new one. The process ends with its parent.
  The reward must be a function at the top level of a module that can be imported (or a partial of one):
  `score = isolated(_score)`. Its changes in memory stay in the process.

  Args:
    reward: as `protocol.Reward`; its attribute `needs` is kept.
    time_limit_s: seconds a completion, above 0.
    memory_mib: MiB of address space.

  Raises:
    InputError: a limit is not above 0, or the reward cannot be pickled or is defined in the program itself.
  """

  def __init__(self, reward: Reward, time_limit_s: float = 5.0, memory_mib: int = 4096):
    for name, value in (("time_limit_s", time_limit_s), ("memory_mib", memory_mib)):
      if not 0 < value < math.inf:
        raise InputError(f"{name} of a reward in a process of its own is {value}; give more than 0")
    try:
      self._pickled = pickle.dumps(reward)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
      raise InputError(f"{reward!r} cannot be sent to a process ({error}); {_REMEDY}") from error
    if getattr(getattr(reward, "func", reward), "__module__", "") == "__main__":
      raise InputError(f"{reward!r} is defined in the program itself, which its process does not import; {_REMEDY}")
    self.needs = getattr(reward, "needs", ())
    self._limit = time_limit_s
    self._memory = memory_mib
    self._idle: list[_Worker] = []
    weakref.finalize(self, _end, self._idle)

  def __call__(
    self, prompts: list[Prompt], completions: list[str], token_ids: list[list[int]], columns: Columns
  ) -> list[Entry]:
    """Returns one entry for each completion; an exception if its process gave none."""
    worker = self._free()
    entries: list[Entry] = []
    for i in range(len(completions)):
      worker = worker or _Worker(self._pickled, self._limit, self._memory)
      row = {name: [values[i]] for name, values in columns.items()}
      try:
        entries.append(worker.ask(([prompts[i]], [completions[i]], [token_ids[i]], row)))
      except (TimeoutError, ChildProcessError) as error:
        entries.append(error)
        worker = None
    if worker:
      self._idle.append(worker)
    return entries

  def _free(self) -> "_Worker | None":
    """Returns a process that waits for work, if there is one."""
    while self._idle:
      worker = self._idle.pop()
      if worker.lives():
        return worker
      worker.end()
    return None


_REMEDY = "define it at the top level of a module, and wrap it under another name"


class _Worker:
  """One process, and the pipe to it."""

  def __init__(self, pickled: bytes, time_limit_s: float, memory_mib: int):
    self._limit = time_limit_s
    self._pipe, theirs = Pipe()
    with theirs:
      self._process = _start(theirs, time_limit_s, memory_mib)
    self._pipe.send_bytes(pickled)
    _, error = self._receive(START_LIMIT_S)
    if error:
      self.end()
      raise ReportedError(error)

  def ask(self, batch: tuple) -> Entry:
    """Returns the entry of a batch of one."""
    with contextlib.suppress(ConnectionError):  # the process has ended: `_receive` reports how
      self._pipe.send(batch)
    entry, error = self._receive(self._limit)
    if error:
      return ReportedError(error)
    return entry

  def lives(self) -> bool:
    """Returns whether the process still runs."""
    return self._process.poll() is None

  def end(self) -> None:
    """Kills the process."""
    self._process.kill()
    self._process.wait()
    self._pipe.close()

  def _receive(self, limit: float) -> tuple:
    """(entry, error) of the process.

    Raises:
      ChildProcessError: the process has ended.
      TimeoutError: there was no answer in `limit` seconds; the process was killed.
    """
    try:
      if self._pipe.poll(limit):
        return self._pipe.recv()
    except (EOFError, ConnectionError) as error:
      self._process.wait()
      self._pipe.close()
      raise ChildProcessError(f"its process ended with status {self._process.returncode}") from error
    self.end()
    raise TimeoutError(f"no answer within {limit:g} s; its process was killed")


def _start(pipe: Connection, time_limit_s: float, memory_mib: int) -> subprocess.Popen:
  environment = os.environ | {
    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    "JAX_PLATFORMS": "cpu",  # if the module imports JAX: the accelerator belongs to the parent
    "OMP_NUM_THREADS": "1",
  }
  command = [
    sys.executable,
    "-m",
    "alignjax.rewards.sandbox.worker",
    *map(str, (pipe.fileno(), time_limit_s, memory_mib)),
  ]
  # A session of its own: the Ctrl-C that stops a run at its next step must not reach this process.
  return subprocess.Popen(command, env=environment, pass_fds=[pipe.fileno()], start_new_session=True)


def _end(workers: list[_Worker]) -> None:
  for worker in workers:
    worker.end()
