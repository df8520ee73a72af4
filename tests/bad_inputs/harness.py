"""Gives a bad input to a command or a function, and says what is wrong with the answer."""

import os
import signal
import traceback
from pathlib import Path
from unittest import mock

from alignjax import cli, train
from alignjax.errors import InputError, exit_status
from tests.bad_inputs.case import Case

LIMIT = 30.0  # seconds; a busy machine takes some for a good answer


class AcceptedError(BaseException):
  """Something bad came as far as the work."""


class SlowError(BaseException):
  """No answer in time: it waits for a pipe, say."""


def _tired(signum, frame):
  raise SlowError


def _accept(*args, **kwargs):
  raise AcceptedError


def answer(case: Case, folder: Path, capsys) -> str:
  """ "" where a case is refused as it should be; else what is wrong, in a line.

  Nothing is computed: a command that comes as far as a compilation has accepted its input.
  """
  given = case.make(folder)
  before = _tree(folder)
  capsys.readouterr()
  previous = signal.signal(signal.SIGALRM, _tired)
  signal.setitimer(signal.ITIMER_REAL, LIMIT)
  with (
    mock.patch.object(train, "starting_constants", _accept),
    mock.patch("alignjax.sampling.generate.sample_text", _accept),
  ):
    try:
      found = _of_command(case, given, folder, capsys) if isinstance(given, list) else _of_call(case, given, folder)
    except AcceptedError:
      found = "accepted"
    except SlowError:
      found = f"no answer within {LIMIT:g} s"
    except Exception as error:
      last = traceback.extract_tb(error.__traceback__)[-1]
      found = f"{type(error).__name__}: {str(error)[:120]!r} in {os.path.basename(last.filename)}:{last.lineno}"
  signal.setitimer(signal.ITIMER_REAL, 0)
  signal.signal(signal.SIGALRM, previous)
  changed = {path for path, content in _tree(folder).items() if before.get(path, b"") != content}
  return found or (f"wrote {sorted(changed)}" if changed or before.keys() - _tree(folder).keys() else "")


def _of_command(case: Case, argv: list[str], folder: Path, capsys) -> str:
  try:
    status = exit_status(cli.main, argv)
    usage = False
  except SystemExit as error:
    status, usage = error.code, True
  lines = capsys.readouterr().err.splitlines()
  if status != case.status:
    return f"status {status}, {lines[-1:]}"
  if not usage and len(lines) != 1:
    return f"{len(lines)} lines: {lines[:3]}"
  return _names(case, lines[-1], folder)


def _of_call(case: Case, call, folder: Path) -> str:
  try:
    call()
  except InputError as error:
    return _names(case, str(error), folder) if len(str(error).splitlines()) == 1 else "several lines"
  return "accepted"


def _names(case: Case, line: str, folder: Path) -> str:
  names = [name.replace("{}", str(folder)) for name in case.names]
  return "" if not names or any(name in line for name in names) else f"names none of {names}: {line}"


def _tree(folder: Path) -> dict[str, bytes]:
  """Every file and folder below, by path."""
  found = {}
  for path in sorted(folder.rglob("*")):
    plain = path.is_file() and not path.is_symlink()
    found[str(path)] = path.read_bytes() if plain else b"folder" if path.is_dir() else b"special"
  return {path: content for path, content in found.items() if "__pycache__" not in path}
