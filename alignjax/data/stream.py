"""Examples as rows, rows as an endless stream that is addressed by step, and the stream as batches through Grain.

Row j of step s is row s * B + j of the stream, a pure function of (data, seed): hosts
and workers only divide the work. The step is the only state of a stream.
"""

import dataclasses
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import resource_tracker
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from alignjax.data import packing, segment
from alignjax.data.format import Example, read
from alignjax.data.settings import DataConfig
from alignjax.data.source import Source
from alignjax.data.tokenizer import Tokenizer
from alignjax.data.transform import Side, cut, encode, examples_of, mismatch
from alignjax.errors import InputError

NumpyBatch = dict[str, np.ndarray]


class Item(NamedTuple):
  """An example ready for a row; `example_id` is its place in `Examples`, because a record may give two examples."""

  sides: list[Side]
  margin: float
  weight: float
  record_id: int
  labels: tuple[float | None, ...] = ()
  example_id: int = -1
  confidence: float = 1.0


class Examples:
  """The examples of a data set: `examples[m]` reads, tokenises and cuts the m-th.

  Attributes:
    records: int32 [M], the record of each example.
    parts: int32 [M], the place of each example among those of its record.
    lengths: int32 [M, sides], tokens of each side; 0 where an example has fewer.
  """

  def __init__(
    self,
    source: Source,
    tokenizer: Tokenizer,
    kind: str,
    format: str,
    records: np.ndarray,
    parts: np.ndarray,
    lengths: np.ndarray,
    separator: str = "\n",
    share_prompt: bool = False,
  ):
    self.source = source
    self.tokenizer = tokenizer
    self.kind = kind
    self.format = format
    self.records = records
    self.parts = parts
    self.lengths = lengths
    self.separator = separator
    self.share_prompt = share_prompt

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, m: int) -> Item:
    i = int(self.records[m])
    example = examples_of(self.parse(i), self.kind)[self.parts[m]]
    encoded = encode(example, self.tokenizer, self.kind, self.separator)
    sides = cut(encoded.sides(self.share_prompt), self.lengths[m])
    if [len(side.ids) for side in sides] != [n for n in self.lengths[m].tolist() if n]:
      raise InputError(f"{self.source.where(i)}: changed since it was measured; start again")
    return Item(sides, example.margin, example.weight, i, example.labels, int(m), example.confidence)

  def labels(self, m: int) -> tuple[float | None, ...]:
    """The labels of the m-th example's completions."""
    return examples_of(self.parse(int(self.records[m])), self.kind)[self.parts[m]].labels

  def parse(self, record_id: int) -> Example:
    """Reads a record; it is not tokenised, and, if the kind is unpaired, not split into its examples."""
    return read(self.source, record_id, self.kind, self.format)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """The shape of a row.

  Attributes:
    kind: one of format.KINDS.
    length: T, tokens.
    examples: P, the most examples of a row.
    pad_id: the id of padding.
    mismatched_length: tokens of the row with mismatched completions, if the kind is "mismatched".
    responses: K, the most of an example, if the kind is "ranked".
    readers: n, the most segments that continue the prompt of another segment, if prompts are shared.
  """

  kind: str
  length: int
  examples: int
  pad_id: int
  mismatched_length: int = 0
  responses: int = 0
  readers: int = 0


def make_layout(config: DataConfig, kind: str, *, texts: int, pad_id: int) -> Layout:
  """The shape of a row, whose mismatched rows are as long as the others. Prompts are never packed.

  Args:
    config: of the data.
    kind: one of format.KINDS.
    texts: of an example, at most.
    pad_id: the id of padding.
  """
  packs = config.pack and kind != "prompt"
  return Layout(
    kind=kind,
    length=config.row_length,
    examples=config.max_examples if packs else 1,
    pad_id=pad_id,
    mismatched_length=config.row_length if kind == "mismatched" else 0,
    responses=texts if kind == "ranked" else 0,
    readers=texts - 1 if config.share_prompts else 0,
  )


