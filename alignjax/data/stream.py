"""Examples as rows, rows as an endless stream that is addressed by step, and the stream as batches through Grain.

Row j of step s is row s * B + j of the stream, and that is a pure function of (data, seed): hosts
and workers only divide the work. A stream has no state but the step.
"""

import multiprocessing
import os
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from alignjax.data import packing
from alignjax.data.format import Example, read
from alignjax.data.source import Source
from alignjax.data.tokenizer import Tokenizer
from alignjax.data.transform import Side, cut, encode
from alignjax.errors import InputError

NumpyBatch = dict[str, np.ndarray]


class Item(NamedTuple):
  """An example ready for a row."""

  sides: list[Side]
  margin: float
  weight: float
  record_id: int


class Examples:
  """The examples of a data set: `examples[m]` reads, tokenises and cuts the m-th.

  Attributes:
    records: int32 [M], the record of each example.
    lengths: int32 [M, sides], tokens of each side.
  """

  def __init__(
    self,
    source: Source,
    tokenizer: Tokenizer,
    kind: str,
    format: str,
    records: np.ndarray,
    lengths: np.ndarray,
  ):
    self.source, self.tokenizer, self.kind, self.format = source, tokenizer, kind, format
    self.records, self.lengths = records, lengths

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, m: int) -> Item:
    i = int(self.records[m])
    example = self.parse(i)
    sides = cut(encode(example, self.tokenizer).sides(), self.lengths[m])
    if [len(side.ids) for side in sides] != self.lengths[m].tolist():
      raise InputError(f"{self.source.where(i)}: changed since it was measured; start again")
    return Item(sides, example.margin, example.weight, i)

  def parse(self, record_id: int) -> Example:
    """The example of a record, before tokenisation."""
    return read(self.source, record_id, self.kind, self.format)


class Layout(NamedTuple):
  """The shape of a row.

  Attributes:
    kind: "preference", "sft" or "prompt".
    length: T, tokens.
    examples: P, the most examples of a row.
    pad_id: what stands where no token is.
  """

  kind: str
  length: int
  examples: int
  pad_id: int


def fill_row(items: Sequence[Item], layout: Layout) -> NumpyBatch:
  """Lays examples into one row: arrays [T] and [P] of the batch, without the batch dimension.

  The sides follow each other as segments 1, 2, ...; padding is at the end, but in front of a
  prompt, which generation continues.
  """
  row = {
    "tokens": np.full(layout.length, layout.pad_id, np.int32),
    "segment_ids": np.zeros(layout.length, np.int32),
    "positions": np.zeros(layout.length, np.int32),
    "loss_mask": np.zeros(layout.length, np.float32),
    "example_mask": np.zeros(layout.examples, np.float32),
    "record_ids": np.full(layout.examples, -1, np.int32),
    "weights": np.zeros(layout.examples, np.float32),
  }
  if layout.kind == "preference":
    row["margins"] = np.zeros(layout.examples, np.float32)
  sides = [side for item in items for side in item.sides]
  start = 0
  if layout.kind == "prompt":
    start = layout.length - sum(len(side.ids) for side in sides)
  for segment, side in enumerate(sides, 1):
    here = slice(start, start + len(side.ids))
    row["tokens"][here] = side.ids
    row["segment_ids"][here] = segment
    row["positions"][here] = np.arange(len(side.ids))
    row["loss_mask"][here] = side.mask
    start = here.stop
  for p, item in enumerate(items):
    row["example_mask"][p] = 1
    row["record_ids"][p] = item.record_id
    row["weights"][p] = item.weight
    if layout.kind == "preference":
      row["margins"][p] = item.margin
  return row


def stack(rows: Sequence[NumpyBatch]) -> NumpyBatch:
  """Rows as one batch: a leading dimension on every array."""
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Rows(grain.MapDataset):
  """The rows of the stream that one host reads, in order: its share of every step's, contiguous.

  Row i of host p of n is row (i // b) * B + p * b + i % b of the stream, where b = B / n.
  """

  def __init__(
    self,
    examples: Examples,
    plan: packing.Plan,
    layout: Layout,
    seed: int,
    rows: int,
    process_index: int,
    process_count: int,
  ):
    super().__init__()
    self._examples, self._plan, self._layout, self._seed = examples, plan, layout, seed
    self._rows, self.share = rows, rows // process_count
    self._first = process_index * self.share
    self._deals: dict[int, packing.Deal] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return 2**62  # endless; divisible by any sensible batch

  def __getitem__(self, i: int | slice):
    if isinstance(i, slice):
      return self.slice(i)
    step, j = divmod(i, self.share)
    epoch, r = divmod(step * self._rows + self._first + j, self._plan.rows)
    here = packing.examples_of_row(self._plan, self._deal(epoch), r)
    return fill_row([self._examples[m] for m in here], self._layout)

  def __str__(self) -> str:
    return f"Rows({self.share} of {self._rows} per step)"

  def _deal(self, epoch: int) -> packing.Deal:
    """The deal of an epoch; the last two are kept, since threads and steps straddle the border."""
    with self._lock:
      if epoch not in self._deals:
        self._deals = {e: dealt for e, dealt in self._deals.items() if abs(e - epoch) == 1}
        self._deals[epoch] = packing.deal(self._plan, self._seed, epoch)
      return self._deals[epoch]

  def __getstate__(self) -> dict:
    return {name: value for name, value in self.__dict__.items() if name not in ("_deals", "_lock")}

  def __setstate__(self, state: dict) -> None:
    self.__dict__ |= state | {"_deals": {}, "_lock": threading.Lock()}


class Batches:
  """The batches [share, ...] of a host from a step on, without end.

  They are read ahead by two threads, or by `workers` processes. `close` ends these; so does the end of
  the program, quietly, also if an iterator was left in the middle.
  """

  def __init__(self, rows: Rows, step: int, workers: int):
    batches = rows.batch(rows.share, drop_remainder=True, batch_fn=stack)[step:]
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16))
    if workers:
      if not flags.FLAGS.is_parsed():  # Grain reads a flag; a program without absl never parses them
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=4)
      batches = batches.mp_prefetch(options, worker_init_fn=_die_with_parent)
    self._held = [iter(batches)]
    self.close = weakref.finalize(self, _close, self._held)

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> NumpyBatch:
    if not self._held:
      raise StopIteration
    return next(self._held[0])


def _close(held: list) -> None:
  held.pop().close()  # and let go: Grain's iterators complain if they outlive the modules


def _die_with_parent(worker: int, count: int) -> None:
  """Ends a worker whose parent was killed: Grain's own would live on."""
  del worker, count
  # Known since the worker was spawned: getppid would name init where the parent was killed before this line.
  parent = multiprocessing.parent_process()

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
