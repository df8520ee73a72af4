"""The isolation of a process by the kernel: namespaces, a root of its own, system calls, limits, rights.

The filter of system calls is written out here: no maintained library on PyPI makes one without a library of the system.
Source: Linux, seccomp(2), mount_setattr(2), user_namespaces(7).
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys

PARTS = ("network", "processes", "files", "user", "calls", "memory")
MOUNTS = 0x00020000
NEW_PROCESSES = 0x20000000
NAMESPACES = MOUNTS | NEW_PROCESSES | 0x08000000 | 0x40000000  # and IPC, network
NEW_USER = 0x10000000
READ_ONLY = 1  # flags of mount
NO_SUID = 2
NO_DEVICES = 4
BIND = 1 << 12
RECURSIVE = 1 << 14
PRIVATE = 1 << 18
AT_RECURSIVE = 0x8000  # of mount_setattr
DETACH = 2  # of umount2
MOUNT_SETATTR = 442  # the system call's number, on every machine
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG = 1  # options of prctl
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
FIRST_USER = 0x70000000  # from here on, no system gives numbers to its users
USERS = 1 << 28
COUNTED_BY_NAMESPACE = (5, 14)  # since this Linux, processes of one user are counted by user namespace
THREADS = 32

SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/usr", "/nix/store", "/etc/alternatives")
FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
EMPTY = ("/proc", "/run", "/tmp", "/var/tmp", "/dev/shm", "/home", "/root")

ESCAPES = ("socket.", "ctypes.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system", "os.kill", "pty.")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown",
           "os.truncate", "os.utime", "shutil.")  # fmt: skip

# Numbers on (x86_64, aarch64); None if the machine does not have the call.
DENIED: dict[str, tuple[int, int | None]] = {
  "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),  # opens sockets too
  "memfd_create": (319, 279), "memfd_secret": (447, 447),  # memory that no limit counts
  "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
  "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
  "pidfd_getfd": (438, 438),
  "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
  "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "fanotify_init": (300, 262),
  "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
  "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
  "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268), "name_to_handle_at": (303, 264),
  "open_by_handle_at": (304, 265), "quotactl": (179, 60), "acct": (163, 89),
  "swapon": (167, 224), "swapoff": (168, 225),
  "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
  "kexec_file_load": (320, 294), "reboot": (169, 142), "syslog": (103, 116), "personality": (135, 92),
  "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
  "sethostname": (170, 161), "vhangup": (153, 58),
  "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
}  # fmt: skip
SOCKETS = ((41, 198), (53, 199))  # socket and socketpair, of every family
CLONE = (56, 220)
CLONE3 = (435, 435)
FORKS = ((57, None), (58, None))  # fork and vfork
MACHINES = {
  "x86_64": (0, 0xC000003E),
  "aarch64": (1, 0xC00000B7),
}  # column above, the architecture's name in the kernel
NEW_ANYTHING = 0x7E020000  # flags of clone: any namespace
THREAD = 0x00010000
EPERM = 1
EAGAIN = 11
ENOSYS = 38
ENETUNREACH = 101


class UnreadableError(Exception):
  """Only root can read Python's own files, and code does not run as root."""


def isolate(disk_bytes: int, user: int) -> list[str]:
  """Enters new namespaces, with a root that contains the system, Python and an empty working directory.

  Args:
    disk_bytes: of the working directory, which is in memory.
    user: the number of the user that root becomes.

  Returns:
    The parts of PARTS that hold now; [] if namespaces are not permitted.

  Raises:
    UnreadableError: this process is root, and that user could not read Python's files.
  """
  root = os.getuid() == 0
  if root:
    with contextlib.suppress(OSError):  # a namespace may lack this user
      os.chown(".", user, user)
  reached = []
  if sys.platform.startswith("linux") and _enter_namespaces():
    reached += ["network", "processes"]
    if _new_root(disk_bytes):
      reached.append("files")
  if root:
    _check_readable("files" in reached)
  return reached


def new_processes() -> None:
  """Makes the next child the first process of a namespace of its own, in which it cannot see this one."""
  libc().unshare(NEW_PROCESSES)


