"""Four processes: the first isolates itself and waits; its child runs the tests; whose child waits for the code's.

The job is read from stdin: the length of a head in 20 digits, the head (JSON), the tests (JSON). Reports are lines of
JSON on stdout, which the code's process does not have.
"""

import json
import os
import select
import signal
import sys

import code_side
import kernel
import peer
import test_side

# Neither the code nor the tests import anything from here.
sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
for _name in ("code_side", "kernel", "peer", "test_side", "wire"):
  del sys.modules[_name]


def main() -> None:
  """Isolates this process as far as possible, then runs the tests of the job in a process of their own."""
  head = json.loads(_read(int(_read(20))))
  channel = os.dup(1)
  nowhere = os.open(os.devnull, os.O_RDWR)
  os.dup2(nowhere, 1)
  os.close(nowhere)
  head["user"] = kernel.FIRST_USER + int.from_bytes(os.urandom(4), "little") % kernel.USERS
  try:
    reached = kernel.isolate(head["disk_bytes"], head["user"])
  except kernel.UnreadableError as error:
    _report(channel, refused=str(error))
    return
  kernel.hide_memory()
  kernel.die_with_parent()
  signal.alarm(head["alarm_s"])  # in case the parent, which limits the time, is already dead
  tests = os.fork()  # the first process of the new namespace: when it ends, the kernel ends all others
  if tests:
    _, status, usage = os.wait4(tests, 0)
    if status:
      _report(channel, **_told(status, usage.ru_utime + usage.ru_stime, head, "processes" in reached))
    os._exit(0)
  _run(head, reached, channel)
  os._exit(0)


def _run(head: dict, reached: list[str], channel: int) -> None:
  """The tests' process: starts the code's, which does not have the tests."""
  kernel.die_with_parent()
  to_code = os.pipe()
  to_tests = os.pipe()
  end = os.pipe()
  if not os.fork():
    for number in (channel, to_code[1], to_tests[0], end[0]):
      os.close(number)
    _start_code(head, reached, peer.Pipe(to_code[0], to_tests[1]), end[1])
    os._exit(0)
  for number in (to_code[0], to_tests[1], end[1]):
    os.close(number)
  tests = json.loads(_read(None))
  mine = kernel.confine(head["limits"], head["user"], False, reached)
  kernel.hide_memory()  # another user is another start
  if _is_guarded(mine):
    kernel.guard(os.getcwd())
  pipe = peer.Pipe(to_tests[0], to_code[1])
  try:
    theirs = pipe.receive()
  except peer.EndedError:
    theirs = None
  if not isinstance(theirs, list):
    _report(channel, failed=f"the code's process did not begin: {_status(end[0], head, False)}")
    return
  isolation = [part for part in kernel.PARTS if part in mine and part in theirs]
  missing = [part for part in head["required"] if part not in isolation]
  if missing:
    _report(channel, isolation=isolation, refused=f"missing {', '.join(missing)}")
    return
  _report(channel, isolation=isolation)
  pipe.send(head["code"])
  alive = test_side.main(pipe, tests, lambda **said: _report(channel, **said))
  if not alive:
    _report(channel, **_status(end[0], head, "processes" in isolation))


def _start_code(head: dict, reached: list[str], pipe: peer.Pipe, end: int) -> None:
  """Runs the code in a namespace of its own, in which it can see only itself, and writes how it ended to `end`."""
  kernel.die_with_parent()
  nowhere = os.open(os.devnull, os.O_RDWR)
  os.dup2(nowhere, 0)  # the tests can be read from it
  os.dup2(nowhere, 2)
  if "processes" in reached:
    kernel.new_processes()
  child = os.fork()
  if not child:
    os.close(end)
    os.close(nowhere)
    held = kernel.confine(head["limits"], head["user"], head["forks"], reached)
    code_side.main(pipe, held, _is_guarded(held))
    os._exit(0)
  pipe.close()
  _, status, usage = os.wait4(child, 0)
  os.write(end, json.dumps([status, usage.ru_utime + usage.ru_stime]).encode())


def _is_guarded(held: list[str]) -> bool:
  """Returns whether the kernel leaves network or files open, so that the audit hook is needed."""
  return not {"network", "files"} <= set(held)


def _status(end: int, head: dict, own_namespace: bool) -> dict:
  """Returns the report of how the code's process ended; that it broke off if it has not ended."""
  readable, _, _ = select.select([end], [], [], 0.2)
  if not readable or not (line := os.read(end, 1000)):
    return {"broke": True}
  status, spent = json.loads(line)
  return _told(status, spent, head, own_namespace)


def _told(status: int, spent: float, head: dict, own_namespace: bool) -> dict:
  """The report of a process's end; a failure of the sandbox if it was killed in a namespace of its own from outside."""
  ended = os.waitstatus_to_exitcode(status)
  if ended == -signal.SIGKILL and own_namespace and spent < head["limits"]["RLIMIT_CPU"] - 0.5:
    return {"failed": "a process was killed from outside; the machine may lack memory"}
  return {"ended": ended}


def _read(count: int | None) -> bytes:
  """Reads bytes of stdin, and no more: all that is read is in the memory of every process that is made from here."""
  parts = []
  while count is None or count:
    part = os.read(0, min(count or 1 << 16, 1 << 20))
    if not part:
      break
    parts.append(part)
    count = count and count - len(part)
  return b"".join(parts)


def _report(channel: int, **fields) -> None:
  """Writes a report as a line."""
  os.write(channel, (json.dumps(fields) + "\n").encode())
