"""What generated code can not do: pass a test that it fails, reach the machine, or reach another completion."""

import concurrent.futures
import importlib.util
import os
import socket
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from alignjax.rewards.sandbox import sandbox
from alignjax.rewards.sandbox.sandbox import PARTS, Limits, Refused, run
from tests.rewards.sandbox.generated import FORGED, KINDS_OF_TESTS, USES
from tests.rewards.sandbox.test_code import NOBODY, forbid_namespaces, needs_namespaces, readable_python

LIMITS = Limits(wall_s=60.0, cpu_s=5, memory_mib=512, disk_mib=4)
RIGHT = "def f(x): return 2 * x\n"
WRONG = "def f(x): return 3\n"


@pytest.fixture(scope="module")
def weak():
  """Whether the machine isolates less than all that is required."""
  return not set(PARTS) <= set(run("", [], LIMITS, weak=True).isolation)


def test_tests_use_the_code_as_if_it_were_theirs(weak):
  code = "import math, types\n"
  tests = []
  for number, (text, test) in enumerate(USES.values()):
    code += f"m{number} = types.ModuleType('m{number}')\nexec({text!r}, vars(m{number}))\n"
    tests.append(f"for name in 'fgPMCE': globals()[name] = getattr(m{number}, name, None)\n{test}")
  outcome = run(code, tests, LIMITS, weak)
  assert dict(zip(USES, outcome.passed, strict=True)) == dict.fromkeys(USES, True), outcome


def test_right_code_passes_every_kind_of_test(weak):
  outcome = run(RIGHT, KINDS_OF_TESTS, LIMITS, weak)
  assert all(outcome.passed), outcome


def test_tests_may_import_the_code(weak):
  tests = ["import generated\nassert generated.f(2) == 4", "from generated import f as g\nassert g(2) == 4"]
  tests += ["from generated import *\nassert f(1) == 2", "import generated\nassert not hasattr(generated, 'h')"]
  assert run(RIGHT, tests, LIMITS, weak).passed == (True,) * 4


def test_a_function_may_have_a_name_of_pythons_own(weak):
  assert run("def sum(a, b): return 6", ["assert sum(10, 15) == 6"], LIMITS, weak).passed == (True,)


@pytest.mark.parametrize("name", FORGED)
def test_code_cannot_forge_a_pass(name, weak):
  outcome = run(FORGED[name], KINDS_OF_TESTS, LIMITS, weak)
  assert outcome.passed == (False,) * len(KINDS_OF_TESTS), outcome


@pytest.mark.parametrize(
  ("code", "ended"),
  [
    ("import os\ndef f(x): os._exit(0)", "exit 0"),
    ("import os, threading\ndef f(x):\n  threading.Timer(0.05, os._exit, [0]).start()\n  return 4", "exit 0"),
    ("import os\ndef f(x): os.abort()", "killed by signal"),
  ],
)
def test_code_that_ends_has_not_passed(code, ended, weak):
  outcome = run(code, ["import time\nassert f(2) == 4\ntime.sleep(0.2)", "pass"], LIMITS, weak)
  assert outcome.passed == (False, False)
  assert outcome.ended.startswith(ended)


@pytest.mark.parametrize(
  "said",
  [
    "b'[' * 200_000 + b'\\n'",
    "b'9' * 6000 + b'\\n'",
    "b'\\xff\\xfe\\n'",
    'b\'["=", NaN, ["l"], ""]\\n\'',
    'b\'["=", ["v", "os", "system", "true"], ["l"], ""]\\n\'',
    "b'x' * 20_000_000",
    "b'[1]\\n' * 10_000",
    'b\'{"test": 1, "error": ""}\\n\'',
  ],
)
def test_what_code_writes_to_its_descriptors_makes_it_wrong_and_not_failed(said, weak):
  code = textwrap.dedent(f"""
    import os
    def f(x):
      for number in range(3, 16):
        try:
          left = memoryview({said})
          while left: left = left[os.write(number, left):]
        except OSError: pass
      return 3
  """)
  assert run(code, ["assert f(2) == 4"], LIMITS, weak).passed == (False,)


