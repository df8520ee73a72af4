"""Generated code in a process of its own, and its tests in another.

The tests use the code's names as objects of the other process (`cell/peer.py`): values are sent as copies, and code is
never sent. So the code cannot report results for its tests, end them, change what they call or read what they expect.

Always, for both: `python -I`, an environment with only PATH, HOME and the like, a temporary working directory, no
output, limits on CPU time, memory, size of files and open files, no core file, and a wall-clock limit after which all
processes are killed. Other parts depend on the machine; `Outcome.isolation` names those that hold:

  network     a network namespace without interfaces: there is no network
  processes   process namespaces: the code sees and signals its own processes alone, and all end with the run
  files       a root of its own, read-only, that holds the system's /usr and Python; a small working directory in
              memory; /home, /root, /tmp, /proc, /run and all else are empty
  user        a user of its own for this run, without root's rights (what was started as a user has a user namespace of
              its own): other runs are out of its reach, and do not count towards its limit of threads
  calls       a filter of system calls: no socket of any family, no io_uring, no ptrace, keys, BPF, mounts, namespaces,
              nor memory that is shared by number (memfd, System V)
  memory      no further processes, so that `memory_mib` bounds what the code has; shared memory counts in it

All are required, unless `Limits.isolation` names fewer or the run is *weak*. Namespaces need Linux 5.14, and root or
unprivileged user namespaces, which many containers forbid. A weak run uses the parts that the machine provides. If
network or files are open, it has an audit hook in Python too, against sockets, other processes and changes to files
outside the working directory. The hook stops accidents, not code that tries to get out (an extension module can).
Nothing here defends against a vulnerability of the kernel: for hostile code use a virtual machine.
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
from typing import IO, NamedTuple

_PROGRAM = Path(__file__).with_name("cell")
PARTS = ("network", "processes", "files", "user", "calls", "memory")
START_LIMIT_S = 60.0  # until the code begins: a busy machine must not count against the code
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
  """The limits of one run.

  Attributes:
    wall_s: seconds of the clock, from the code's beginning.
    cpu_s: seconds of CPU, whole.
    memory_mib: MiB of address space; of each process if there may be several.
    disk_mib: MiB, of each file and of their sum.
    processes: with more than 1 the code may start others, and "memory" does not hold.
    isolation: names the parts without which nothing is run, unless the run is weak.
  """

  wall_s: float = 10.0
  cpu_s: int = 5
  memory_mib: int = 512
  disk_mib: int = 16
  processes: int = 1
  isolation: tuple[str, ...] = PARTS


class Outcome(NamedTuple):
  """The outcome of a run.

  Attributes:
    passed: whether each of the tests passed.
    ended: "" if the run reached its end, else "timed out", "killed by signal 9", the exit status that the code chose,
      or "broke off" if it closed its pipe to the tests or wrote into it.
    error: the first error of the code or of a test.
    isolation: the parts of PARTS that held.
  """

  passed: tuple[bool, ...]
  ended: str
  error: str
  isolation: tuple[str, ...]


class Refused(RuntimeError):
  """This machine cannot isolate as required, and a weak run was not permitted: nothing was run."""


def run(code: str, tests: list[str], limits: Limits, weak: bool = False) -> Outcome:
  """Runs `code`, then each of `tests` in one namespace of another process, in which the code's names can be used.

  If a text defines tests of unittest, or functions test_..., without running them, they are run.

  Args:
    code: Python.
    tests: Python; one that raises nothing has passed.
    limits: of the run.
    weak: whether to run the code if the kernel cannot isolate it as required.

  Raises:
    Refused: the kernel cannot isolate it, and the run is not weak.
    RuntimeError: the program that isolates has failed, or a test is not valid Python: it is not the code's fault.
  """
  required = [] if weak else _required(limits)
  head = json.dumps({"code": code, "required": required, **_limits(limits)}).encode()
  with (
    tempfile.TemporaryDirectory(prefix="alignjax-code-", ignore_cleanup_errors=True) as work,
    tempfile.TemporaryFile() as job,
    tempfile.TemporaryFile() as errors,
  ):
    job.write(b"%020d" % len(head) + head + json.dumps(tests).encode())
    job.seek(0)
    process = subprocess.Popen(
      [sys.executable, "-I", str(_PROGRAM)],
      stdin=job,
      stdout=subprocess.PIPE,
      stderr=errors,
      cwd=work,
      env={"PATH": "/usr/bin:/bin", "HOME": work, "TMPDIR": work, **_ENVIRONMENT},
      start_new_session=True,
    )
    assert process.stdout is not None
    try:
      output, timed_out = _listen(process.stdout, limits.wall_s, _LONGEST_REPORT * (4 + len(tests)))
    finally:
      _kill(process)
      process.stdout.close()
    errors.seek(0)
    return _outcome(_reports(output), len(tests), timed_out, errors.read(2000).decode(errors="replace"))


def _listen(pipe: IO[bytes], wall_s: float, most: int) -> tuple[bytes, bool]:
  """Returns the program's output until it closes it, at most `most` bytes, and whether its time was up before.

  The time runs from its first line, which reports that the code begins.
  """
  output = b""
  began = False
  deadline = time.monotonic() + START_LIMIT_S
  descriptor = pipe.fileno()
  poll = select.poll()
  poll.register(descriptor, select.POLLIN)
  while len(output) < most:
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
      return output, True
    part = os.read(descriptor, 1 << 16)
    if not part:
      break
    output += part
    if not began and b"\n" in output:
      began = True
      deadline = time.monotonic() + wall_s
  return output, False


def _outcome(reports: list[dict], count: int, timed_out: bool, errors: str) -> Outcome:
  """Returns the outcome by the program's reports on `count` tests, and by its errors.

  Raises:
    Refused: the program reports that the machine cannot isolate.
    RuntimeError: it has failed, or a test is not valid Python.
  """
  merged = {key: value for report in reports for key, value in report.items()}
  if merged.get("refused"):
    raise Refused(f"this machine does not isolate generated code as required: {merged['refused']}")
  if "failed" in merged or "isolation" not in merged:  # the code has not run, or another process ended it
    last_line = "".join(errors.strip().splitlines()[-1:])  # the error of a traceback
    silence = "timed out" if timed_out else "no report"
    raise RuntimeError(f"the sandbox failed: {merged.get('failed') or last_line[-300:] or silence}")
  if "broken" in merged:
    raise RuntimeError(f"test {merged['broken']} of the record is no Python ({merged['error']})")
  results = {report["test"]: report["error"] for report in reports if "test" in report}
  ended = _ended(merged, timed_out)
  if not ended and not results.get(0) and len(results) < 1 + count:
    ended = "exit 0"  # by os._exit, before the last test
  return Outcome(
    tuple(results.get(0) == "" and results.get(number) == "" for number in range(1, count + 1)),
    ended,
    next(filter(None, results.values()), ""),
    tuple(merged.get("isolation", ())),
  )


def _ended(report: dict, timed_out: bool) -> str:
  """Returns how the code's process ended, as in `Outcome.ended`."""
  if timed_out:
    return "timed out"
  status = report.get("ended", 0)
  if status < 0:
    return f"killed by signal {-status}"
  if status:
    return f"exit {status}"
  if "broke" in report:
    return "broke off"
  return ""


