"""Scores of examples on disk, in one SQLite file, which several processes may use at once.

The key of a row is the scorer (a description of all that the numbers depend on except the example) and the content of
the example. A missing row is read as NaN, never as 0; a row that changed since it was written is an error.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alignjax.errors import InputError

_WAIT = 600.0  # seconds that a process waits for the others' writes
_TABLES = (
  "CREATE TABLE IF NOT EXISTS scorers (id INTEGER PRIMARY KEY, digest TEXT UNIQUE NOT NULL, description TEXT NOT NULL)",
  "CREATE TABLE IF NOT EXISTS scores (scorer INTEGER NOT NULL, example BLOB NOT NULL, numbers BLOB NOT NULL, "
  "crc INTEGER NOT NULL, PRIMARY KEY (scorer, example)) WITHOUT ROWID",
)


class ScoreStore:
  """The scores of one scorer, in a folder that it may share with others.

  Args:
    folder: made if missing; has scores.sqlite.
    scorer: JSON: all that the numbers depend on except the example. Another value is another scorer.
    width: the number of float32 numbers of an example.

  Raises:
    InputError: the folder or the file in it cannot be used.
  """

  def __init__(self, folder: os.PathLike | str, scorer: Mapping[str, Any], width: int):
    self.path = Path(folder).expanduser() / "scores.sqlite"
    self._width = width
    description = json.dumps(scorer, sort_keys=True)
    digest = hashlib.sha256(description.encode()).hexdigest()
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise InputError(f"{self.path.parent}: cannot be made ({error.strerror}); name another folder") from error
    with self._transaction() as connection:
      for table in _TABLES:
        connection.execute(table)
      connection.execute("INSERT OR IGNORE INTO scorers (digest, description) VALUES (?, ?)", (digest, description))
      self._scorer = connection.execute("SELECT id FROM scorers WHERE digest = ?", (digest,)).fetchone()[0]

  def read(self, examples: np.ndarray) -> np.ndarray:
    """Reads the numbers of examples, float32 [M, width]; NaN for examples without.

    Args:
      examples: uint8 [M, 32], hashes of their content.

    Raises:
      InputError: the file cannot be read, or a row in it is damaged.
    """
    scores = np.full((len(examples), self._width), np.nan, np.float32)
    query = "SELECT numbers, crc FROM scores WHERE scorer = ? AND example = ?"
    with self._transaction("DEFERRED") as connection:
      for place, example in enumerate(map(bytes, examples)):
        row = connection.execute(query, (self._scorer, example)).fetchone()
        if row is None:
          continue
        numbers, crc = row
        if len(numbers) != 4 * self._width or zlib.crc32(example + numbers) != crc:
          raise InputError(f"{self.path}: the row of example {example.hex()[:12]} is damaged; delete the file")
        scores[place] = np.frombuffer(numbers, "<f4")
    return scores

  def write(self, examples: np.ndarray, numbers: np.ndarray) -> None:
    """Adds finite numbers [M, width] of examples, all or none; an example that has numbers keeps them.

    Raises:
      InputError: the file cannot be written.
    """
    if not np.isfinite(numbers).all():
      raise ValueError("only finite numbers are kept")
    rows = []
    for example, values in zip(map(bytes, examples), numbers.astype("<f4"), strict=True):
      rows.append((self._scorer, example, values.tobytes(), zlib.crc32(example + values.tobytes())))
    with self._transaction() as connection:
      connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)", rows)

  @contextlib.contextmanager
  def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
    """Opens a connection for one transaction, so that no fork or thread inherits one."""
    try:
      with contextlib.closing(sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None)) as connection:
        connection.execute(f"BEGIN {kind}")
        yield connection
        connection.execute("COMMIT")  # an error before this line leaves nothing
    except sqlite3.Error as error:
      raise InputError(f"{self.path}: cannot be used ({error}); delete it, or name another folder") from error
