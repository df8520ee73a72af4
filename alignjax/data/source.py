"""Records on disk as one random-access sequence: JSON lines, a JSON array, Parquet, Arrow, ArrayRecord; gzip too.

Lines and arrays are read in place through an index of the places of records. A packed or columnar file gives no
cheap access to one record, so it is rewritten once as lines in the cache. Memory does not grow with
the number of records (the index is mapped). Reads are `os.pread` (safe from any thread). A
source that is sent to another process opens its files again there.

A file is identified by its content, never by its name, size or date: every opening reads it once to its end (see
docs/data.md for the cost), and the index is cached under that digest. If the bytes of a record differ from those that
were indexed, the read is an error. The first bytes of a file tell its form (lines, array, gzip, Parquet).
"""

import gzip
import hashlib
import json
import mmap
import operator
import os
import re
import weakref
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from alignjax.data import arrow, first_bytes, strict_json
from alignjax.data import cache as cached
from alignjax.data.expansion import bounded
from alignjax.data.files import FORMATS, expand, formats
from alignjax.errors import InputError
from alignjax.system import reading

Record = dict[str, Any]
_VERSION = 2  # of the cached form of a file


class File(Protocol):
  """One file of a source: the JSON text of each record by number, and its place as people name it."""

  digest: str  # hex sha256 of the content
  blanks: int  # number of blank lines, which are skipped

  @property
  def left_out(self) -> Mapping[str, str]: ...  # the types of columns without a JSON form, by name
  def __len__(self) -> int: ...
  def read(self, i: int) -> bytes: ...
  def where(self, i: int) -> str: ...


class Source:
  """The records of one or several files, in order; `source[i]` is a dict.

  Attributes:
    fingerprint: hex sha256 of the files' content, whatever their names and places.
    blanks: blank lines that were skipped.
    left_out: the types of table columns that have no JSON form, by name.
  """

  def __init__(self, files: Sequence[File]):
    self._files = list(files)
    self._starts = [0, *accumulate(len(file) for file in files)]
    self.fingerprint = cached.digest(*(file.digest for file in files))
    self.blanks = sum(file.blanks for file in files)
    self.left_out = {name: kind for file in files for name, kind in file.left_out.items()}

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, i: int) -> Record:
    """Reads record `i`.

    Raises:
      InputError: it is not a JSON object; the message names file and line.
    """
    file, number = self._locate(i)
    text = file.read(number)
    try:
      record = strict_json.loads(text)
    except strict_json.MalformedError as error:
      raise InputError(f"{file.where(number)}: {error}; {_remedy(text, number == len(file) - 1)}") from error
    if not isinstance(record, dict):
      raise InputError(
        f"{file.where(number)}: a record is a JSON object like "
        f'{{"prompt": ..., "chosen": ..., "rejected": ...}}, not {strict_json.described(record)}'
      )
    return record

  def __iter__(self) -> Iterator[Record]:
    return (self[i] for i in range(len(self)))

  def where(self, i: int) -> str:
    """The place of record `i` for people: "pairs.jsonl:732" (line or row, from 1)."""
    file, number = self._locate(i)
    return file.where(number)

  def _locate(self, i: int) -> tuple[File, int]:
    """Returns the file of record `i`, and the record's number in it."""
    i = operator.index(i)
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {len(self)}")
    file = bisect_right(self._starts, i) - 1
    return self._files[file], i - self._starts[file]


def open_source(path: str | os.PathLike | Sequence, cache: str = "") -> Source:
  """Opens data files as one sequence of records.

  Args:
    path: a file, a folder of `datasets.save_to_disk`, a glob, several of them with commas between, or a list of such.
    cache: the directory for indices and rewritten files (see `cache.py`).

  Raises:
    InputError: a file is missing, unreadable, of an unknown format, no data (see `first_bytes.py`), or without records.
  """
  names = expand(path)
  with ThreadPoolExecutor(max_workers=4) as threads:  # hashing releases the interpreter lock
    digests = list(threads.map(_digest, names))
  source = Source([_open_file(name, digest, cache) for name, digest in zip(names, digests, strict=True)])
  if not len(source):
    empty = ""
    if not any(os.path.getsize(name) for name in names):
      empty = " (the file is empty)"
    raise InputError(f"{path}: no records{empty}; one JSON object per line is expected")
  return source


