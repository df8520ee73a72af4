"""Work on many records in parts, each a file: what was interrupted goes on behind the last one.

Of several processes, which share the folder, all do the work, and the first one writes.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from alignjax import hosts
from alignjax.errors import InputError


def claim(folder: epath.Path, identity: dict[str, Any]) -> None:
  """Makes a folder of parts that of this work, by writing request.json, or finds that it is.

  Args:
    folder: of the parts.
    identity: JSON: all that decides them.

  Raises:
    InputError: it is that of another work.
  """
  path = folder / "request.json"
  if not hosts.there(path):
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
    if not hosts.there(path):
      made = make(numbers[part * size : (part + 1) * size])
      write(path, (json.dumps(row, ensure_ascii=False) for row in made))
    yield from (json.loads(line) for line in path.read_text().split("\n")[:-1])


def write(path: epath.Path, lines: Iterable[str]) -> None:
  """A file of these lines, whole or not at all."""
  text = "".join(f"{line}\n" for line in lines)  # in every process: making a line may need all of them
  if jax.process_index() == 0:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
  hosts.meet()  # nobody reads before it is written