def test_numpy_takes_no_address_from_the_code(weak):
  pytest.importorskip("numpy")
  test = "import numpy as np\nassert np.asarray(f(2)).dtype == object and not np.array_equal(f(2), 4)"
  limits = Limits(wall_s=60.0, memory_mib=1024)
  outcome = run(FORGED["an address"], [test, "import numpy as np\nassert np.allclose(f(2), 4)"], limits, weak)
  assert outcome.passed == (True, False), outcome


def test_code_cannot_read_the_tests(weak):
  code = (
    "import gc, os\nkinds = str, list, dict\n"
    "found = [o for o in gc.get_objects() if type(o) in kinds and 'Z' * 9 in repr(o)[:10000]]\n"
    "def f(x): return 4 if found or os.read(0, 1) else 3"
  )
  assert run(code, [f"'{'Z' * 9}'\nassert f(2) == 4"], LIMITS, weak).passed == (False,)


def test_a_function_of_the_tests_leads_nowhere_else(weak):
  code = "def f(g, name):\n  try:\n    getattr(g, name)\n  except PermissionError:\n    return 'refused'"
  tests = [
    "assert f(lambda: 0, '__globals__') == 'refused'",
    "assert f((x for x in [1]), 'gi_frame') == 'refused'",
    "class Own:\n  public, _private = 1, 2\nassert f(Own(), 'public') is None and f(Own(), '_private') == 'refused'",
    "import os\nassert f(os, 'system') == 'refused'",
    "from unittest.mock import MagicMock\nassert f(MagicMock(), 'configure_mock') == 'refused'",
  ]
  outcome = run(code, tests, LIMITS, weak)
  assert all(outcome.passed), outcome


def test_a_test_that_defines_nothing_to_run_or_skips_all_has_not_passed(weak):
  tests = [
    "import unittest\nunittest.main(exit=False)",
    "import unittest\n@unittest.skip('no')\nclass A(unittest.TestCase):\n  def test(self): pass\nunittest.main()",
  ]
  assert run(RIGHT, tests, LIMITS, weak).passed == (False, False)


@needs_namespaces
def test_no_socket_of_any_family_can_be_made(tmp_path):
  """Nor are the places there where services have theirs."""
  path = str(tmp_path / "service")
  roots = [Path(root) for root in (sys.prefix, sys.base_prefix)]
  interpreters = {root.parts[2] for root in roots if root.is_relative_to("/tmp")}
  with socket.socket(socket.AF_UNIX) as service:
    service.bind(path)
    os.chmod(path, 0o777)
    service.listen()
    code = textwrap.dedent(f"""
      import os, socket
      made = []
      for family in range(46):
        for kind in (1, 2, 3, 5):
          try: made.append((family, kind, socket.socket(family, kind)))
          except OSError as error: refused = error
      try: made.append(socket.socketpair())
      except OSError: pass
      there = os.path.exists({path!r}), os.listdir("/tmp"), os.listdir("/home")
    """)
    # In /tmp lies the folder of the code; beside it only the interpreter, where that was installed in /tmp.
    work = f"""
assert not made, made
assert there[0] is False and there[2] == [], there
assert len([name for name in there[1] if name not in {interpreters!r}]) == 1, there
"""
    outcome = run(code, [work, "assert 'unreachable' in str(refused), refused"], LIMITS)
  assert all(outcome.passed), outcome


@needs_namespaces
def test_calls_that_reach_the_kernel_or_share_memory_are_refused():
  code = textwrap.dedent("""
    import ctypes, mmap, os
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = {"x86_64": (425, 319, 447, 29, 68, 240, 101, 310, 311, 248, 250, 321, 298, 323, 165, 272, 308, 304),
               "aarch64": (425, 279, 447, 194, 186, 180, 117, 270, 271, 217, 219, 280, 241, 282, 40, 97, 268, 265)}
    def done():
      def refused(n): return libc.syscall(n, 0, 4096, 0o1600, 0, 0) == -1 and ctypes.get_errno() == 1
      return [n for n in numbers[os.uname().machine] if not refused(n)]
    def forks():
      try: os.fork()
      except BlockingIOError: return False
      return True
    def shared():
      kept = []
      try:
        while True:
          kept.append(mmap.mmap(-1, 64 << 20))
      except OSError:
        return len(kept) * 64
  """)
  outcome = run(code, ["assert done() == [], done()", "assert not forks()", "assert shared() <= 512, shared()"], LIMITS)
  assert all(outcome.passed), outcome