class Jsonl:
  """The records of one JSON text, read through its index; blank lines are no records."""

  def __init__(self, name: str, path: str, index: str):
    self._arguments = (name, path, index)
    self._name = name
    self._index = Path(index)
    self._spans = np.load(self._index / "spans.npy", mmap_mode="r")  # int64 [records, 2]: first byte, last + 1
    self._lines = np.load(self._index / "lines.npy", mmap_mode="r")  # int64 [records]: line, or number in an array
    self._sums = np.load(self._index / "sums.npy", mmap_mode="r")  # uint32 [records]: crc32
    facts = json.loads((self._index / "facts.json").read_text())
    self.digest = facts["digest"]
    self.blanks = facts["blanks"]
    self.left_out = facts["left_out"]
    self._is_array = facts["array"]
    self._copied = facts["copied"]
    text = Path(path)
    if self._copied:
      text = self._index / "records.jsonl"
    self._file = os.open(text, os.O_RDONLY)
    weakref.finalize(self, os.close, self._file)

  def __reduce__(self):
    return Jsonl, self._arguments

  def __len__(self) -> int:
    return len(self._spans)

  def read(self, i: int) -> bytes:
    """Reads the text of a record.

    Raises:
      InputError: it is no longer the text that was indexed.
    """
    start, end = map(int, self._spans[i])
    text = os.pread(self._file, end - start, start)
    if zlib.crc32(text) != self._sums[i]:
      remedy = "start again"
      if self._copied:
        remedy = f"its copy in the cache is damaged; delete {self._index}"
      raise InputError(f"{self.where(i)}: changed since the file was opened; {remedy}")
    return text

  def where(self, i: int) -> str:
    if self._is_array:
      return f"{self._name}: item {self._lines[i]}"
    return f"{self._name}:{self._lines[i]}"


class ArrayRecord:
  """The records of one ArrayRecord file whose payloads are JSON.

  The time of a read grows with the number of chunks in the file: write at most 10,000 records to a file.
  """

  blanks = 0
  left_out: Mapping[str, str] = {}

  def __init__(self, name: str, path: str, digest: str):
    self._name = name
    try:
      self._records = grain.sources.ArrayRecordDataSource([path])
    except RuntimeError as error:
      raise _damaged(path, error) from error
    self.digest = digest

  def __len__(self) -> int:
    return len(self._records)

  def read(self, i: int) -> bytes:
    return self._records[i]

  def where(self, i: int) -> str:
    return f"{self._name}:{i + 1}"


def _remedy(text: bytes, last: bool) -> str:
  """The end of the message about a record that is no JSON: what to do about it."""
  if b"\0" in text:
    return "it holds zero bytes, as a copy that was cut off does: fetch the file again"
  if strict_json.is_open(text):
    if last:
      return "the record is cut off: fetch or write the file again, or delete this record"
    return "the record continues in the next line: write each on one line, for example with `jq -c . OLD > NEW.jsonl`"
  return "correct or delete this record"


def _open_file(name: str, digest: str, cache: str) -> File:
  """Opens one file; the first opening of its content prepares it in the cache."""
  path = os.path.abspath(name)
  key = cached.digest("source", _VERSION, digest)
  try:
    if name.endswith(".arrayrecord"):
      with open(path, "rb") as file:
        _refuse_foreign(name, file.read(first_bytes.HEAD))
      return ArrayRecord(name, path, digest)
    ready = cached.folder(cache, key, lambda folder: _prepare(name, path, digest, folder))
    return Jsonl(name, path, str(ready))
  except OSError as error:
    raise _unreadable(name, error) from error


def _unreadable(name: str, error: OSError) -> InputError:
  return InputError(f"{name}: cannot be read ({error.strerror or error})")


