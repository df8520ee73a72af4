"""Freed memory stays with the process.

XLA on a CPU asks the C library for its buffers at every step. glibc hands large ones back to the kernel as soon as they
are freed, and the kernel zeroes every page when it is asked for them again: a fifth of a small model's step.
"""

import ctypes
import platform

# Names and numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed() -> bool:
  """Tells glibc to keep freed memory for the next allocation; for processes whose work is ours.

  Resident memory then stays at its peak. Call it early: threads that have allocated keep the arenas that they have.

  Returns:
    Whether it took effect; False where the C library is not glibc.
  """
  if platform.libc_ver()[0] != "glibc":
    return False
  mallopt = ctypes.CDLL(None).mallopt
  settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26}
  return all(mallopt(option, value) == 1 for option, value in settings.items())