@needs_namespaces
def test_files_of_the_machine_are_not_there(tmp_path):
  secret = tmp_path / "secret"
  secret.write_text("s")
  paths = str(secret), "/etc/shadow", "/etc/passwd", "/proc/1/environ"
  code = f"import os\nfound = [path for path in {paths} if os.path.exists(path)]"
  code += "\ntried = os.system, os.listdir('/run'), os.listdir('/dev/shm')"
  outcome = run(code, ["assert found == [], found", "assert tried[1] == tried[2] == []"], LIMITS)
  assert all(outcome.passed), outcome


@needs_namespaces
def test_a_completion_that_takes_all_threads_does_not_touch_its_neighbours():
  hog = "import threading, time\ntry:\n  for _ in range(200): threading.Thread(target=time.sleep, args=(4,)).start()\n"
  hog += "except RuntimeError: pass\ndef f(x):\n  time.sleep(3)\n  return 3"
  right = "import concurrent.futures\ndef f(x):\n  with concurrent.futures.ThreadPoolExecutor(8) as pool:\n"
  right += "    return sum(pool.map(lambda i: x, [1, 2]))"
  jobs = [hog, hog, right, right, right]
  with concurrent.futures.ThreadPoolExecutor(5) as pool:
    outcomes = list(pool.map(lambda code: run(code, ["assert f(2) == 4"], LIMITS), jobs))
  assert [outcome.passed for outcome in outcomes] == [(False,)] * 2 + [(True,)] * 3, outcomes


@needs_namespaces
def test_every_run_of_root_has_a_user_of_its_own():
  if os.geteuid():
    pytest.skip("a user keeps its number, in a namespace of its own")
  users = {run("import os\nraise ValueError(os.getuid())", [], LIMITS).error for _ in range(3)}
  assert len(users) == 3
  assert str(NOBODY) not in str(users)


def test_a_kill_from_outside_is_a_failure_and_not_the_codes(weak):
  """As of the system where memory runs out."""
  if weak:
    pytest.skip("without a namespace of processes code can kill itself")
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    waiting = pool.submit(run, "import time\ntime.sleep(60)", ["pass"], LIMITS)
    _kill_deepest(os.getpid())
    with pytest.raises(RuntimeError, match="killed from outside"):
      waiting.result(60)


