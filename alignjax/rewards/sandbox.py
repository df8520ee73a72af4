"""Generated code in a process of its own.

Always: `python -I`, an empty environment but for PATH and HOME, a temporary working directory, no output, limits on CPU
time, memory, size of files, number of processes and open files, no core file, and a wall-clock limit after which all of
it is killed. What else holds depends on the machine, and `Outcome.isolation` says what was reached:

  network     a network namespace without interfaces: there is no network
  processes   a process namespace: it sees and signals its own processes alone, and all of them end with it
  files       every file system is read-only but a small one in memory, the working directory; /proc, /run and /dev/shm
              are hidden
  user        it is not root (what was started as root goes on as nobody); the limit of processes binds no root

Namespaces need Linux, and root or unprivileged user namespaces, which many containers forbid. Without them a *weak* run
has (and one whose files the kernel leaves open has too) an audit hook in Python, against sockets, other processes and
changes to files outside the working directory. It stops accidents, and not code that means to get out (an extension
module passes it). Nothing here keeps code from reading the files that its user can read, nor defends against a hole in
the kernel: for hostile code use a virtual machine.
"""

import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_PROGRAM = Path(__file__).with_name("sandboxed.py")
NOBODY = 65534
_REPORTS = 1 << 20  # bytes that are read of them


@dataclass(frozen=True)
class Limits:
  """Of one run: seconds and MiB; `disk_mib` of all files, and of each."""

  wall_s: float = 10.0
  cpu_s: int = 5
  memory_mib: int = 512
  disk_mib: int = 16
  processes: int = 32


class Outcome(NamedTuple):
  """What became of a run.

  Attributes:
    passed: which of the tests ran through.
    ended: "" if it came to its end, else "timed out", "killed by signal 9" or the exit status that the code chose.
    error: the first one of the code or of a test.
    isolation: what was reached, of network, processes, files, user.
  """

  passed: tuple[bool, ...]
  ended: str
  error: str
  isolation: tuple[str, ...]


class Refused(RuntimeError):
  """The network can not be taken away on this machine, and a weak run was not permitted: nothing was run."""


def run(code: str, tests: list[str], limits: Limits, weak: bool = False) -> Outcome:
  """Runs `code`, then each of `tests` in the namespace that it leaves.

  Code and tests share an interpreter: code that sets out to fool its tests can, as with any unit test.

  Args:
    code: Python.
    tests: Python; one that raises nothing has passed.
    limits: of the run.
    weak: go on where the kernel's isolation is not to be had.

  Raises:
    Refused: it is not to be had.
    RuntimeError: the program that isolates has failed itself.
  """
  token = secrets.token_hex(16)  # reports without it are the code's
  job = json.dumps({"code": code, "tests": tests, "weak": weak, "token": token, **_limits(limits)}).encode()
  with tempfile.TemporaryDirectory(prefix="alignjax-code-", ignore_cleanup_errors=True) as work:
    if os.geteuid() == 0:
      os.chown(work, NOBODY, NOBODY)
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as wrong:
      process = subprocess.Popen(
        [sys.executable, "-I", str(_PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=said,
        stderr=wrong,
        cwd=work,
        env={"PATH": "/usr/bin:/bin", "HOME": work, "TMPDIR": work, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
      )
      timed_out = False
      try:
        process.communicate(job, timeout=limits.wall_s)
      except subprocess.TimeoutExpired:
        timed_out = True
      finally:
        _kill(process)
      said.seek(0)
      wrong.seek(0)
      reports = [r for r in map(_parsed, said.read(_REPORTS).splitlines()) if r.get("token") == token]
      return _outcome(reports, len(tests), timed_out, wrong.read(2000).decode(errors="replace"))


def _outcome(reports: list[dict], count: int, timed_out: bool, wrong: str) -> Outcome:
  merged = {key: value for report in reports for key, value in report.items()}
  if merged.get("refused"):
    raise Refused("the kernel permits no namespaces here, so generated code would have the network")
  if "isolation" not in merged:  # nothing of the code has run
    raise RuntimeError(f"the sandbox failed: {wrong.strip()[-300:] or ('timed out' if timed_out else 'no report')}")
  errors = {report["test"]: report["error"] for report in reports if "test" in report}
  status = merged.get("ended", 0)
  ended = (
    "timed out" if timed_out else f"killed by signal {-status}" if status < 0 else f"exit {status}" if status else ""
  )
  if not ended and not errors.get(0) and len(errors) < 1 + count:
    ended = "exit 0"  # by os._exit, before the last test
  return Outcome(
    tuple(errors.get(0) == "" and errors.get(number) == "" for number in range(1, count + 1)),
    ended,
    next(filter(None, errors.values()), ""),
    tuple(merged.get("isolation", ())),
  )


def _limits(limits: Limits) -> dict:
  disk = limits.disk_mib << 20
  return {
    "alarm_s": math.ceil(limits.wall_s) + 5,
    "disk_bytes": disk,
    "limits": {
      "RLIMIT_CPU": limits.cpu_s,
      "RLIMIT_AS": limits.memory_mib << 20,
      "RLIMIT_FSIZE": disk,
      "RLIMIT_NPROC": limits.processes,
      "RLIMIT_NOFILE": 64,
      "RLIMIT_CORE": 0,
    },
  }


def _kill(process: subprocess.Popen) -> None:
  """Ends the program's session; where it has a process namespace, all that is in it ends too."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _parsed(line: bytes) -> dict:
  try:
    said = json.loads(line)
  except ValueError:
    return {}
  return said if isinstance(said, dict) else {}
