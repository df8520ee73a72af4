"""The safetensors format, a tensor or a part of it at a time, on any file system that etils.epath opens.

The library of that name maps local files whole, and writes a file from a dictionary of all its tensors; here the most
that is in memory is one tensor, and a bucket is as good as a disk. The format is a length, a header in JSON and bytes.
"""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from alignjax.errors import InputError
from alignjax.system import output, reading
from alignjax.system.hub import called, shown

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
MOST_DIMENSIONS = 16


class Tensor(NamedTuple):
  """Where a tensor lies.

  Attributes:
    path: of the file.
    name: within it.
    dtype: of its numbers.
    shape: of the whole.
    offset: of its first byte in the file.
  """

  path: epath.Path
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: epath.Path) -> dict[str, Tensor]:
  """The tensors of a file by name; nothing of them is read.

  Raises:
    InputError: no such file, a damaged one, or numbers of a type that no weight here has.
  """
  try:
    reading.check(path)
    size = path.stat().length
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      header = json.loads(file.read(length)) if 0 < length <= min(size - 8, LONGEST_HEADER) else None
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path}: no safetensors file can be read there: {error}") from error
  if not isinstance(header, dict):
    raise InputError(f"{path}: is no safetensors file, or a damaged one; fetch it again")
  header.pop("__metadata__", None)
  found = {name: _tensor(path, name, row, 8 + length, size) for name, row in header.items()}
  _check_order(path, found, 8 + length, size)
  return found


def _tensor(path: epath.Path, name: str, row: Any, start: int, size: int) -> Tensor:
  code, shape, offsets = (row.get(key) if isinstance(row, dict) else None for key in ("dtype", "shape", "data_offsets"))
  if not isinstance(code, str) or not _counts(shape, most=MOST_DIMENSIONS) or not _counts(offsets) or len(offsets) != 2:
    raise InputError(f"{path}: its header says of {called(name)} {shown(row)}, which is no tensor; fetch it again")
  if code not in DTYPES:
    raise InputError(
      f"{path}: {called(name)} is {called(code)}; weights are read in {', '.join(DTYPES)}, so convert it"
    )
  begin, end = offsets
  if begin > end or end - begin != math.prod(shape) * DTYPES[code].itemsize:
    raise InputError(
      f"{path}: {called(name)} lies at {offsets}, which is not the size of {shape} of {code}; fetch it again"
    )
  if start + end > size:
    raise InputError(f"{path}: {called(name)} is cut off; fetch the file again")
  return Tensor(path, name, DTYPES[code], tuple(shape), start + begin)


def _counts(value: Any, most: int = 2) -> bool:
  """Whether a value is a list of a few whole numbers that a file can hold."""
  fits = lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**63
  return isinstance(value, list) and len(value) <= most and all(map(fits, value))


def _check_order(path: epath.Path, tensors: dict[str, Tensor], start: int, size: int) -> None:
  """Raises InputError unless the tensors fill the file, each behind the last, as the format asks."""
  place = start
  for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
    if tensor.offset != place:
      fault = "overlaps another" if tensor.offset < place else "leaves a gap before it"
      raise InputError(f"{path}: {called(tensor.name)} {fault}; fetch the file again")
    place += tensor.nbytes
  if place != size:
    raise InputError(f"{path}: holds {size - place} bytes behind its tensors; fetch the file again")


def read(tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
  """Elements start .. stop of a tensor, counted in the order of the file; all if stop is None. One dimension."""
  stop = math.prod(tensor.shape) if stop is None else stop
  size = tensor.dtype.itemsize
  wanted = (stop - start) * size
  with tensor.path.open("rb") as file:
    file.seek(tensor.offset + start * size)
    data = file.read(wanted)
  if len(data) != wanted:
    raise InputError(f"{tensor.path}: {tensor.name} is cut off; fetch the file again")
  return np.frombuffer(data, tensor.dtype)


class Entry(NamedTuple):
  """A tensor to be written: `make` is called when it is its turn."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def write(path: epath.Path | None, entries: Iterable[Entry]) -> None:
  """Writes a file of tensors, one after the other; with None, makes them all the same and writes none: on the hosts
  that only help to gather what is spread over several.
  """
  entries = list(entries)
  if path is None:
    for entry in entries:
      entry.make()
    return
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
  offset = 0
  for name, dtype, shape, _ in entries:
    size = math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
    offset += size
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
  with output.file(path) as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
      file.write(np.ascontiguousarray(entry.make(), entry.dtype).reshape(-1).view(np.uint8).data)