def confine(limits: dict[str, int], user: int, forks: bool, reached: list[str]) -> list[str]:
  """Sets limits, gives up privileges, changes the user if it is root, and forbids all but harmless system calls.

  Args:
    limits: by name of `resource`.
    user: the number of the user that root becomes.
    forks: whether the process may start others.
    reached: the parts of PARTS that held before.

  Returns:
    The parts that hold now.
  """
  own_user = False
  if os.getuid() == 0:
    with contextlib.suppress(OSError):  # a namespace may lack this user
      os.setgroups([])
      os.setresgid(user, user, user)
      os.setresuid(user, user, user)
      own_user = True
  elif "processes" in reached:
    own_user = _version() >= COUNTED_BY_NAMESPACE
  _set_limits(limits, own_user)
  if not sys.platform.startswith("linux"):
    return []
  libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
  header = (ctypes.c_uint32 * 2)(0x20080522, 0)
  capabilities = (ctypes.c_uint32 * 6)()
  if libc().capset(ctypes.byref(header), ctypes.byref(capabilities)):
    return []  # with the rights of a namespace's owner, all of this could be undone
  reached = list(reached)
  if own_user:
    reached.append("user")
  if _filter_calls(forks):
    reached.append("calls")
    if not forks:
      reached.append("memory")
  return reached


def _set_limits(limits: dict[str, int], own_user: bool) -> None:
  """Sets the limits of this process, at most to those that it has."""
  for name, value in limits.items():
    if name == "RLIMIT_NPROC" and not own_user:
      continue  # it would count the processes of other runs
    number = getattr(resource, name, None)
    if number is None:
      continue
    _, hard = resource.getrlimit(number)
    if hard != resource.RLIM_INFINITY:
      value = min(value, hard)
    resource.setrlimit(number, (value, value))


def hide_memory() -> None:
  """Denies other processes of the same user access to this one's memory and files."""
  if sys.platform.startswith("linux"):
    libc().prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
  """Asks the kernel to kill this process when its parent ends."""
  if sys.platform.startswith("linux"):
    libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def guard(work: str) -> None:
  """Adds an audit hook against network, processes and changes outside `work`, through Python's own functions only."""

  def hook(event: str, arguments: tuple) -> None:
    if event.startswith(ESCAPES):
      raise PermissionError(f"{event} is not permitted here")
    if event.startswith(CHANGES) or (event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
      path = arguments[0]
      inside = isinstance(path, str) and os.path.realpath(path).startswith(work + os.sep)
      if not inside and path != os.devnull:
        raise PermissionError(f"{event} of {path!r} is not permitted here")

  sys.addaudithook(hook)


def libc():
  """Returns the C library of this process."""
  return ctypes.CDLL(None, use_errno=True)


def _enter_namespaces() -> bool:
  """Enters new namespaces; False if that is not permitted."""
  uid = os.getuid()
  gid = os.getgid()
  if uid == 0 and not libc().unshare(NAMESPACES):
    return True
  if libc().unshare(NAMESPACES | NEW_USER):
    return False
  for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
    with open(f"/proc/self/{name}", "w") as file:
      file.write(text)
  return True


def _prefixes() -> list[str]:
  """Returns the folders of Python itself and of its packages, except those of `SYSTEM`."""
  prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
  prefixes |= {os.path.realpath(path) for path in prefixes}
  outside = {path for path in prefixes if path != "/" and not _lies_in(path, SYSTEM)}
  return sorted(outside)  # a folder before those in it


def _lies_in(path: str, folders: tuple[str, ...]) -> bool:
  """Returns whether a path is one of the folders or in one."""
  return f"{path}/".startswith(tuple(f"{folder}/" for folder in folders))


def _check_readable(own_root: bool) -> None:
  """Raises UnreadableError if the user that root becomes could not read Python's own modules.

  Args:
    own_root: whether only the folders in `_prefixes` are checked, because those above are made anew.
  """
  prefixes = tuple(_prefixes())
  modules = {os.path.dirname(os.__file__), *filter(os.path.isdir, sys.path)}
  for path in sorted(modules):
    if not _lies_in(path, (*prefixes, *SYSTEM)):
      continue
    while path != "/" and (not own_root or _lies_in(path, prefixes)):
      if os.stat(path).st_mode & 0o001 == 0:
        raise UnreadableError(f"Python's own files lie in {path}, which only its owner may enter")
      path = os.path.dirname(path)


def _new_root(disk_bytes: int) -> bool:
  """Makes a root with only the files that are mounted here, whoever owns the others; False if that is not permitted."""
  work = os.getcwd()
  machine = os.uname().machine
  if machine not in PIVOT_ROOT or _mount(None, "/", None, RECURSIVE | PRIVATE):
    return False
  if _mount("tmpfs", work, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755"):
    return False
  os.umask(0o022)
  for path in (*SYSTEM, *_prefixes()):
    if os.path.islink(path) and path in SYSTEM:
      os.symlink(os.readlink(path), work + path)
    elif os.path.isdir(path):
      os.makedirs(work + path, exist_ok=True)
      if _mount(path, work + path, None, BIND | RECURSIVE):
        return False
  for path in filter(os.path.exists, FILES):
    os.makedirs(work + os.path.dirname(path), exist_ok=True)
    with open(work + path, "w"):
      pass
    if _mount(os.path.realpath(path), work + path, None, BIND):
      return False
  for path in (*EMPTY, work):
    with contextlib.suppress(FileExistsError):
      os.makedirs(work + path)
  attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID, 0, 0, 0)
  size = ctypes.c_size_t(ctypes.sizeof(attributes))
  if libc().syscall(MOUNT_SETATTR, -100, os.fsencode(work), AT_RECURSIVE, ctypes.byref(attributes), size):
    return False
  if _mount("tmpfs", work + work, "tmpfs", NO_SUID | NO_DEVICES, f"size={disk_bytes},nr_inodes=4k,mode=777"):
    return False
  os.chdir(work)
  if libc().syscall(PIVOT_ROOT[machine], b".", b".") or libc().umount2(b".", DETACH):
    return False
  os.chdir(work)
  return True


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> int:
  """mount(2); 0 if it succeeds."""
  texts = [text and os.fsencode(text) for text in (source, target, kind, options)]
  return libc().mount(*texts[:3], ctypes.c_ulong(flags), texts[3])


def _filter_calls(forks: bool) -> bool:
  """Filters the system calls of this process and its children; False if the machine does not support it."""
  machine = os.uname().machine
  if machine not in MACHINES or sys.maxsize < 1 << 32:
    return False
  column, architecture = MACHINES[machine]
  program = filter_program(column, architecture, forks)
  text = ctypes.create_string_buffer(program)
  header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(text)))
  return libc().prctl(PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(header)), 0, 0) == 0


