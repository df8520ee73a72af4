"""What a bad input is: a command line or a call, made in a folder of its own, and what its one line must name."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import smoke

TOKENIZER = smoke.DATA / "tokenizer.model"
GOOD = '{"prompt": "Hi", "chosen": "Hello there", "rejected": "No"}\n'


@dataclasses.dataclass(frozen=True)
class Case:
  """One bad input.

  Attributes:
    name: of the test.
    make: a folder of its own -> the command line, or a function to call.
    names: at least one of these stands in the line.
    status: what a command exits with.
  """

  name: str
  make: Callable[[Path], list[str] | Callable[[], Any]]
  names: tuple[str, ...] = ()
  status: int = 2


def run(name: str, *overrides: str, workdir: str = "out/run") -> Callable[[Path], list[str]]:
  """The command that trains configs/NAME.py:smoke with overrides, in which {} is the case's folder."""

  def make(folder: Path) -> list[str]:
    return smoke.arguments(name, folder / workdir, *(override.replace("{}", str(folder)) for override in overrides))

  return make


def words(*argv: str, **files: str | bytes) -> Callable[[Path], list[str]]:
  """A command line in which {} is the case's folder; `files` are written there first, `__` for the dot."""

  def make(folder: Path) -> list[str]:
    for name, content in files.items():
      path = folder / name.replace("__", ".")
      path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [word.replace("{}", str(folder)) for word in argv]

  return make