def _digest(name: str) -> str:
  """Hex sha256 of a file's bytes."""
  try:
    reading.check(name)
    with open(name, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise _unreadable(name, error) from error


def _refuse_foreign(name: str, head: bytes) -> None:
  """Raises InputError if the first bytes of a file are those of something else than data."""
  if head and (reason := first_bytes.foreign(head)):
    raise InputError(f"{name}: {reason}")


def _prepare(name: str, path: str, digest: str, folder: Path) -> None:
  """Fills a file's cache folder: the index, and the records as lines if the file is no text."""
  with open(path, "rb") as file:
    head = file.read(first_bytes.HEAD)
  _refuse_foreign(name, head)
  form = first_bytes.form(head)
  if form == "text":
    if first_bytes.first_letter(head) not in (b"{", b"[", b""):
      _require_text(name, path)
    facts = _index(name, path, folder)
    facts |= {"digest": digest, "left_out": {}, "copied": False}
  else:
    copy = folder / "records.jsonl"
    left_out = _unpack(path, form, copy)
    facts = _index(name, copy, folder)
    facts |= {"digest": _digest(str(copy)), "left_out": left_out, "copied": True}
  (folder / "facts.json").write_text(json.dumps(facts))
  if _digest(path) != digest:
    raise InputError(f"{name}: changed while it was read; start again")


def _unpack(path: str, form: str, copy: Path) -> dict[str, str]:
  """Writes the records of a gzip, Parquet or Arrow file as lines to `copy`; returns the columns that are left out."""
  left_out: dict[str, str] = {}
  pieces = _gzip_pieces(path) if form == "gzip" else arrow.lines(path, form, left_out)
  with open(copy, "wb") as file:
    file.writelines(bounded(pieces, path))
  return left_out


def _require_text(name: str, path: str) -> None:
  """Raises InputError about a file that does not begin like JSON, unless its name ends as that of a JSON text."""
  suffix = next((suffix for suffix in FORMATS if name.endswith(suffix)), None)
  if suffix is None:
    remedy = ""
    if name.lower().endswith((".csv", ".tsv")):
      remedy = "; pandas.read_csv(OLD).to_json(NEW, orient='records', lines=True) makes JSON lines of a table"
    raise InputError(f"{name}: unknown format; data files end in {formats()}{remedy}")
  if not suffix.startswith(".json"):
    raise _damaged(path, f"no {suffix[1:]}")


def _gzip_pieces(path: str) -> Iterator[bytes]:
  try:
    with gzip.open(path) as file:
      while piece := file.read(1 << 20):  # a line may be as long as the file
        yield piece
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise _damaged(path, error) from error


def _damaged(path: str, error: Exception | str) -> InputError:
  reason = str(error).split("\n")[0] or "unreadable"
  return InputError(f"{path}: damaged file ({reason}); fetch or write it again")


def _index(name: str, path: str | Path, folder: Path) -> dict[str, Any]:
  """Writes the span, line and checksum of each record of a text; returns {"array": bool, "blanks": count}."""
  with open(path, "rb") as file:
    head = file.read(first_bytes.HEAD)
  _refuse_foreign(name, head)
  if first_bytes.form(head) == "gzip":
    raise InputError(f"{name}: is packed with gzip twice; unpack it once")
  is_array = first_bytes.first_letter(head) == b"["
  records = _array_items(name, path) if is_array else _text_lines(path)
  spans = array("q")
  lines = array("q")
  sums = array("I")
  blanks = 0
  for start, text, line in records:
    if not text:
      blanks += 1
      continue
    spans.extend((start, start + len(text)))
    lines.append(line)
    sums.append(zlib.crc32(text))
  np.save(folder / "spans.npy", np.asarray(spans, np.int64).reshape(-1, 2))
  np.save(folder / "lines.npy", np.asarray(lines, np.int64))
  np.save(folder / "sums.npy", np.asarray(sums, np.uint32))
  return {"array": is_array, "blanks": blanks}


def _text_lines(path: str | Path) -> Iterator[tuple[int, bytes, int]]:
  """Iterates (first byte, text, number) of the lines; b"" for a blank one. A line ends at \\n, \\r\\n or \\r."""
  start, number = 0, 0
  with open(path, "rb") as file:
    for line in file:
      for part in _split_at_returns(line):
        number += 1
        text = part.rstrip()
        mark = 0
        if not start and text.startswith(first_bytes.BOM):
          mark = len(first_bytes.BOM)
        yield start + mark, text[mark:], number
        start += len(part)


def _split_at_returns(line: bytes) -> list[bytes]:
  """Splits what ends in \\n after each \\r alone; the parts keep their ends, and none is empty."""
  if b"\r" not in line[:-2]:  # the usual case, quickly
    return [line]
  return [part for part in re.split(rb"(?<=\r)(?!\n)", line) if part]


def _array_items(name: str, path: str | Path) -> Iterator[tuple[int, bytes, int]]:
  """Iterates (first byte, text, number) of the items of a JSON array that fills a file."""
  more = InputError(f"{name}: has text behind its JSON array; write one array, or one object a line")
  depth, start, number = 0, 0, 0
  closed = False
  with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
    for match in strict_json.TOKEN.finditer(text):
      token = match[0]
      if closed:
        raise more
      if token in (b"[", b"{"):
        depth += 1
        start = start or match.end()
      elif token in (b"]", b"}"):
        depth -= 1
      elif token != b",":
        continue
      closed = depth == 0
      if closed or (token == b"," and depth == 1):
        item = text[start : match.start()]
        number += 1
        if item.strip():
          yield start + len(item) - len(item.lstrip()), item.strip(), number
        elif number > 1 or not closed:
          raise InputError(f"{name}: item {number} of its JSON array is empty; remove one comma")
        start = match.end()
    if not closed:
      raise InputError(f"{name}: its JSON array is not closed: the file is cut off; fetch or write it again")
    if text[start:].strip():
      raise more
