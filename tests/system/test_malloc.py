import subprocess
import sys

import pytest

PROBE = """
import platform, resource
from alignjax.system import malloc
import numpy as np

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(20):
    np.ones(1 << 20)  # 8 MiB, touched and freed
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

np.ones(1 << 20)
before = faults()
took_effect = malloc.keep_freed()
np.ones(1 << 20)
print(platform.libc_ver()[0] == "glibc", took_effect, before, faults())
"""


def test_freed_memory_is_used_again_without_page_faults():
  out = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True).stdout
  is_glibc, took_effect, before, after = out.split()
  assert took_effect == is_glibc
  if is_glibc == "False":
    pytest.skip("the C library is not glibc")
  assert int(after) < int(before) / 10