def test_code_ends_where_the_run_is_killed():
  program = (
    "import os, threading, time\nfrom alignjax.rewards.sandbox.sandbox import Limits, run\n"
    "code = 'import time\\ntime.sleep(50)'\nlimits = Limits(wall_s=60)\n"
    "threading.Thread(target=run, args=(code, [], limits, True), daemon=True).start()\n"
    "import psutil\nme = psutil.Process()\n"
    "while len(me.children(recursive=True)) < 4: time.sleep(0.05)\n"
    "print(*[child.pid for child in me.children(recursive=True)], flush=True)\nos.kill(os.getpid(), 9)"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
  left = list(map(int, done.stdout.split()))
  assert len(left) == 4
  for _ in range(100):
    if not any(map(psutil.pid_exists, left)):
      return
    time.sleep(0.05)
  pytest.fail("the code still runs")


def _kill_deepest(parent):
  for _ in range(600):
    found = [p for p in psutil.Process(parent).children(recursive=True) if "cell" in "".join(p.cmdline())]
    if len(found) >= 4:
      time.sleep(0.5)
      depth = {process.pid: len(process.parents()) for process in found}
      max(found, key=lambda process: depth[process.pid]).kill()
      return
    time.sleep(0.05)
  pytest.fail("no process of the code")


def test_the_time_that_the_machine_needs_to_start_is_not_the_codes(monkeypatch, weak):
  """A busy machine takes longer than the code's own limit before the code begins."""
  slow = subprocess.Popen

  class Slow(slow):
    def __init__(self, command, **more):
      super().__init__(["/bin/sh", "-c", 'sleep 3; exec "$@"', "sh", *command], **more)

  monkeypatch.setattr(sandbox.subprocess, "Popen", Slow)
  assert run(RIGHT, ["assert f(2) == 4"], Limits(wall_s=2.9), weak).passed == (True,)


def test_root_does_not_run_code_where_other_users_cannot_read_python(tmp_path, monkeypatch):
  """Rather than keep the right to read all."""
  if os.geteuid():
    pytest.skip("for root")
  folder = os.path.dirname(os.__file__)
  while folder != "/" and os.stat(folder).st_mode & 1:
    folder = os.path.dirname(folder)
  if folder == "/":
    pytest.skip("every user can read this Python")
  outcome = run(
    "import sqlite3, decimal, os", [f"import os\nassert len(os.listdir({folder!r})) < 2"], LIMITS, weak=True
  )
  assert ("user" in outcome.isolation, outcome.passed) == (True, (True,)), outcome
  forbid_namespaces(tmp_path, monkeypatch)
  with pytest.raises(Refused, match=f"Python's own files lie in {folder}, which only its owner may enter"):
    run("", [], LIMITS, weak=True)


def test_a_plain_user_has_the_same_isolation_where_namespaces_are_permitted(tmp_path):
  if os.geteuid():
    pytest.skip("what runs here is a plain user's already")
  program = textwrap.dedent(f"""
    import importlib.util, sys
    spec = importlib.util.spec_from_file_location("sandbox", {sandbox.__file__!r})
    module = sys.modules["sandbox"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code = "import os\\ndef f(x): return 2 * x\\nuser = os.getuid()\\nhome = os.listdir('/home') + os.listdir('/root')"
    tests = ["assert f(2) == 4", "assert user == {NOBODY} and home == []", "assert f(2) == 5"]
    try:
      print(module.run(code, tests, module.Limits(wall_s=60)))
    except module.Refused as refused:
      print(refused)
  """)
  done = subprocess.run(
    [readable_python(), "-c", program], user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", text=True, check=False,
    capture_output=True, env={"PATH": "/usr/bin:/bin"},
  )  # fmt: skip
  if "Permission" in done.stderr:
    pytest.skip("the package lies where its user alone may read")
  if "does not isolate" in done.stdout:
    pytest.skip("the kernel permits a plain user no namespaces")
  assert f"passed=(True, True, False), ended='', error='AssertionError: ', isolation={PARTS}" in done.stdout, done


@pytest.mark.parametrize(("machine", "forks"), [("x86_64", False), ("x86_64", True), ("aarch64", False)])
def test_the_filter_of_calls(machine, forks):
  kernel = _kernel()
  column, architecture = kernel.MACHINES[machine]
  program = list(struct.iter_unpack("HBBI", kernel.filter_program(column, architecture, forks)))

  def answer(number, argument=0, of=architecture):
    place = value = 0
    while True:
      code, yes, no, operand = program[place]
      if code == 0x20:
        value = {4: of, 0: number, 16: argument}[operand]
      elif code == 0x06:
        return operand
      else:
        holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
        place += yes if holds else no
      place += 1

  allow, refuse, kill = 0x7FFF0000, 0x00050000, 0x80000000
  assert answer(0) == allow
  assert answer(kernel.SOCKETS[0][column]) == refuse | 101
  assert {answer(n[column]) for n in kernel.DENIED.values() if n[column] is not None} == {refuse | 1}
  assert answer(0x40000001) == refuse | 1
  assert answer(0, of=1) == kill
  thread, fork, new_user = 0x003D0F00, 17, 0x10000000 | 17
  clone = kernel.CLONE[column]
  assert answer(clone, thread) == allow
  assert answer(clone, fork) == (allow if forks else refuse | 11)
  assert answer(clone, new_user) == refuse | 1
  assert answer(kernel.CLONE3[column]) == refuse | 38


def _kernel():
  spec = importlib.util.spec_from_file_location("kernel", sandbox._PROGRAM / "kernel.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert module.PARTS == PARTS
  return module
