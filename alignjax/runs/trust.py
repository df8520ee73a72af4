"""Permission to import the Python that a run's record names: a run may come from anywhere."""

import argparse
import contextlib
import os
from collections.abc import Collection, Iterable, Iterator

from etils import epath

from alignjax.errors import InputError

TRUST = "ALIGNJAX_TRUST_RUN_CODE"  # environment variable: "1" lets the records of runs name Python to import


def add_flag(parser: argparse.ArgumentParser) -> None:
  """Adds the flag --trust-run-code, which permits such imports."""
  known = "import the Python that a run's own record names (a model.module, a loss, rewards): it may do anything"
  parser.add_argument("--trust-run-code", action="store_true", help=known)


@contextlib.contextmanager
def trusting(trusted: bool) -> Iterator[None]:
  """Opens a context in which this process and its children may import what records name, if `trusted`.

  Otherwise the environment decides.
  """
  before = os.environ.get(TRUST)
  if trusted:
    os.environ[TRUST] = "1"
  try:
    yield
  finally:
    if trusted:
      os.environ.pop(TRUST)
      if before is not None:
        os.environ[TRUST] = before


def permitted(trust_code: bool | str | Collection[str]) -> tuple[str, ...]:
  """The names, "module:function", that a caller permits to import: of `load` and `evaluate`."""
  if isinstance(trust_code, bool):
    return ()
  return (trust_code,) if isinstance(trust_code, str) else tuple(trust_code)


def trusted() -> bool:
  """Returns True if the environment permits imports of what records name."""
  return os.environ.get(TRUST) == "1"


def check_code(record: epath.PathLike, names: Iterable[str], given: Collection[str] = ()) -> None:
  """Raises InputError if Python that a stored record names would be imported without permission.

  The record itself gives no permission. The command line, the environment or the caller must.

  Args:
    record: the file.
    names: "module:function"; "" is ignored.
    given: names that the caller permits, such as those in the config of a command line.
  """
  if trusted():
    return
  for name in names:
    if name and name not in given:
      raise InputError(
        f"{record}: would import Python that it names itself, {name}, which may do anything; if you know it, add "
        f"--trust-run-code, or set {TRUST}=1"
      )
