"""Examples as rows, rows as an endless stream that is addressed by step, and the stream as batches through Grain.

Row j of step s is row s * B + j of the stream, and that is a pure function of (data, seed): hosts
and workers only divide the work. A stream has no state but the step.
"""

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

from alignjax.data import packing
from alignjax.data.format import Example, read
from alignjax.data.source import Source
from alignjax.data.tokenizer import Tokenizer
from alignjax.data.transform import Side, cut, encode, examples_of, mismatch
from alignjax.errors import InputError

NumpyBatch = dict[str, np.ndarray]


class Item(NamedTuple):
  """An example ready for a row; `example_id` is its place in `Examples`, for a record may give two."""

  sides: list[Side]
  margin: float
  weight: float
  record_id: int
  labels: tuple[float | None, ...] = ()
  example_id: int = -1


class Examples:
  """The examples of a data set: `examples[m]` reads, tokenises and cuts the m-th.

  Attributes:
    records: int32 [M], the record of each example.
    parts: int32 [M], which of the record's examples it is.
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
    self.source, self.tokenizer, self.kind, self.format = source, tokenizer, kind, format
    self.records, self.parts, self.lengths = records, parts, lengths
    self.separator, self.share_prompt = separator, share_prompt

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, m: int) -> Item:
    i = int(self.records[m])
    example = examples_of(self.parse(i), self.kind)[self.parts[m]]
    encoded = encode(example, self.tokenizer, self.kind, self.separator)
    sides = cut(encoded.sides(self.share_prompt), self.lengths[m])
    if [len(side.ids) for side in sides] != [n for n in self.lengths[m].tolist() if n]:
      raise InputError(f"{self.source.where(i)}: changed since it was measured; start again")
    return Item(sides, example.margin, example.weight, i, example.labels, int(m))

  def labels(self, m: int) -> tuple[float | None, ...]:
    """The labels of the m-th example's completions."""
    return examples_of(self.parse(int(self.records[m])), self.kind)[self.parts[m]].labels

  def parse(self, record_id: int) -> Example:
    """A record, before it is tokenised and, where its kind is unpaired, taken apart."""
    return read(self.source, record_id, self.kind, self.format)


class Layout(NamedTuple):
  """The shape of a row.

  Attributes:
    kind: one of format.KINDS.
    length: T, tokens.
    examples: P, the most examples of a row.
    pad_id: what stands where no token is.
    mismatched_length: tokens of the row beside it, where kind is "mismatched".
    responses: K, the most of an example, where kind is "ranked".
    readers: n, the most segments that continue a prompt of another, where prompts are shared.
  """

  kind: str
  length: int
  examples: int
  pad_id: int
  mismatched_length: int = 0
  responses: int = 0
  readers: int = 0


def fill_row(items: Sequence[Item], layout: Layout, before: Item | None = None) -> NumpyBatch:
  """Lays examples into one row: arrays [T], [P] and [P, K] of the batch, without the batch dimension.

  The sides follow each other as segments 1, 2, ...; padding is at the end, but in front of a
  prompt, which generation continues. A ranking with fewer than K responses leaves the numbers of the others
  out. The third completions of triples come after all pairs, as segments 2P + 1, 2P + 2, ...
  Where prompts are shared, "readers" [T, n] has the other segments that see a token, -1 for none.

  Args:
    items: at most P.
    layout: the shape.
    before: the example before the first, where kind is "mismatched": arrays kl_tokens, kl_segment_ids,
      kl_positions and kl_loss_mask then hold, as segment p, the prompt of example p and the completion of
      the one before it.
  """
  P = layout.examples
  stride = layout.responses or min(max((len(item.sides) for item in items), default=1), 2)
  sides = {stride * p + j + 1: side for p, item in enumerate(items) for j, side in enumerate(item.sides[:stride])}
  sides |= {2 * P + p + 1: third for p, item in enumerate(items) for third in item.sides[stride:]}
  start = layout.length - sum(len(side.ids) for side in sides.values()) if layout.kind == "prompt" else 0
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
  """Of each token the other segments that see it: of a prompt, but for its last id, those that continue it."""
  readers = np.full((len(segment_ids), most), -1, np.int32)
  place = {id(side): segment for segment, side in sides.items()}
  for item in items:
    first, *others = item.sides
    seen = np.flatnonzero(segment_ids == place[id(first)])[: first.prompt - 1]
    for n, other in enumerate(others):
      readers[seen, n] = place[id(other)]
  return readers


