"""The turns of one side of benchmarks/peers.py: a line of standard input asks for one, a line of JSON answers.

Standard library alone: it runs in every side's environment. What libraries print to standard output goes to standard
error.
"""

import importlib.metadata
import json
import os
import pathlib
import sys
import time
from typing import Any


class Turns:
  """Answers with what the last turn took, waits for the next request, and starts its clock."""

  def __init__(self, *packages: str):
    """Takes standard output for itself; call it when all is imported and nothing is loaded."""
    self._channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    versions = {name: importlib.metadata.version(name) for name in packages}
    self._facts: dict[str, Any] = {"versions": versions, "imported_mb": memory_mb("VmRSS")}

  def begin(self, **found: Any) -> None:
    """Answers, then waits; the first answer says that all is ready. The process ends with its input.

    Args:
      found: of the turns so far, in JSON's types.
    """
    print(json.dumps(self._facts | found | {"peak_mb": memory_mb("VmHWM")}), file=self._channel)
    if not sys.stdin.readline():
      os._exit(0)
    self._began = time.perf_counter(), time.process_time()

  def end(self) -> None:
    """Stops the clock."""
    wall, cores = self._began
    self._facts = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cores}


def memory_mb(key: str) -> float:
  """Resident memory of this process in MB (10^6 bytes): VmRSS is now, VmHWM the most so far.

  getrusage's counts what the parent held when it forked, too.
  """
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{key}:"))