def fill_row(items: Sequence[Item], layout: Layout, before: Item | None = None) -> NumpyBatch:
  """Lays examples into one row: arrays [T], [P] and [P, K] of the batch, without the batch dimension.

  The sides follow each other as segments (`data.segment`). Padding is at the end, or, if the kind is "prompt", in
  front, because generation continues the row. A ranking with fewer than K responses skips the numbers of the others.
  If prompts are shared, "readers" [T, n] has the other segments that see a token, -1 for none.

  Args:
    items: at most P.
    layout: the shape.
    before: the example before the first, if the kind is "mismatched". Then the arrays kl_tokens, kl_segment_ids,
      kl_positions and kl_loss_mask have, as segment p, the prompt of example p and the completion of
      the example before it.
  """
  P = layout.examples
  stride = layout.responses or min(max((len(item.sides) for item in items), default=1), segment.PAIR)
  sides = {segment.of(p, j, stride): side for p, item in enumerate(items) for j, side in enumerate(item.sides[:stride])}
  sides |= {segment.of_third(p, P): third for p, item in enumerate(items) for third in item.sides[stride:]}
  start = 0
  if layout.kind == "prompt":
    start = layout.length - sum(len(side.ids) for side in sides.values())
  row = _lay(sides, layout.length, layout.pad_id, start) | {
    "example_mask": _padded([1] * len(items), P),
    "record_ids": _padded([item.record_id for item in items], P, np.int32, -1),
    "example_ids": _padded([item.example_id for item in items], P, np.int32, -1),
    "weights": _padded([item.weight for item in items], P),
  }
  if layout.readers:
    row["readers"] = _readers(sides, items, row["segment_ids"], layout.readers)
  for columns in COLUMNS.get(layout.kind, ()):
    row |= columns(items, layout, before)
  return row


def _readers(sides: Mapping[int, Side], items: Sequence[Item], segment_ids: np.ndarray, most: int) -> np.ndarray:
  """For each token, the other segments that see it: int32 [T, most], -1 for none.

  The ids of a prompt except the last are seen by the segments that continue it.
  """
  readers = np.full((len(segment_ids), most), -1, np.int32)
  segment_of = {id(side): number for number, side in sides.items()}
  for item in items:
    first, *others = item.sides
    seen = np.flatnonzero(segment_ids == segment_of[id(first)])[: first.prompt - 1]
    for n, other in enumerate(others):
      readers[seen, n] = segment_of[id(other)]
  return readers


def _padded(values: Sequence | np.ndarray, length: int, dtype: type = np.float32, fill: int = 0) -> np.ndarray:
  """Pads values [n] or [n, m] with `fill` to [length, ...]."""
  array: np.ndarray = np.asarray(values, dtype)
  return np.concatenate([array, np.full((length - len(array), *array.shape[1:]), fill, dtype)])


def _margins(items: Sequence[Item], layout: Layout, before: Item | None) -> NumpyBatch:
  return {"margins": _padded([item.margin for item in items], layout.examples)}


def _confidences(items: Sequence[Item], layout: Layout, before: Item | None) -> NumpyBatch:
  return {"confidences": _padded([item.confidence for item in items], layout.examples)}


def _labels(items: Sequence[Item], layout: Layout, before: Item | None) -> NumpyBatch:
  return {"labels": _padded([item.labels[0] for item in items], layout.examples)}


def _ranks(items: Sequence[Item], layout: Layout, before: Item | None) -> NumpyBatch:
  """The ranks [P, K] from 1 without gaps; 0 where there is no response."""
  ranks = []
  for item in items:
    _, places = np.unique(np.asarray(item.labels, np.float64), return_inverse=True)
    ranks.append(_padded(places + 1, layout.responses))
  return {"ranks": _padded(ranks or np.zeros((0, layout.responses)), layout.examples)}


def _step_labels(items: Sequence[Item], layout: Layout, before: Item | None) -> NumpyBatch:
  labels: list[float] = []
  for item in items:
    labels_of_item = item.sides[0].labels
    assert labels_of_item is not None
    labels.extend(labels_of_item)
  return {"step_labels": _padded(labels, layout.length)}


def _mismatched(items: Sequence[Item], layout: Layout, before: Item | None) -> NumpyBatch:
  pairs = zip(items, [before, *items], strict=False)
  sides = {}
  for p, (item, previous) in enumerate(pairs):
    assert previous is not None
    sides[segment.of(p)] = mismatch(item.sides[0], previous.sides[0])
  row = _lay(sides, layout.mismatched_length, layout.pad_id)
  return {f"kl_{name}": values for name, values in row.items()}


