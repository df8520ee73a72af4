"""Work on many records in parts, each a file: what was interrupted goes on behind the last one.

Of several processes, which share the folder, all do the work, and the first one writes.
"""

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
  """The file of JSON lines that parts become, of which the first process finds that it can be written.

  Args:
    out: of the name FILE.jsonl.
    beside: endings of the files that are written with it.

  Raises:
    InputError: it has another ending, or one of them cannot be written.
  """
  out = epath.Path(out).expanduser()
  if out.suffix != ".jsonl":
    raise InputError(f"--out={out}: the records are JSON lines; give it the ending .jsonl")
  files = [out, *map(out.with_suffix, beside)]
  hosts.by_first("output", lambda: [output.check_file(file, "--out") for file in files])
  return out


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
  """The JSON records of all parts, in order; what is not there yet, or not as it was written, is made first.

  Args:
    folder: of the parts.
    numbers: what the work is on.
    size: how many of them are a part.
    make: some of the numbers -> their records.
  """
  for part in range(math.ceil(len(numbers) / size)):
    path = folder / f"{part:06}.jsonl"
    if not hosts.first(np.array(_is_whole(path))):
      lines = [line_of(row) for row in make(numbers[part * size : (part + 1) * size])]
      write_json(_seal(path), {"rows": len(lines), "digest": _digest(_text(lines).encode())})
      write(path, lines)
    yield from (json.loads(line) for line in reading.read_text(path).split("\n")[:-1])


def remove(folder: epath.Path) -> None:
  """Removes a folder of parts, what says whose it is last: a kill in between leaves one that is still known."""
  if jax.process_index() == 0:
    for path in sorted(folder.iterdir()):
      if path.name not in ("request.json", output.LOCK):
        output.remove(path)
    output.remove(folder)
  hosts.meet()


def line_of(row: dict[str, Any]) -> str:
  """A record as a line of JSON: readable text, but for one that is none, such as half of a surrogate pair."""
  text = json.dumps(row, ensure_ascii=False)
  try:
    text.encode()
  except UnicodeEncodeError:
    return json.dumps(row)
  return text


def _seal(path: epath.Path) -> epath.Path:
  """What a part must hold: how many rows, and the digest of their text."""
  return path.with_suffix(".json")


def _is_whole(path: epath.Path) -> bool:
  """Whether the first process finds a part as it was written; says so where it does not."""
  if jax.process_index() != 0 or not path.exists():
    return False
  try:
    seal, content = output.read_json(_seal(path)), reading.read_bytes(path)
  except (output.DamagedError, OSError):
    seal, content = {}, b""
  if content.count(b"\n") == seal.get("rows") and _digest(content) == seal.get("digest"):
    return True
  hosts.say(f"{path}: is damaged; made again")
  return False


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _text(lines: Iterable[str]) -> str:
  return "".join(f"{line}\n" for line in lines)


def write_json(path: epath.Path, record: dict[str, Any]) -> None:
  """A JSON object that is read back by `output.read_json`."""
  if jax.process_index() == 0:
    output.write_json(path, record)
  hosts.meet()


def write(path: epath.Path, lines: Iterable[str]) -> None:
  """A file of these lines, whole or not at all."""
  text = _text(lines)  # in every process: making a line may need all of them
  if jax.process_index() == 0:
    output.write(path, text)
  hosts.meet()  # nobody reads before it is written
