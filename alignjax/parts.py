"""Work on many records in parts, each a file: what was interrupted goes on behind the last one."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from alignjax.errors import InputError


def claim(folder: epath.Path, identity: dict[str, Any]) -> None:
  """Makes a folder of parts that of this work, by writing request.json, or finds that it is.

  Args:
    folder: of the parts.
    identity: JSON: all that decides them.

  Raises:
    InputError: it is that of another work, or there are several processes, which would write the same files.
  """
  if jax.process_count() > 1:
    raise InputError(
      f"{folder}: is written by one process; this run has {jax.process_count()}, so start it on one host"
    )
  path = folder / "request.json"
  if not path.exists():
    write(path, [json.dumps(identity, indent=2)])
    return
  old = json.loads(path.read_text())
  if different := [name for name in identity if old.get(name) != identity[name]]:
    raise InputError(f"{folder}: holds samples of another {', '.join(different)}; choose another --out, or delete it")


def rows(
  folder: epath.Path,
  numbers: Sequence[int],
  size: int,
  make: Callable[[Sequence[int]], Iterable[dict[str, Any]]],
) -> Iterator[dict[str, Any]]:
  """The JSON records of all parts, in order; what is not there yet is made and written first.

  Args:
    folder: of the parts.
    numbers: what the work is on.
    size: how many of them are a part.
    make: some of the numbers -> their records.
  """
  for part in range(math.ceil(len(numbers) / size)):
    path = folder / f"{part:06}.jsonl"
    if not path.exists():
      made = make(numbers[part * size : (part + 1) * size])
      write(path, (json.dumps(row, ensure_ascii=False) for row in made))
    yield from (json.loads(line) for line in path.read_text().split("\n")[:-1])


def write(path: epath.Path, lines: Iterable[str]) -> None:
  """A file of these lines, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.partial")
  partial.write_text("".join(f"{line}\n" for line in lines))
  partial.replace(path)
