"""The extras resolve on the interpreters that are supported, against the package index. Nothing is installed."""

import json
import os
import shutil
import subprocess

import pytest

from tests import smoke

pytestmark = pytest.mark.slow


def absent(reason):
  """Skips the test; in CI, where nothing may be absent, fails it."""
  (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def interpreter(version):
  done = subprocess.run([smoke.ROOT / ".ci" / "interpreter", version], capture_output=True, text=True)
  if done.returncode:
    absent(done.stderr.strip())
  return done.stdout.strip()


def resolve(python, *requirements, folder):
  """Name -> version of what pip would install in an empty environment; the test fails where that cannot be.

  setup.py is copied into `folder` first, for pip writes beside it.
  """
  for file in ("setup.py", "pyproject.toml"):
    shutil.copy(smoke.ROOT / file, folder)
  report = folder / "report.json"
  command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", report]
  done = subprocess.run([*command, *requirements], cwd=folder, capture_output=True, text=True)
  unknown = [line.strip() for line in done.stderr.splitlines() if "(from versions: none)" in line]
  if unknown:  # every index has these packages
    absent(f"no package index: {unknown[0]}")
  assert done.returncode == 0, done.stderr[-3000:]
  found = [package["metadata"] for package in json.loads(report.read_text())["install"]]
  return {package["name"]: package["version"] for package in found}


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_the_extra_of_tpus_resolves_together_with_jax_of_tpus(version, tmp_path):
  versions = resolve(interpreter(version), ".[tpu]", "jax[tpu]", folder=tmp_path)
  assert {"alignjax", "jax", "libtpu", "requests"} <= versions.keys()
