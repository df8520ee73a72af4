"""The one pass over all records: each is parsed, checked, tokenised and measured; the measures are cached on disk.

The pass depends on the data, the tokenizer and the kind alone. Row length, limits, packing, the
held-out share and the seed are applied to its arrays afterwards, which is fast.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignjax.data import cache as cached
from alignjax.data.field import Dialogue
from alignjax.data.format import flaw, read
from alignjax.data.source import Source
from alignjax.data.tokenizer import Tokenizer
from alignjax.data.transform import (
  ABSENT,
  REASONS,
  check_steps,
  encode,
  examples_of,
  measure,
  most_examples,
  step_ends,
)
from alignjax.errors import InputError

_log = logging.getLogger(__name__)
_VERSION = 6  # of the rules by which records are read, dropped and refused
_EVERY = 20.0  # seconds between progress lines


class Census(NamedTuple):
  """The measures of R records, mapped from disk.

  They may give N >= R examples: example e of record i has the index e * R + i.

  Attributes:
    status: uint8 [N], a place in `transform.REASONS`: the flaw of the example that no row length changes.
    prompt: int32 [N], tokens of the prompt.
    completions: int32 [N, sides], tokens of each completion; 0 where an example has fewer than others.
    shared: int32 [N], see `transform.Measure`.
    group: uint64 [R], a hash of the prompt, so that records of one prompt are held out together.
  """

  status: np.ndarray
  prompt: np.ndarray
  completions: np.ndarray
  shared: np.ndarray
  group: np.ndarray


def take_census(
  source: Source, tokenizer: Tokenizer, kind: str, format: str = "auto", cache: str = "", separator: str = "\n"
) -> Census:
  """Measures every record, or loads the measures of an earlier pass.

  Raises:
    InputError: a record is malformed; the message names file, line, field and remedy.
  """
  parts: list[str | int | Sequence] = ["census", _VERSION, source.fingerprint, tokenizer.identity, kind, format]
  if kind == "stepwise":
    parts.append(separator)
  key = cached.digest(*parts)
  ready = cached.folder(cache, key, lambda folder: _pass(source, tokenizer, kind, format, separator, folder))
  return Census(*(np.load(ready / f"{name}.npy", mmap_mode="r") for name in Census._fields))


def _pass(source: Source, tokenizer: Tokenizer, kind: str, format: str, separator: str, folder: Path) -> None:
  """Measures every record, and writes the arrays of a `Census` to `folder`."""
  records = len(source)
  n = records * most_examples(kind)
  census = Census(
    status=np.full(n, ABSENT, np.uint8),
    prompt=np.zeros(n, np.int32),
    completions=np.zeros((n, 0), np.int32),
    shared=np.zeros(n, np.int32),
    group=np.zeros(records, np.uint64),
  )
  ends: tuple[tuple[int, ...], ...] = ()
  if kind == "stepwise":
    ends = step_ends(tokenizer, separator)
  started = reported = time.monotonic()
  for i in range(records):
    record = read(source, i, kind, format)
    census.group[i] = prompt_hash(record.prompt)
    is_tie = flaw(record, kind) == "chosen equal to rejected"  # not seen once a pair is split
    for e, example in enumerate(examples_of(record, kind)):
      index = e * records + i
      reason = "chosen equal to rejected" if is_tie else flaw(example, kind)
      census.status[index] = REASONS.index(reason or "kept")
      if reason:
        continue
      try:
        encoded = encode(example, tokenizer, kind, separator)
        if kind == "stepwise":
          check_steps(example, encoded, separator, ends)
        lengths = measure(encoded)
      except InputError as error:
        raise InputError(f"{source.where(i)}: {error}") from error
      census.prompt[index] = lengths.prompt
      census.shared[index] = lengths.shared
      if (missing := len(lengths.completions) - census.completions.shape[1]) > 0:
        census = census._replace(completions=np.pad(census.completions, ((0, 0), (0, missing))))
      census.completions[index, : len(lengths.completions)] = lengths.completions
    if time.monotonic() - reported > _EVERY:
      reported = time.monotonic()
      left = (reported - started) * (records - i) / (i + 1)
      _log.info("measuring the data: record %d of %d, %.0f s left", i + 1, records, left)
  for name, values in census._asdict().items():
    np.save(folder / f"{name}.npy", values)


def prompt_hash(prompt: Dialogue) -> int:
  """Hashes the prompt's roles and contents to 64 bits."""
  text = json.dumps([[message["role"], message["content"]] for message in prompt])
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
