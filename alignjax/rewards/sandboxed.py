"""The program that runs generated code: `python -I sandboxed.py`, a job as JSON on stdin, reports as lines on stdout.

Nothing of the package is imported here. `sandbox.py` starts it and says what it holds off.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import types

NOBODY = 65534
NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000  # mounts, IPC, processes, network
NEW_USER = 0x10000000
READ_ONLY, RECURSIVE, PRIVATE, NO_SUID, NO_DEVICES, AT_RECURSIVE = 1, 1 << 14, 1 << 18, 2, 4, 0x8000
MOUNT_SETATTR = 442  # the system call's number, on every machine
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
CAP_DAC_READ_SEARCH = 1 << 2
HIDDEN = ("/proc", "/run", "/var/run", "/dev/shm")  # other processes, sockets of services
ESCAPES = ("socket.", "ctypes.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system", "os.kill", "pty.")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown",
           "os.truncate", "os.utime", "shutil.")  # fmt: skip


def main() -> None:
  """Isolates itself as far as it can, then runs the job in a process of its own."""
  job = json.load(sys.stdin)
  report = _reporter(job["token"])
  reached = _isolate(job)
  if "network" not in reached and not job["weak"]:
    report(isolation=reached, refused=True)
    return
  signal.alarm(job["alarm_s"])  # ends it where its parent, which watches the time, is dead
  init = os.fork()  # the first process of the new namespace: when it ends, the kernel ends all others
  if init:
    os.waitpid(init, 0)
    return
  _libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  child = os.fork()
  if child:
    _, status = os.waitpid(child, 0)
    report(ended=os.waitstatus_to_exitcode(status))
    os._exit(0)
  reached = _confine(job, reached)
  refused = "network" not in reached and not job["weak"]
  report(isolation=reached, refused=refused)
  if refused:
    os._exit(0)
  if not {"network", "files"} <= set(reached):
    sys.addaudithook(_guard(os.getcwd()))
  _run(job, report)


def _run(job: dict, report) -> None:
  """Runs the code as a module, not as a program, then each test in the namespace that it leaves."""
  module = sys.modules["generated"] = types.ModuleType("generated")
  for number, text in enumerate([job["code"], *job["tests"]]):
    error = ""
    try:
      exec(compile(text, f"<test {number}>" if number else "<code>", "exec"), module.__dict__)
    except BaseException as raised:
      error = f"{type(raised).__name__}: {raised}"[:200]
    report(test=number, error=error)
    if error and not number:
      break
  os._exit(0)


def _reporter(token: str):
  """A function that writes a line to what was stdout; code that prints writes nowhere."""
  channel = os.dup(1)
  nowhere = os.open(os.devnull, os.O_RDWR)
  for number in (0, 1):
    os.dup2(nowhere, number)

  def report(**said) -> None:
    os.write(channel, (json.dumps({"token": token, **said}) + "\n").encode())

  return report


def _isolate(job: dict) -> list[str]:
  """New namespaces, and files read-only but for a small file system in the working directory; [] if not permitted."""
  if not sys.platform.startswith("linux"):
    return []
  libc, uid, gid = _libc(), os.getuid(), os.getgid()
  with_user = bool(uid or libc.unshare(NEW_NAMESPACES))
  if with_user and libc.unshare(NEW_NAMESPACES | NEW_USER):
    return []
  if with_user:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
      with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
  return ["network", "processes", *(["files"] if _lock_files(libc, job) else [])]


def _lock_files(libc, job: dict) -> bool:
  work = os.getcwd().encode()
  attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
  failed = libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None) or libc.syscall(
    MOUNT_SETATTR, -100, b"/", AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)
  )
  if failed:
    return False
  size = f"size={job['disk_bytes']},mode=777".encode()
  if libc.mount(b"tmpfs", work, b"tmpfs", NO_SUID | NO_DEVICES, size):
    return False
  for path in filter(os.path.isdir, HIDDEN):
    libc.mount(b"tmpfs", path.encode(), b"tmpfs", READ_ONLY | NO_SUID | NO_DEVICES, b"size=4k")
  os.chdir(work)
  return True


def _confine(job: dict, reached: list[str]) -> list[str]:
  """Limits, no privileges, and nobody's rights where it has root's."""
  for name, value in job["limits"].items():
    hard = resource.getrlimit(getattr(resource, name))[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(getattr(resource, name), (value, value))
  if not sys.platform.startswith("linux"):
    return reached
  libc, kept = _libc(), 0
  if os.getuid() == 0:
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    kept = 0 if _readable_by_all(os.__file__) else CAP_DAC_READ_SEARCH  # nobody must find Python's own modules
    with contextlib.suppress(OSError):  # a namespace may lack nobody
      os.setgroups([])
      os.setresgid(NOBODY, NOBODY, NOBODY)
      os.setresuid(NOBODY, NOBODY, NOBODY)
  libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
  header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(kept, kept)
  if libc.capset(ctypes.byref(header), ctypes.byref(sets)):
    return []  # with the rights of a namespace's owner, all could be undone
  return reached + (["user"] if os.getuid() else [])


def _readable_by_all(path: str) -> bool:
  """Whether any user can read a file, and reach it."""
  if not os.stat(path).st_mode & 0o004:
    return False
  while path != os.path.dirname(path):
    path = os.path.dirname(path)
    if not os.stat(path).st_mode & 0o001:
      return False
  return True


def _guard(work: str):
  """An audit hook against network, processes and changes outside `work`: Python's own doors, not the kernel's."""

  def hook(event: str, arguments: tuple) -> None:
    if event.startswith(ESCAPES):
      raise PermissionError(f"{event} is not permitted here")
    if event.startswith(CHANGES) or (event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
      path = arguments[0]
      inside = isinstance(path, str) and os.path.realpath(path).startswith(work + os.sep)
      if not inside and path != os.devnull:
        raise PermissionError(f"{event} of {path!r} is not permitted here")

  return hook


def _libc():
  return ctypes.CDLL(None, use_errno=True)


if __name__ == "__main__":
  main()
