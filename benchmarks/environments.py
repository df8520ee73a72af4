"""Environments of their own for what benchmarks and tests compare with: each made once from a file, and kept."""

import datetime
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv

FOLDER = pathlib.Path(__file__).parent
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "alignjax"
# Nothing is looked up anywhere, no other package's modules are seen, and JAX takes the processor.
SETTINGS = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": "", "JAX_PLATFORMS": "cpu"}


class NotInstalled(Exception):
  """pip's last word."""


@functools.cache
def python(requirements: str) -> str:
  """The interpreter of the environment of a file in this folder.

  Raises:
    NotInstalled: pip can not install what the file asks for.
  """
  file = FOLDER / requirements
  return _made(requirements, file.read_text(), ["-r", str(file)], beside=False)


@functools.cache
def of_packages(*packages: str) -> str:
  """The interpreter of an environment of packages in their current release; what it lacks, it takes from this one.

  Raises:
    NotInstalled: as `python`.
  """
  # By the day, so that a later release is tried too.
  day = datetime.date.today().isoformat()
  return _made(" ".join(packages), f"{' '.join(packages)}\n{sys.prefix}\n{day}", [*packages], beside=True)


def _made(name: str, text: str, wanted: list[str], *, beside: bool) -> str:
  key = hashlib.sha256(f"{sys.version}\n{text}".encode()).hexdigest()[:16]
  folder = CACHE / "test-environments" / key
  if not (folder / "complete").exists():  # nothing, or what an interrupted installation left
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
      errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
      raise NotInstalled(f"{name} can not be installed: {(errors or ['pip failed'])[-1]}")
    if beside:
      (own,) = (folder / "lib").glob("python*/site-packages")
      (own / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "complete").touch()
  return str(folder / "bin" / "python")
