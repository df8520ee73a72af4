"""An environment of its own for TRL and torch, made once and kept."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
REQUIREMENTS = BENCHMARKS / "requirements-trl.txt"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignjax" / "test-environments"


@functools.cache
def python() -> str:
  """The interpreter of the environment; skips the test, with pip's reason, where it can not be made."""
  key = hashlib.sha256(f"{sys.version}\n{REQUIREMENTS.read_text()}".encode()).hexdigest()[:16]
  folder = CACHE / key
  if not (folder / "complete").exists():  # nothing, or what an interrupted installation left
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
      errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
      pytest.skip(f"{REQUIREMENTS.name} can not be installed: {(errors or ['pip failed'])[-1]}")
    (folder / "complete").touch()
  return str(folder / "bin" / "python")


def run(script: str, *arguments: str) -> None:
  """Runs a script of benchmarks/ in the environment, or fails with the end of what it printed."""
  offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
  command = [python(), str(BENCHMARKS / script), *arguments]
  done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
  if done.returncode:
    pytest.fail(f"{script}: {(done.stdout + done.stderr)[-3000:]}")
