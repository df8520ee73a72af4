"""The safetensors format, read and written a tensor or a part of it at a time, on any file system of etils.epath.

The safetensors library maps whole local files, and writes a file from a dictionary of all its tensors. Here at most one
tensor is in memory, and buckets are supported as disks are. The format is a length, a header in JSON and bytes.
"""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeGuard

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
  """The place of a tensor in a file.

  Attributes:
    path: of the file.
    name: of the tensor in it.
    dtype: of its numbers.
    shape: of the whole tensor.
    offset: of its first byte in the file.
  """

  path: epath.Path
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def nbytes(self) -> int:
    """The bytes of the whole tensor in the file."""
    return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: epath.Path) -> dict[str, Tensor]:
  """Reads the places of a file's tensors, by name; the tensors themselves are not read.

  Raises:
    InputError: there is no such file, it is damaged, or its numbers have a dtype that weights here cannot have.
  """
  header = None
  try:
    reading.check(path)
    size = path.stat().length
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if 0 < length <= min(size - 8, LONGEST_HEADER):
        header = json.loads(file.read(length))
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path}: no safetensors file can be read there: {error}") from error
  if not isinstance(header, dict):
    raise InputError(f"{path}: is no safetensors file, or a damaged one; fetch it again")
  header.pop("__metadata__", None)
  tensors = {name: _tensor(path, name, row, 8 + length, size) for name, row in header.items()}
  _check_order(path, tensors, 8 + length, size)
  return tensors


def _tensor(path: epath.Path, name: str, row: Any, start: int, size: int) -> Tensor:
  """Returns the tensor of a row of the header; `start` is the offset of the data in a file of `size` bytes."""
  fields = row if isinstance(row, dict) else {}
  code, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
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


def _counts(value: Any, most: int = 2) -> TypeGuard[list[int]]:
  """Returns True if a value is a list of at most `most` whole numbers in 0 .. 2**63 - 1."""
  if not isinstance(value, list) or len(value) > most:
    return False
  return all(isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**63 for count in value)


def _check_order(path: epath.Path, tensors: dict[str, Tensor], start: int, size: int) -> None:
  """Raises InputError unless the tensors fill the file without gap or overlap, as the format requires."""
  place = start
  for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
    if tensor.offset != place:
      fault = "overlaps another" if tensor.offset < place else "leaves a gap before it"
      raise InputError(f"{path}: {called(tensor.name)} {fault}; fetch the file again")
    place += tensor.nbytes
  if place != size:
    raise InputError(f"{path}: holds {size - place} bytes behind its tensors; fetch the file again")


def read(tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
  """Reads elements start .. stop - 1 of a tensor, in the order of the file, as one dimension; all from start if stop is
  None.

  Raises:
    InputError: the file ends before them.
  """
  if stop is None:
    stop = math.prod(tensor.shape)
  size = tensor.dtype.itemsize
  wanted = (stop - start) * size
  with tensor.path.open("rb") as file:
    file.seek(tensor.offset + start * size)
    data = file.read(wanted)
  if len(data) != wanted:
    raise InputError(f"{tensor.path}: {tensor.name} is cut off; fetch the file again")
  return np.frombuffer(data, tensor.dtype)


class Entry(NamedTuple):
  """A tensor to be written.

  Attributes:
    name: in the file.
    dtype: of the written numbers, one of `DTYPES`.
    shape: of the written tensor.
    make: called only when it is written; its result may have another dtype, and is cast.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    """The bytes of the tensor as written."""
    return math.prod(self.shape) * self.dtype.itemsize


def write(path: epath.Path | None, entries: Iterable[Entry]) -> None:
  """Writes a safetensors file, one tensor after the other; only one is in memory at a time.

  Args:
    path: of the file; None makes the tensors but writes nothing, on hosts that only take part in gathering them.
    entries: in the order of the file; their dtypes are those of `DTYPES`.
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
