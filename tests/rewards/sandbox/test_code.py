"""Generated code: off by default, run against tests, and held in."""

import os
import shutil
import subprocess
import sys

import pytest

from alignjax.errors import InputError
from alignjax.rewards import make, score
from alignjax.rewards.sandbox import sandbox
from alignjax.rewards.sandbox.code import SETTING, extract
from alignjax.rewards.sandbox.sandbox import Limits, Refused, run

LIMITS = Limits(wall_s=60.0, cpu_s=1, memory_mib=256, disk_mib=4, processes=8)
NOBODY = 65534
ADD = "def add(a, b):\n  return a + b\n"


def isolation():
  try:
    return run("", [], LIMITS).isolation
  except Refused:
    return ()


needs_namespaces = pytest.mark.skipif("network" not in isolation(), reason="the kernel permits no namespaces here")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
  monkeypatch.delenv(SETTING, raising=False)


def test_it_is_off_unless_permitted(monkeypatch):
  with pytest.raises(
    InputError, match=r"is off: read alignjax/rewards/sandbox/sandbox\.py, then set ALIGNJAX_RUN_CODE=1"
  ):
    make("code_tests")
  monkeypatch.setenv(SETTING, "weak")
  assert callable(make("code_tests")["code_tests"])


def test_a_machine_that_lacks_a_part_is_refused_and_fewer_can_be_asked_for(without_namespaces):
  with pytest.raises(InputError, match=r"missing network, processes, files.*; permit user namespaces, or set ALIGN"):
    make("code_tests", run_code="1")
  reward = make("code_tests", run_code="1", code_isolation="user, calls")["code_tests"]
  assert 0 < reward.facts["isolation"] < 1
  with pytest.raises(InputError, match="code_isolation has 'sockets'; use all, or some of network,processes,files"):
    make("code_tests", run_code="1", code_isolation="network,sockets")


@needs_namespaces
def test_a_later_run_with_less_isolation_is_a_failure(monkeypatch):
  reward = make("code_tests", run_code="1")
  batch = ["p"], [ADD], [[]], {"tests": ["assert add(1, 1) == 2"]}
  assert reward["code_tests"].facts == {"isolation": 1}
  assert score(reward, *batch).values.tolist() == [[1]]

  def fewer(*args):
    return run(*args)._replace(isolation=("network",))

  monkeypatch.setattr("alignjax.rewards.sandbox.code.run", fewer)
  (failure,) = score(reward, *batch, report=lambda line: None).failures
  assert failure.cause == "RuntimeError: the sandbox did not hold processes, files, user, calls, memory any more"


def test_a_record_whose_tests_cannot_be_run_gives_no_reward():
  reward = make("code_tests", run_code="weak")
  tests = ["assert add(1", {"input": 1}, ["", "  "], [3], ""]
  scores = score(reward, ["p"] * 5, [ADD] * 5, [[]] * 5, {"tests": tests}, report=lambda line: None)
  assert scores.values.ravel().tolist() != scores.values.ravel().tolist()
  assert [(failure.index, failure.cause.partition(":")[0]) for failure in scores.failures] == [
    (0, "RuntimeError"),
    (1, "ValueError"),
    (3, "ValueError"),
  ]
  assert "test 1 of the record is no Python (SyntaxError" in scores.failures[0].cause


@pytest.mark.parametrize("setting", [{"code_cpu_s": -1}, {"code_wall_s": 0.0}, {"code_memory_mib": 1}])
def test_limits_that_are_none_are_refused(setting):
  with pytest.raises(InputError, match=f"{next(iter(setting))} is .*; give at least"):
    make("code_tests", run_code="weak", **setting)


def test_a_sandbox_that_fails_at_once_is_one_line(monkeypatch):
  monkeypatch.setattr(sandbox, "_PROGRAM", "/no/such/program.py")
  with pytest.raises(InputError, match=r"the sandbox failed: .*No such file.*; try code_memory_mib above 512"):
    make("code_tests", run_code="weak")