def _padded(values: Sequence, length: int, dtype: type = np.float32, fill: int = 0) -> np.ndarray:
  """Values [n], or [n, m], with `fill` behind them up to [length, ...]."""
  values = np.asarray(values, dtype)
  return np.concatenate([values, np.full((length - len(values), *values.shape[1:]), fill, dtype)])


def _margins(items: Sequence[Item], layout: Layout, before: Item | None) -> NumpyBatch:
  return {"margins": _padded([item.margin for item in items], layout.examples)}


def _labels(items: Sequence[Item], layout: Layout, before: Item | None) -> NumpyBatch:
  return {"labels": _padded([item.labels[0] for item in items], layout.examples)}


def _ranks(items: Sequence[Item], layout: Layout, before: Item | None) -> NumpyBatch:
  """Ranks [P, K] from 1 without gaps; 0 where there is no response."""
  dense = lambda item: 1 + np.unique(item.labels, return_inverse=True)[1]
  ranks = [_padded(dense(item), layout.responses) for item in items]
  return {"ranks": _padded(ranks or np.zeros((0, layout.responses)), layout.examples)}


def _step_labels(items: Sequence[Item], layout: Layout, before: Item | None) -> NumpyBatch:
  return {"step_labels": _padded([x for item in items for x in item.sides[0].labels], layout.length)}


def _mismatched(items: Sequence[Item], layout: Layout, before: Item | None) -> NumpyBatch:
  pairs = zip(items, [before, *items], strict=False)
  sides = {p: mismatch(mine.sides[0], other.sides[0]) for p, (mine, other) in enumerate(pairs, 1)}
  beside = _lay(sides, layout.mismatched_length, layout.pad_id)
  return {f"kl_{name}": values for name, values in beside.items()}


COLUMNS = {  # what each kind's rows have of their own
  "preference": (_margins,),
  "triple": (_margins,),
  "unpaired": (_labels,),
  "mismatched": (_labels, _mismatched),
  "ranked": (_ranks,),
  "stepwise": (_step_labels,),
}


def _lay(sides: Mapping[int, Side], length: int, pad_id: int, start: int = 0) -> NumpyBatch:
  """Sides, by the number of their segment, one after the other in a row of `length` tokens, from column `start` on."""
  row = {
    "tokens": np.full(length, pad_id, np.int32),
    "segment_ids": np.zeros(length, np.int32),
    "positions": np.zeros(length, np.int32),
    "loss_mask": np.zeros(length, np.float32),
  }
  for segment, side in sides.items():
    here = slice(start, start + len(side.ids))
    row["tokens"][here] = side.ids
    row["segment_ids"][here] = segment
    row["positions"][here] = side.start + np.arange(len(side.ids))
    row["loss_mask"][here] = side.mask
    start = here.stop
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
    j += self._first
    items = [self._examples[m] for m in self._members(step, j)]
    before = None
    if self._layout.kind == "mismatched":  # of the first row it is the step's last
      before = self._examples[self._members(step, (j - 1) % self._rows)[-1]]
    return fill_row(items, self._layout, before)

  def _members(self, step: int, j: int) -> np.ndarray:
    """The examples of row j of a step."""
    epoch, r = divmod(step * self._rows + j, self._plan.rows)
    return packing.examples_of_row(self._plan, self._deal(epoch), r)

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
    # Ctrl-C reaches every process of a terminal. The workers, which inherit this, leave the answer to their parent.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
      self._to_spawn = False
      return next(self._held[0])
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _close(held: list) -> None:
  held.pop().close()  # and let go: Grain's iterators complain if they outlive the modules


def _quieten() -> None:
  """Starts the process by which Python removes the shared memory of others that have ended, as one that says nothing.

  Of batches that were read ahead it would say at the end of a program that they have leaked. There is one such process
  for a program: it says nothing either of shared memory that the caller's own code has leaked, and removes that too.
  """
  before = os.environ.get("PYTHONWARNINGS")
  os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, "ignore:resource_tracker:UserWarning")))
  try:
    resource_tracker.ensure_running()
  finally:
    os.environ.pop("PYTHONWARNINGS")
    os.environ.update({} if before is None else {"PYTHONWARNINGS": before})


def _die_with_parent(worker: int, count: int) -> None:
  """Ends a worker whose parent was killed: Grain's own would live on."""
  del worker, count
  # Known since the worker was spawned: getppid would name init where the parent was killed before this line.
  parent = multiprocessing.parent_process()

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
