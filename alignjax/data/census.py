"""The one pass over all records: each is parsed, checked, tokenised and measured; the measures are kept on disk.

The pass depends on the data, the tokenizer and the kind alone. Row length, limits, packing, the
held-out share and the seed are decided afterwards from its arrays, in no time.
"""

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignjax.data import cache as cached
from alignjax.data.format import SIDES, Dialogue, flaw, read
from alignjax.data.source import Source
from alignjax.data.tokenizer import Tokenizer
from alignjax.data.transform import REASONS, encode, measure
from alignjax.errors import InputError

_log = logging.getLogger(__name__)
_EVERY = 20.0  # seconds between progress lines


class Census(NamedTuple):
  """What is known of N records, mapped from disk.

  Attributes:
    status: uint8 [N], a number in `transform.REASONS`: what is wrong with the record whatever the row.
    prompt: int32 [N], tokens of the prompt.
    completions: int32 [N, 0 to 2], tokens of each completion.
    shared: int32 [N], tokens that the completions of a pair have in common at their front.
    group: uint64 [N], a hash of the prompt: records of one prompt are held out together.
  """

  status: np.ndarray
  prompt: np.ndarray
  completions: np.ndarray
  shared: np.ndarray
  group: np.ndarray


def take_census(source: Source, tokenizer: Tokenizer, kind: str, format: str = "auto", cache: str = "") -> Census:
  """Measures every record, or finds the measures of an earlier pass.

  Raises:
    InputError: a record is malformed; the message names file, line, field and remedy.
  """
  key = cached.digest("census", 1, source.fingerprint, tokenizer.identity, kind, format)
  ready = cached.folder(cache, key, lambda folder: _pass(source, tokenizer, kind, format, folder))
  return Census(*(np.load(ready / f"{name}.npy", mmap_mode="r") for name in Census._fields))


def _pass(source: Source, tokenizer: Tokenizer, kind: str, format: str, folder: Path) -> None:
  n, sides = len(source), SIDES[kind][1]
  census = Census(
    status=np.zeros(n, np.uint8),
    prompt=np.zeros(n, np.int32),
    completions=np.zeros((n, sides), np.int32),
    shared=np.zeros(n, np.int32),
    group=np.zeros(n, np.uint64),
  )
  started = reported = time.monotonic()
  for i in range(n):
    example = read(source, i, kind, format)
    census.group[i] = prompt_hash(example.prompt)
    reason = flaw(example)
    if reason:
      census.status[i] = REASONS.index(reason)
      continue
    try:
      lengths = measure(encode(example, tokenizer))
    except InputError as error:
      raise InputError(f"{source.where(i)}: {error}") from error
    census.prompt[i], census.shared[i] = lengths.prompt, lengths.shared
    census.completions[i] = lengths.completions
    if time.monotonic() - reported > _EVERY:
      reported = time.monotonic()
      left = (reported - started) * (n - i) / (i + 1)
      _log.info("measuring the data: record %d of %d, %.0f s left", i + 1, n, left)
  for name, values in census._asdict().items():
    np.save(folder / f"{name}.npy", values)


def prompt_hash(prompt: Dialogue) -> int:
  """64 bits of the prompt's content."""
  text = json.dumps([[m["role"], m["content"]] for m in prompt])
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
