"""The process of an isolated reward: `python -m alignjax.rewards.sandbox.worker PIPE SECONDS MIB`."""

import pickle
import resource
import signal
import sys
from multiprocessing.connection import Connection

from alignjax.rewards.protocol import told

GRACE_S = 5.0  # after which the process ends itself if its parent, which may be dead, does not


def main(pipe: int, time_limit_s: float, memory_mib: int) -> None:
  """Answers one completion at a time until the pipe closes."""
  parent = Connection(pipe)
  try:
    try:
      reward = pickle.loads(parent.recv_bytes())
    except BaseException as error:  # the import of a module can raise any error
      return parent.send((None, told(error)))
    parent.send((None, ""))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    while True:
      batch = parent.recv()
      # The kernel delivers this signal even if Python's lock is never released.
      signal.setitimer(signal.ITIMER_REAL, time_limit_s + GRACE_S)
      parent.send(_answer(reward, batch))
      signal.setitimer(signal.ITIMER_REAL, 0)
  except (EOFError, ConnectionError):
    return


def _answer(reward, batch: tuple) -> tuple:
  """(entry, "") or (None, the text of the error)."""
  try:
    (entry,) = reward(*batch)
    pickle.dumps(entry)
  except BaseException as error:
    return None, told(error)
  if isinstance(entry, BaseException):
    return None, told(entry)
  return entry, ""


if __name__ == "__main__":
  main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
