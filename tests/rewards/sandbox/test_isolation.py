"""A reward in a process of its own: whatever it does, one completion costs itself alone."""

import gc
import os
import subprocess
import sys
import time

import psutil
import pytest

from alignjax.errors import InputError
from alignjax.rewards import isolated, score
from tests.rewards.sandbox import hanging


def ask(reward, *completions):
  columns = {"answer": ["x" * (i + 1) for i in range(len(completions))]}
  count = len(completions)
  return score(
    {"a": reward}, ["p"] * count, completions, [[]] * count, columns, time_limit_s=60, report=lambda line: None
  )


def test_a_hang_a_crash_and_an_exception_cost_one_completion_each():
  reward = isolated(hanging.score, time_limit_s=1.0, memory_mib=2048)
  scores = ask(reward, "fine", "raise", "fine", "regex", "fine", "exit", "memory", "fine")
  values = [None if value != value else value for value in scores.values.ravel().tolist()]
  assert values == [1, None, 3, None, 5, None, None, 8]
  assert [(failure.kind, failure.cause) for failure in scores.failures] == [
    ("raised", "ValueError: asked to"),
    ("timed out", "TimeoutError: no answer within 1 s; its process was killed"),
    ("raised", "ChildProcessError: its process ended with status 7"),
    ("raised", "MemoryError"),
  ]
  assert not scores.retried


def test_an_end_and_an_answer_that_cannot_be_sent_are_raised_and_the_process_goes_on():
  scores = ask(isolated(hanging.score), "leave", "interrupt", "local", "pid")
  causes = [failure.cause for failure in scores.failures]
  assert causes[:2] == ["SystemExit: 3", "KeyboardInterrupt"]
  assert "pickle" in causes[2]
  assert [failure.kind for failure in scores.failures] == ["raised"] * 3
  assert scores.values[3, 0] > 0


def test_the_process_serves_the_next_call_and_ends_with_the_reward():
  reward = isolated(hanging.score)
  (first,), (second,) = (ask(reward, "pid").values[0] for _ in range(2))
  assert first == second != os.getpid()
  process = psutil.Process(int(first))
  process.kill()  # as the system does where memory runs out
  while process.status() != psutil.STATUS_ZOMBIE:
    time.sleep(0.01)
  scores = ask(reward, "pid")
  assert not scores.failures
  (third,) = scores.values[0]
  assert third != first
  del reward
  gc.collect()
  assert not psutil.pid_exists(int(third))
  assert not psutil.pid_exists(int(first))


def test_the_process_ends_where_its_parent_is_killed():
  program = (
    "import os\nfrom alignjax.rewards import isolated\nfrom tests.rewards.sandbox import hanging\n"
    "reward = isolated(hanging.score)\nprint(int(reward(['p'], ['pid'], [[]], {})[0]), flush=True)\n"
    "os.kill(os.getpid(), 9)"
  )
  done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False)
  pid = int(done.stdout)
  for _ in range(100):
    if not psutil.pid_exists(pid):
      return
    time.sleep(0.05)
  pytest.fail("the process still runs")


@pytest.mark.parametrize("limit", [{"time_limit_s": 0.0}, {"time_limit_s": -1.0}, {"memory_mib": 0}])
def test_a_limit_that_nothing_meets_is_refused(limit):
  with pytest.raises(InputError, match=f"{next(iter(limit))} of a reward .* give more than 0"):
    isolated(hanging.score, **limit)


def test_a_function_that_no_process_can_import_is_refused():
  with pytest.raises(InputError, match="define it at the top level of a module"):
    isolated(lambda *batch: [0.0])


def test_a_module_that_can_not_be_imported_there_says_why(monkeypatch):
  reward = isolated(hanging.score)
  monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" in path])
  monkeypatch.chdir("/")
  scores = ask(reward, "fine")
  assert "Error" in scores.failures[0].cause