def test_it_is_refused_where_the_network_can_not_be_taken_away(monkeypatch):
  def refuse(code, tests, limits, weak):
    raise Refused("no namespaces")

  monkeypatch.setattr("alignjax.rewards.sandbox.code.run", refuse)
  with pytest.raises(InputError, match="no namespaces; permit user namespaces, or set ALIGNJAX_RUN_CODE=weak"):
    make("code_tests", run_code="1")


@pytest.mark.parametrize(("credit", "values"), [("all", [1, 0, 0, 0]), ("share", [1, 0.5, 0, 0])])
def test_completions_are_worth_the_tests_they_pass(credit, values):
  reward = make("code_tests", run_code="weak", code_credit=credit)
  completions = [
    f"Sure:\n```python\n{ADD}```\nDone.",
    "```\ndef add(a, b): return 3\n```",
    "not python",
    "import sys\nsys.exit(0)",
    ADD,
  ]
  tests = [["assert add(1, 2) == 3", "assert add(2, 2) == 4"]] * 4 + [None]
  scores = score(reward, ["p"] * 5, completions, [[]] * 5, {"tests": tests})
  assert scores.values.ravel().tolist()[:4] == values
  assert scores.values[4, 0] != scores.values[4, 0]
  assert not scores.failures


def test_a_sandbox_that_fails_gives_no_reward(monkeypatch):
  reward = make("code_tests", run_code="weak")
  monkeypatch.setattr(sandbox, "_PROGRAM", "/no/such/program.py")
  lines = []
  scores = score(reward, ["p"], [ADD], [[]], {"tests": ["assert add(1, 1) == 2"]}, report=lines.append)
  assert [failure.kind for failure in scores.failures] == ["raised"]
  assert "the sandbox failed" in lines[0]


def test_the_last_block_is_the_code():
  assert extract("a\n```python\nx = 1\n```\nb\n```py\nx = 2\n```") == "x = 2\n"
  assert extract("x = 3") == "x = 3"


@pytest.mark.parametrize(
  ("code", "ended", "error"),
  [
    ("while True: pass", "killed by signal 9", ""),
    ("import os\nos._exit(0)", "exit 0", ""),
    ("import os\nos._exit(3)", "exit 3", ""),
    ("raise SystemExit(0)", "", "SystemExit: 0"),
    ("x = bytearray(1 << 30)", "", "MemoryError: "),
    ("open('x', 'wb').write(bytes(8 << 20))", "", "OSError: [Errno 27] File too large"),
    ("def f(): f()\nf()", "", "RecursionError: "),
    ("import os\nassert 'HOME' in os.environ and len(os.environ) < 9, os.environ", "", ""),
  ],
)
def test_limits(code, ended, error):
  outcome = run(code, ["pass"], LIMITS, weak=True)
  assert (outcome.ended, outcome.passed) == (ended, (not ended and not error,))
  assert outcome.error.startswith(error)


def test_what_hangs_is_killed():
  outcome = run("import time\ntime.sleep(60)", ["pass"], Limits(wall_s=3), weak=True)
  assert (outcome.ended, outcome.passed) == ("timed out", (False,))


def test_tests_before_one_that_hangs_are_kept():
  outcome = run(ADD, ["assert add(1, 1) == 2", "import time; time.sleep(60)", "pass"], Limits(wall_s=3), weak=True)
  assert (outcome.ended, outcome.passed) == ("timed out", (True, False, False))


def test_what_the_code_writes_is_no_report():
  said = b'{"test": 0, "error": ""}\n{"test": 1, "error": ""}\n'
  code = f"import os\nfor fd in range(20):\n  try: os.write(fd, {said!r})\n  except OSError: pass\nraise ValueError"
  assert run(code, ["pass"], LIMITS, weak=True).passed == (False,)


def test_code_is_a_module_and_not_the_program():
  code = "import dataclasses\n@dataclasses.dataclass\nclass A:\n  x: 'int' = 1\n"
  code += "if __name__ == '__main__': raise ValueError\n"
  assert run(code, ["assert A().x == 1"], LIMITS, weak=True).passed == (True,)