def _required(limits: Limits) -> list[str]:
  """Returns the required parts that can hold with these limits."""
  return [part for part in limits.isolation if part != "memory" or limits.processes == 1]


def _limits(limits: Limits) -> dict:
  """Returns the limits as the program takes them."""
  disk = limits.disk_mib << 20
  forks = limits.processes > 1
  threads = limits.processes if forks else _THREADS
  return {
    "alarm_s": math.ceil(limits.wall_s + START_LIMIT_S) + 5,
    "disk_bytes": disk,
    "forks": forks,
    "limits": {
      "RLIMIT_CPU": limits.cpu_s,
      "RLIMIT_AS": limits.memory_mib << 20,
      "RLIMIT_FSIZE": disk,
      "RLIMIT_NPROC": _OWN + threads,
      "RLIMIT_NOFILE": 64,
      "RLIMIT_CORE": 0,
      "RLIMIT_MSGQUEUE": 0,
    },
  }


def _kill(process: subprocess.Popen) -> None:
  """Ends the program's session; if it has a process namespace, all processes in it end too."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _reports(output: bytes) -> list[dict]:
  """Returns the lines that are reports; the tests, which are data, may have written other lines."""
  reports = []
  for line in output.splitlines():
    try:
      report = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if isinstance(report, dict):
      reports.append(report)
  return reports
