"""Tests that need torch, transformers and TRL run them in an environment of their own."""

import os
import subprocess

import pytest

from benchmarks import environments


def python(requirements: str = "requirements-trl.txt") -> str:
  """The interpreter of the environment; skips the test, with pip's reason, where it can not be made."""
  try:
    return environments.python(requirements)
  except environments.NotInstalled as error:
    pytest.skip(str(error))


def run(script: str, *arguments: str) -> None:
  """Runs a script of benchmarks/ in the environment, or fails with the end of what it printed."""
  command = [python(), str(environments.FOLDER / script), *arguments]
  done = subprocess.run(command, env=os.environ | environments.SETTINGS, capture_output=True, text=True)
  if done.returncode:
    pytest.fail(f"{script}: {(done.stdout + done.stderr)[-3000:]}")
