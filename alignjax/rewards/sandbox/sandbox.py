"""Generated code in a process of its own, and its tests in another.

The tests reach the code's names as objects of the other process (`cell/peer.py`): values are sent as copies, and no
code. So the code can not report for its tests, end them, change what they call or read what they expect.

Always, for both: `python -I`, an empty environment but for PATH and HOME, a temporary working directory, no output,
limits on CPU time, memory, size of files and open files, no core file, and a wall-clock limit after which all of it is
killed. What else holds depends on the machine, and `Outcome.isolation` says what was reached:

  network     a network namespace without interfaces: there is no network
  processes   process namespaces: the code sees and signals its own processes alone, and all end with the run
  files       a root of its own, read-only, that holds the system's /usr and Python; a small working directory in
              memory; /home, /root, /tmp, /proc, /run and all else are empty
  user        a user of its own for this run, without root's rights (what was started as a user has a user namespace of
              its own): other runs are out of its reach, and do not count towards its limit of threads
  calls       a filter of system calls: no socket of any family, no io_uring, no ptrace, keys, BPF, mounts, namespaces,
              nor memory that is shared by number (memfd, System V)
  memory      no further processes, so that `memory_mib` bounds what the code has; shared memory counts in it

All are required, unless `Limits.isolation` asks for fewer or the run is *weak*. Namespaces need Linux 5.14, and root or
unprivileged user namespaces, which many containers forbid. A weak run goes on with what there is; where network or
files are open it has an audit hook in Python too, against sockets, other processes and changes to files outside the
working directory. It stops accidents, and not code that means to get out (an extension module passes it). Nothing here
defends against a hole in the kernel: for hostile code use a virtual machine.
"""

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_PROGRAM = Path(__file__).with_name("cell")
PARTS = ("network", "processes", "files", "user", "calls", "memory")
START_LIMIT_S = 60.0  # until the code begins: the machine may be busy, which is not the code's doing
_LONGEST_REPORT = 4000  # bytes
_ENVIRONMENT = {
  "LANG": "C.UTF-8",
  "OMP_NUM_THREADS": "1",
  "MALLOC_ARENA_MAX": "1",  # 64 MiB of address space a thread otherwise
}
_THREADS = 32  # of code that may start no processes
_OWN = 4  # processes of the program with the code's user


@dataclass(frozen=True)
class Limits:
  """Of one run: seconds and MiB; `disk_mib` of all files, and of each.

  With `processes` above 1 the code may start others, each of which has `memory_mib`, and "memory" does not hold.
  `isolation` names the parts without which nothing is run, unless the run is weak.
  """

  wall_s: float = 10.0
  cpu_s: int = 5
  memory_mib: int = 512
  disk_mib: int = 16
  processes: int = 1
  isolation: tuple[str, ...] = PARTS


class Outcome(NamedTuple):
  """What became of a run.

  Attributes:
    passed: which of the tests ran through.
    ended: "" if it came to its end, else "timed out", "killed by signal 9", the exit status that the code chose, or
      "broke off" where it closed its pipe to the tests or wrote into it.
    error: the first one of the code or of a test.
    isolation: what was reached, some of PARTS.
  """

  passed: tuple[bool, ...]
  ended: str
  error: str
  isolation: tuple[str, ...]


class Refused(RuntimeError):
  """This machine can not isolate as required, and a weak run was not permitted: nothing was run."""


