"""Processes many records in parts, each a file: interrupted work continues after the last whole part.

If there are several processes, they share the folder: all do the work, and the first one writes.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from alignjax.errors import InputError
from alignjax.system import hosts, output, reading


def check_out(out: epath.PathLike, *beside: str) -> epath.Path:
  """Checks in the first process that a file of JSON lines can be written; returns its path.

  Args:
    out: named FILE.jsonl.
    beside: endings of further files to check, which have the same name otherwise.

  Raises:
    InputError: `out` has another ending, or one of the files cannot be written.
  """
  out = epath.Path(out).expanduser()
  if out.suffix != ".jsonl":
    raise InputError(f"--out={out}: the records are JSON lines; give it the ending .jsonl")
  files = [out, *map(out.with_suffix, beside)]

  def check_files() -> None:
    for file in files:
      output.check_file(file, "--out")

  hosts.by_first("output", check_files)
  return out


@contextlib.contextmanager
def locked_parts(out: epath.Path, doing: str) -> Iterator[epath.Path]:
  """Gives the folder of the parts of `out`, locked meanwhile; `doing` is the verb in the error of a second process."""
  folder = out.with_suffix(".parts")
  with hosts.held("parts", lambda: output.lock(folder, doing, "--out")):
    yield folder


def claim(folder: epath.Path, identity: dict[str, Any]) -> None:
  """Writes the identity of this work to the folder's request.json, or checks that the folder has this identity.

  Args:
    folder: of the parts.
    identity: JSON: everything that decides the parts.

  Raises:
    InputError: the folder holds parts of other work.
  """
  path = folder / "request.json"
  if not hosts.there(path):
    write_json(path, identity)
    return
  old = output.read_json(path, f"delete {folder}, and all is sampled anew")
  if different := [name for name in identity if old.get(name) != identity[name]]:
    raise InputError(f"{folder}: holds samples of another {', '.join(different)}; choose another --out, or delete it")


def rows(
  folder: epath.Path,
  numbers: Sequence[int],
  size: int,
  make: Callable[[Sequence[int]], Iterable[dict[str, Any]]],
) -> Iterator[dict[str, Any]]:
  """Yields the JSON records of all parts, in order; a part that is missing or damaged is made first.

  Args:
    folder: of the parts.
    numbers: indices of the items to process.
    size: number of items in a part.
    make: the numbers of a part -> their records.
  """
  for part in range(math.ceil(len(numbers) / size)):
    path = folder / f"{part:06}.jsonl"
    if not hosts.first(np.array(_is_whole(path))):
      lines = [line_of(row) for row in make(numbers[part * size : (part + 1) * size])]
      write_json(_seal(path), {"rows": len(lines), "digest": _digest(_text(lines).encode())})
      write(path, lines)
    yield from (json.loads(line) for line in reading.read_text(path).split("\n")[:-1])


def remove(folder: epath.Path) -> None:
  """Removes a folder of parts; request.json last, so that after a kill the folder still has its identity."""
  if jax.process_index() == 0:
    for path in sorted(folder.iterdir()):
      if path.name not in ("request.json", output.LOCK):
        output.remove(path)
    output.remove(folder)
  hosts.meet()


def line_of(row: dict[str, Any]) -> str:
  """Formats a record as a line of JSON in readable characters; in escapes if it has half of a surrogate pair."""
  text = json.dumps(row, ensure_ascii=False)
  try:
    text.encode()
  except UnicodeEncodeError:
    return json.dumps(row)
  return text


def _seal(path: epath.Path) -> epath.Path:
  """Returns the file with the number of rows of a part, and the digest of their text."""
  return path.with_suffix(".json")


def _is_whole(path: epath.Path) -> bool:
  """Returns True if the part is as it was written, in the first process (False in others); says so if it is damaged."""
  if jax.process_index() != 0 or not path.exists():
    return False
  try:
    seal = output.read_json(_seal(path))
    content = reading.read_bytes(path)
    if content.count(b"\n") == seal.get("rows") and _digest(content) == seal.get("digest"):
      return True
  except (output.DamagedError, OSError):
    pass  # damaged
  hosts.say(f"{path}: is damaged; made again")
  return False


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _text(lines: Iterable[str]) -> str:
  return "".join(f"{line}\n" for line in lines)


def write_json(path: epath.Path, record: dict[str, Any]) -> None:
  """Writes a JSON object in the first process, for `output.read_json`; returns in every process when it is written."""
  if jax.process_index() == 0:
    output.write_json(path, record)
  hosts.meet()


def write(path: epath.Path, lines: Iterable[str]) -> None:
  """Writes a file of these lines in the first process, whole or not at all; returns in every one when it is written."""
  text = _text(lines)  # in every process: making a line may need all of them
  if jax.process_index() == 0:
    output.write(path, text)
  hosts.meet()  # no process reads the file before it is written