COLUMNS = {  # arrays of a row that only some kinds have
  "preference": (_margins, _confidences),
  "triple": (_margins, _confidences),
  "unpaired": (_labels,),
  "mismatched": (_labels, _mismatched),
  "ranked": (_ranks,),
  "stepwise": (_step_labels,),
}


def _lay(sides: Mapping[int, Side], length: int, pad_id: int, start: int = 0) -> NumpyBatch:
  """Lays sides, by segment number, one after the other into a row of `length` tokens, from column `start` on."""
  row = {
    "tokens": np.full(length, pad_id, np.int32),
    "segment_ids": np.zeros(length, np.int32),
    "positions": np.zeros(length, np.int32),
    "loss_mask": np.zeros(length, np.float32),
  }
  for number, side in sides.items():
    columns = slice(start, start + len(side.ids))
    row["tokens"][columns] = side.ids
    row["segment_ids"][columns] = number
    row["positions"][columns] = side.start + np.arange(len(side.ids))
    row["loss_mask"][columns] = side.mask
    start = columns.stop
  return row


def stack(rows: Sequence[NumpyBatch]) -> NumpyBatch:
  """Stacks rows to one batch: every array gets a leading dimension."""
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Rows(grain.MapDataset):
  """The rows of the stream that one host reads, in order: a contiguous share of every step's rows.

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
    self._examples = examples
    self._plan = plan
    self._layout = layout
    self._seed = seed
    self._rows = rows
    self.share = rows // process_count
    self._first = process_index * self.share
    self._deals: dict[int, packing.Deal] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return 2**62  # endless; divisible by any sensible batch

  def __getitem__(self, i: int | slice):
    if isinstance(i, slice):
      return self.slice(i)
    step, j = divmod(i, self.share)
    j += self._first
    items = [self._examples[m] for m in self._members(step, j)]
    before = None
    if self._layout.kind == "mismatched":  # the first row follows the last one of the same step
      before = self._examples[self._members(step, (j - 1) % self._rows)[-1]]
    return fill_row(items, self._layout, before)

  def _members(self, step: int, j: int) -> np.ndarray:
    """The examples of row j of a step."""
    epoch, r = divmod(step * self._rows + j, self._plan.rows)
    return packing.examples_of_row(self._plan, self._deal(epoch), r)

  def __str__(self) -> str:
    return f"Rows({self.share} of {self._rows} per step)"

  def _deal(self, epoch: int) -> packing.Deal:
    """The deal of an epoch; two are kept, because threads and steps straddle the border of epochs."""
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

  Two threads, or `workers` processes, read ahead. `close` ends them; so does the end of
  the program, without a message, even in the middle of an iteration.
  """

  def __init__(self, rows: Rows, step: int, workers: int):
    batches = rows.batch(rows.share, drop_remainder=True, batch_fn=stack)[step:]
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16))
    if workers:
      if not flags.FLAGS.is_parsed():  # Grain reads a flag; a program without absl never parses them
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=4)
      batches = batches.mp_prefetch(options, worker_init_fn=_die_with_parent)
      _quieten()
    self._to_spawn = bool(workers)
    self._held = [iter(batches)]
    self.close = weakref.finalize(self, _close, self._held)

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> NumpyBatch:
    if not self._held:
      raise StopIteration
    if not self._to_spawn:
      return next(self._held[0])
    # Ctrl-C reaches every process of a terminal. The workers inherit the blocked signal and leave it to their parent.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
      self._to_spawn = False
      return next(self._held[0])
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _close(held: list) -> None:
  held.pop().close()  # and drop the reference: Grain's iterators fail if they outlive the modules


def _quieten() -> None:
  """Starts Python's resource tracker, which removes leaked shared memory, with its warnings off.

  At the end of a program it would warn that batches which were read ahead have leaked. A program has one tracker, so
  shared memory that the caller's own code leaks is removed without a warning too.
  """
  before = os.environ.get("PYTHONWARNINGS")
  os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, "ignore:resource_tracker:UserWarning")))
  try:
    resource_tracker.ensure_running()
  finally:
    os.environ.pop("PYTHONWARNINGS")
    if before is not None:
      os.environ["PYTHONWARNINGS"] = before


def _die_with_parent(worker: int, count: int) -> None:
  """Ends a worker whose parent was killed; Grain itself would leave it running."""
  del worker, count
  # Set when the worker was spawned. os.getppid would name init if the parent was killed before this line.
  parent = multiprocessing.parent_process()
  assert parent is not None

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