@needs_namespaces
@pytest.mark.parametrize(
  ("code", "error"),
  [
    ("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)", "OSError: [Errno 101] Network is unreachable"),
    ("import os\nos.kill(-1, 9)", "ProcessLookupError"),
    ("import os\nassert os.getpid() == 1 and not os.getppid() and not os.listdir('/proc'), os.listdir('/proc')", ""),
    ("open('/tmp/escaped', 'w')", "OSError: [Errno 30] Read-only file system"),
    ("open('inside', 'w').write('x')\nassert open('inside').read() == 'x'", ""),
    ("import os\nfor i in range(9): open(str(i), 'wb').write(bytes(1 << 20))", "OSError: [Errno 28] No space left"),
    (
      "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
      "assert libc.mount(None, b'/', None, 1 << 5, None), 'remounted'\nraise OSError(ctypes.get_errno(), 'mount')",
      "PermissionError: [Errno 1]",
    ),
  ],
)
def test_the_kernel_holds_code_in(code, error):
  outcome = run(code, [], LIMITS)
  assert outcome.error.startswith(error)
  assert bool(outcome.error) is bool(error)
  assert {"network", "processes", "files"} <= set(outcome.isolation)


@needs_namespaces
def test_processes_are_limited_and_end_with_the_run():
  code = (
    "import os, time\nfor _ in range(40):\n  if not os.fork():\n    os.setsid()\n    time.sleep(120)\n    os._exit(0)"
  )
  assert run(code, [], LIMITS).error.startswith("BlockingIOError")


@pytest.mark.parametrize(
  ("code", "error"),
  [
    ("import socket\nsocket.socket()", "PermissionError: socket.__new__ is not permitted here"),
    ("import os\nos.fork()", "PermissionError: os.fork"),
    ("import subprocess\nsubprocess.run(['true'])", "PermissionError: subprocess.Popen"),
    ("import ctypes\nctypes.CDLL(None)", "PermissionError: ctypes.dlopen"),
    ("open('/dev/shm/escaped', 'w')", "PermissionError: open of '/dev/shm/escaped'"),
    ("open('../escaped', 'w')", "PermissionError: open of '../escaped'"),
    ("import os\nos.remove('/etc/hostname')", "PermissionError: os.remove"),
    ("open('inside', 'w').write('x')\nassert open('inside').read() == 'x'", ""),
  ],
)
def test_the_audit_hook_stops_accidents(code, error, without_namespaces):
  outcome = run(code, [], LIMITS, weak=True)
  assert outcome.error.startswith(error)
  assert bool(outcome.error) is bool(error)
  assert "network" not in outcome.isolation
  with pytest.raises(Refused):
    run(code, [], LIMITS)


@pytest.fixture
def without_namespaces(tmp_path, monkeypatch):
  """A machine that permits no namespaces."""
  forbid_namespaces(tmp_path, monkeypatch)
  if os.geteuid() == 0:
    monkeypatch.setattr(sandbox.sys, "executable", readable_python())


def forbid_namespaces(folder, monkeypatch):
  shutil.copytree(sandbox._PROGRAM, folder / "cell")
  line = "  uid = os.getuid()\n  gid = os.getgid()\n"
  path = folder / "cell" / "kernel.py"
  text = path.read_text()
  assert line in text
  path.write_text(text.replace(line, f"  return False\n{line}"))
  monkeypatch.setattr(sandbox, "_PROGRAM", folder / "cell")


def readable_python():
  """A Python that every user can start, of this version."""
  for path in (sys.executable, "/usr/bin/python3"):
    program = "import sys; assert sys.version_info >= (3, 11)"
    try:
      subprocess.run([path, "-Ic", program], user=NOBODY, group=NOBODY, extra_groups=[], check=True, cwd="/")
    except (OSError, subprocess.CalledProcessError):
      continue
    return path
  pytest.skip("no Python here that every user can read")