def run(code: str, tests: list[str], limits: Limits, weak: bool = False) -> Outcome:
  """Runs `code`, then each of `tests` in one namespace of another process, where the code's names can be used.

  A text that defines tests of unittest, or functions test_..., and does not run them has them run.

  Args:
    code: Python.
    tests: Python; one that raises nothing has passed.
    limits: of the run.
    weak: go on where the kernel's isolation is not to be had.

  Raises:
    Refused: it is not to be had.
    RuntimeError: the program that isolates has failed itself, or a test is no Python: the code is not to blame.
  """
  head = json.dumps({"code": code, "required": [] if weak else _required(limits), **_limits(limits)}).encode()
  with (
    tempfile.TemporaryDirectory(prefix="alignjax-code-", ignore_cleanup_errors=True) as work,
    tempfile.TemporaryFile() as job,
    tempfile.TemporaryFile() as wrong,
  ):
    job.write(b"%020d" % len(head) + head + json.dumps(tests).encode())
    job.seek(0)
    process = subprocess.Popen(
      [sys.executable, "-I", str(_PROGRAM)],
      stdin=job,
      stdout=subprocess.PIPE,
      stderr=wrong,
      cwd=work,
      env={"PATH": "/usr/bin:/bin", "HOME": work, "TMPDIR": work, **_ENVIRONMENT},
      start_new_session=True,
    )
    try:
      said, timed_out = _listen(process, limits.wall_s, _LONGEST_REPORT * (4 + len(tests)))
    finally:
      _kill(process)
      process.stdout.close()
    wrong.seek(0)
    return _outcome(_reports(said), len(tests), timed_out, wrong.read(2000).decode(errors="replace"))


def _listen(process: subprocess.Popen, wall_s: float, most: int) -> tuple[bytes, bool]:
  """What the program said until it closed its output, at most `most` bytes, and whether its time was up before.

  The time runs from its first line, which says that the code begins.
  """
  said = b""
  began = False
  deadline = time.monotonic() + START_LIMIT_S
  pipe = process.stdout.fileno()
  poll = select.poll()
  poll.register(pipe, select.POLLIN)
  while len(said) < most:
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
      return said, True
    part = os.read(pipe, 1 << 16)
    if not part:
      break
    said += part
    if not began and b"\n" in said:
      began = True
      deadline = time.monotonic() + wall_s
  return said, False


def _outcome(reports: list[dict], count: int, timed_out: bool, wrong: str) -> Outcome:
  merged = {key: value for report in reports for key, value in report.items()}
  if merged.get("refused"):
    raise Refused(f"this machine does not isolate generated code as required: {merged['refused']}")
  if "failed" in merged or "isolation" not in merged:  # nothing of the code has run, or others ended it
    said = wrong.strip().splitlines()[-1:]  # of a traceback, the error
    cause = merged.get("failed") or "".join(said)[-300:] or ("timed out" if timed_out else "no report")
    raise RuntimeError(f"the sandbox failed: {cause}")
  if "broken" in merged:
    raise RuntimeError(f"test {merged['broken']} of the record is no Python ({merged['error']})")
  errors = {report["test"]: report["error"] for report in reports if "test" in report}
  status = merged.get("ended", 0)
  ended = (
    "timed out" if timed_out else f"killed by signal {-status}" if status < 0 else f"exit {status}" if status else ""
  )
  if not ended and "broke" in merged:
    ended = "broke off"
  if not ended and not errors.get(0) and len(errors) < 1 + count:
    ended = "exit 0"  # by os._exit, before the last test
  return Outcome(
    tuple(errors.get(0) == "" and errors.get(number) == "" for number in range(1, count + 1)),
    ended,
    next(filter(None, errors.values()), ""),
    tuple(merged.get("isolation", ())),
  )


def _required(limits: Limits) -> list[str]:
  return [part for part in limits.isolation if part != "memory" or limits.processes == 1]


def _limits(limits: Limits) -> dict:
  disk = limits.disk_mib << 20
  return {
    "alarm_s": math.ceil(limits.wall_s + START_LIMIT_S) + 5,
    "disk_bytes": disk,
    "forks": limits.processes > 1,
    "limits": {
      "RLIMIT_CPU": limits.cpu_s,
      "RLIMIT_AS": limits.memory_mib << 20,
      "RLIMIT_FSIZE": disk,
      "RLIMIT_NPROC": _OWN + (limits.processes if limits.processes > 1 else _THREADS),
      "RLIMIT_NOFILE": 64,
      "RLIMIT_CORE": 0,
      "RLIMIT_MSGQUEUE": 0,
    },
  }


def _kill(process: subprocess.Popen) -> None:
  """Ends the program's session; where it has a process namespace, all that is in it ends too."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _reports(said: bytes) -> list[dict]:
  """The lines that are reports; the tests are those of the data, so others may be among them."""
  reports = []
  for line in said.splitlines():
    try:
      report = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if isinstance(report, dict):
      reports.append(report)
  return reports
