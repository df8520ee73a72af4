"""Whose Python is imported: what a run's record names only with permission, for a run may come from anywhere."""

import argparse
import contextlib
import os
from collections.abc import Collection, Iterable, Iterator

from etils import epath

from alignjax.errors import InputError

TRUST = "ALIGNJAX_TRUST_RUN_CODE"  # environment variable: "1" lets the records of runs name Python to import


def add_flag(parser: argparse.ArgumentParser) -> None:
  """Adds the flag that permits it."""
  known = "import the Python that a run's own record names (a model.module, a loss, rewards): it may do anything"
  parser.add_argument("--trust-run-code", action="store_true", help=known)


@contextlib.contextmanager
def trusting(trusted: bool) -> Iterator[None]:
  """Runs and processes within may import what records name, where `trusted`; otherwise as the environment says."""
  before = os.environ.get(TRUST)
  if trusted:
    os.environ[TRUST] = "1"
  try:
    yield
  finally:
    if trusted:
      os.environ.pop(TRUST)
      os.environ.update({} if before is None else {TRUST: before})


def trusted() -> bool:
  """Whether what the records of runs name may be imported."""
  return os.environ.get(TRUST) == "1"


def check_code(record: epath.PathLike, names: Iterable[str], given: Collection[str] = ()) -> None:
  """Raises InputError where Python that a stored record names would be imported without anybody's permission.

  A run may come from anywhere, and its record gives no permission: that is the command line's, the environment's or the
  caller's, now.

  Args:
    record: the file.
    names: "module:function"; "" is none.
    given: names that whoever asks has named too, such as the config of a command line.
  """
  if trusted():
    return
  for name in names:
    if name and name not in given:
      raise InputError(
        f"{record}: would import Python that it names itself, {name}, which may do anything; if you know it, add "
        f"--trust-run-code, or set {TRUST}=1"
      )
