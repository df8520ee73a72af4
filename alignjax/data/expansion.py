"""The limit on the unpacked size of a compressed data file, because its content is copied to the cache and stays there.

A file of 300 kB can hold 300 MB of one letter. Text of records compresses to a tenth of its size, or, if every record
repeats a long text, to a hundredth.
"""

import os
from collections.abc import Iterable, Iterator

from alignjax.errors import InputError

FREE = 64 << 20  # bytes to which any file may unpack
RATIO = 200  # times its own size to which a larger file may unpack


def bounded(pieces: Iterable[bytes], path: str) -> Iterator[bytes]:
  """Passes on the pieces to which a file unpacks, up to the limit for a file of its size.

  Raises:
    InputError: they exceed the limit.
  """
  most = max(FREE, RATIO * os.path.getsize(path))
  total = 0
  for piece in pieces:
    total += len(piece)
    if total > most:
      raise InputError(
        f"{path}: unpacks to more than {most} bytes, {RATIO} times its size; if that is right, unpack it yourself and "
        "give the .jsonl"
      )
    yield piece