def filter_program(column: int, architecture: int, forks: bool) -> bytes:
  """Assembles the filter in the kernel's own instructions: code, jump if true, jump if false, operand.

  A call of another architecture ends the process; x86's second set of numbers is refused completely.

  Args:
    column: of the numbers in `DENIED` and the like, as in `MACHINES`.
    architecture: its name in the kernel, as in `MACHINES`.
    forks: whether the process may start others.
  """
  load = 0x20
  equal = 0x15
  at_least = 0x35
  any_bit = 0x45
  answer = 0x06
  allow = 0x7FFF0000
  kill = 0x80000000
  refuse = 0x00050000
  lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]

  def when(test: int, operand: int, error: int) -> None:
    lines.extend([(test, 0, 1, operand), (answer, 0, 0, refuse | error)])

  when(at_least, 0x40000000, EPERM)
  for sockets in SOCKETS:
    when(equal, sockets[column], ENETUNREACH)
  for denied in DENIED.values():
    if (number := denied[column]) is not None:
      when(equal, number, EPERM)
  when(equal, CLONE3[column], ENOSYS)  # its flags are in memory; the C library then uses clone
  if not forks:
    for fork in FORKS:
      if (number := fork[column]) is not None:
        when(equal, number, EAGAIN)
  lines += [(equal, 1, 0, CLONE[column]), (answer, 0, 0, allow), (load, 0, 0, 16)]
  when(any_bit, NEW_ANYTHING, EPERM)
  if not forks:
    lines += [(any_bit, 1, 0, THREAD), (answer, 0, 0, refuse | EAGAIN)]
  lines.append((answer, 0, 0, allow))
  return b"".join(struct.pack("HBBI", *line) for line in lines)


def _version() -> tuple[int, int]:
  """Returns the kernel's major and minor version."""
  major, minor = os.uname().release.split(".")[:2]
  return int(major), int("".join(filter(str.isdigit, minor)) or 0)
