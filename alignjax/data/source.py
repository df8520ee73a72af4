"""Records on disk as one random-access sequence: JSONL, JSONL.gz, Parquet, ArrayRecord.

A JSONL file is read in place through an index of line offsets. A compressed or columnar file has no
cheap access to one record, so it is rewritten once as JSONL in the cache. Memory does not grow with
the number of records (the index is mapped), reads are `os.pread` (safe from any thread), and a
source that is sent to another process opens its files again there.
"""

import glob
import gzip
import hashlib
import json
import operator
import os
import weakref
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from alignjax.data import cache as cached
from alignjax.data.expansion import bounded
from alignjax.errors import InputError

Record = dict[str, Any]
FORMATS = (".jsonl", ".jsonl.gz", ".parquet", ".arrayrecord")


class File(Protocol):
  """One file of a source: its records' JSON text by number, and what people call each."""

  digest: str  # hex sha256 of the content
  blanks: int  # blank lines, which are skipped

  def __len__(self) -> int: ...
  def read(self, i: int) -> bytes: ...
  def where(self, i: int) -> str: ...


class Source:
  """The records of one or several files, in order; `source[i]` is a dict.

  Attributes:
    fingerprint: hex sha256 of the files' content, whatever their names and places.
    blanks: blank lines that were skipped.
  """

  def __init__(self, files: Sequence[File]):
    self._files = list(files)
    self._starts = [0, *accumulate(len(file) for file in files)]
    self.fingerprint = cached.digest(*(file.digest for file in files))
    self.blanks = sum(file.blanks for file in files)

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, i: int) -> Record:
    """Record `i`.

    Raises:
      InputError: it is not a JSON object; the message names file and line.
    """
    file, j = self._locate(i)
    try:
      record = json.loads(file.read(j))
    except json.JSONDecodeError as error:
      raise InputError(
        f"{file.where(j)}: not valid JSON ({error.msg} at column {error.colno}); correct or delete this record"
      ) from error
    except UnicodeDecodeError as error:
      raise InputError(f"{file.where(j)}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
    if not isinstance(record, dict):
      raise InputError(
        f"{file.where(j)}: a record is a JSON object like "
        f'{{"prompt": ..., "chosen": ..., "rejected": ...}}, not a {type(record).__name__}'
      )
    return record

  def __iter__(self) -> Iterator[Record]:
    return (self[i] for i in range(len(self)))

  def where(self, i: int) -> str:
    """The place of record `i` as people find it: "pairs.jsonl:732" (line or row, from 1)."""
    file, j = self._locate(i)
    return file.where(j)

  def _locate(self, i: int) -> tuple[File, int]:
    i = operator.index(i)
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {len(self)}")
    k = bisect_right(self._starts, i) - 1
    return self._files[k], i - self._starts[k]


def open_source(path: str | os.PathLike | Sequence, cache: str = "") -> Source:
  """Opens data files as one sequence of records.

  Args:
    path: a file, a glob, several of them separated by commas, or a list of such.
    cache: where indices and rewritten files are kept (see `cache.py`).

  Raises:
    InputError: a file is missing, unreadable, of an unknown format, or no record is found.
  """
  source = Source([_open_file(name, cache) for name in _expand(path)])
  if not len(source):
    raise InputError(f"{path}: no records; one JSON object per line is expected")
  return source


class Jsonl:
  """The records of one JSONL text through its index; blank lines are no records."""

  def __init__(self, name: str, path: str, index: str):
    self._arguments = (name, path, index)
    self._name = name
    self._offsets = np.load(Path(index) / "offsets.npy", mmap_mode="r")  # int64 [records + 1]
    self._blank_after = np.load(Path(index) / "blanks.npy")  # int64: records before each blank line
    self.blanks = len(self._blank_after)
    self.digest = (Path(index) / "digest").read_text()
    self._file = os.open(path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._file)

  def __reduce__(self):
    return Jsonl, self._arguments

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def read(self, i: int) -> bytes:
    start, end = int(self._offsets[i]), int(self._offsets[i + 1])
    return os.pread(self._file, end - start, start)

  def where(self, i: int) -> str:
    blanks = int(np.searchsorted(self._blank_after, i, side="right"))
    return f"{self._name}:{i + 1 + blanks}"


class ArrayRecord:
  """The records of one ArrayRecord file whose payloads are JSON.

  A read costs time in proportion to the chunks of its file: write at most 10,000 records to a file.
  """

  blanks = 0

  def __init__(self, name: str, path: str, index: str):
    self._name = name
    try:
      self._records = grain.sources.ArrayRecordDataSource([path])
    except RuntimeError as error:
      raise _damaged(path, error) from error
    self.digest = (Path(index) / "digest").read_text()

  def __len__(self) -> int:
    return len(self._records)

  def read(self, i: int) -> bytes:
    return self._records[i]

  def where(self, i: int) -> str:
    return f"{self._name}:{i + 1}"


def _expand(path: str | os.PathLike | Sequence) -> list[str]:
  if not isinstance(path, str | os.PathLike):
    return [name for part in path for name in _expand(part)]
  path = os.fspath(path)
  if os.path.isfile(path):
    return [path]
  if os.path.isdir(path):
    raise InputError(f"{path}: is a folder; name its files, for example {path}/*.jsonl")
  if "," in path:
    return [name for part in path.split(",") for name in _expand(part.strip())]
  names = sorted(glob.glob(path, recursive=True))
  if not names:
    raise InputError(f"{path or 'data'}: no such file; give a path or a glob of {_formats()} files")
  return names


def _formats() -> str:
  return ", ".join(FORMATS)


def _open_file(name: str, cache: str) -> File:
  """Opens one file, made ready in the cache at first use (keyed by path, size and time)."""
  path = os.path.abspath(name)
  suffix = next((suffix for suffix in FORMATS if name.endswith(suffix)), None)
  if suffix is None:
    raise InputError(f"{name}: unknown format; data files end in {_formats()}")
  try:
    status = os.stat(path)
    with open(path, "rb"):
      pass
    key = cached.digest("source", 1, path, status.st_size, status.st_mtime_ns)
    ready = cached.folder(cache, key, lambda folder: _prepare(path, suffix, folder))
    if suffix == ".arrayrecord":
      return ArrayRecord(name, path, str(ready))
    return Jsonl(name, path if suffix == ".jsonl" else str(ready / "records.jsonl"), str(ready))
  except OSError as error:
    raise InputError(f"{name}: cannot be read ({error.strerror or error})") from error


def _prepare(path: str, suffix: str, folder: Path) -> None:
  """Fills a file's cache folder: the digest, the index, and the text if the file itself is none."""
  if suffix == ".arrayrecord":
    with open(path, "rb") as file:
      (folder / "digest").write_text(hashlib.file_digest(file, "sha256").hexdigest())
  elif suffix == ".jsonl":
    _index(path, folder)
  else:
    with open(folder / "records.jsonl", "wb") as file:
      file.writelines(bounded(_gzip_pieces(path) if suffix == ".jsonl.gz" else _parquet_lines(path), path))
    _index(folder / "records.jsonl", folder)


def _gzip_pieces(path: str) -> Iterator[bytes]:
  try:
    with gzip.open(path) as file:
      while piece := file.read(1 << 20):  # a line may be as long as the file
        yield piece
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise _damaged(path, error) from error


def _parquet_lines(path: str) -> Iterator[bytes]:
  import pyarrow.parquet  # 30 MB that the other formats can do without

  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
          yield json.dumps(row, ensure_ascii=False).encode() + b"\n"
  except pyarrow.ArrowInvalid as error:
    raise _damaged(path, error) from error
  except TypeError as error:
    raise InputError(f"{path}: a column has no JSON form ({error}); store text, numbers and lists") from error


def _damaged(path: str, error: Exception) -> InputError:
  reason = str(error).split("\n")[0] or "unreadable"
  return InputError(f"{path}: damaged file ({reason}); fetch or write it again")


def _index(path: str | Path, folder: Path) -> None:
  """Writes the offsets of the lines that hold records, the blank ones' places, and the content's digest.

  A record reaches to the start of the next, over blank lines, which JSON ignores.
  """
  offsets, blanks, digest, position = array("q"), array("q"), hashlib.sha256(), 0
  with open(path, "rb") as file:
    for line in file:
      if line.isspace():
        blanks.append(len(offsets))
      else:
        offsets.append(position)
      digest.update(line)
      position += len(line)
  offsets.append(position)
  np.save(folder / "offsets.npy", np.asarray(offsets, np.int64))
  np.save(folder / "blanks.npy", np.asarray(blanks, np.int64))
  (folder / "digest").write_text(digest.hexdigest())
