"""How much larger than its file a compressed data file may be: what is unpacked goes into the cache, and stays there.

A file of 300 kB can hold 300 MB of one letter. Text of records compresses to a tenth of its size; where every record
repeats a long text, to a hundredth.
"""

import os
from collections.abc import Iterable, Iterator

from alignjax.errors import InputError

FREE = 64 << 20  # bytes that any file may hold
RATIO = 200  # times its own size that a larger one may


def bounded(pieces: Iterable[bytes], path: str) -> Iterator[bytes]:
  """The pieces that a file unpacks to, as long as they are not more than a file of its size may hold.

  Raises:
    InputError: they are more.
  """
  most, total = max(FREE, RATIO * os.path.getsize(path)), 0
  for piece in pieces:
    total += len(piece)
    if total > most:
      raise InputError(
        f"{path}: unpacks to more than {most} bytes, {RATIO} times its size; if that is right, unpack it yourself and "
        "give the .jsonl"
      )
    yield piece
