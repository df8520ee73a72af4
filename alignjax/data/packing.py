"""Packs whole examples into rows of one length, the same number of rows in every epoch.

The rows are planned once, as slots of given lengths. Each epoch deals the examples anew among the slots of their
own length, and shuffles the rows. So the rows per epoch are constant, every example comes once per epoch, and row g of
the endless stream is a pure function of (lengths, seed, g): a resumed run asks for a later row.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
  """Rows as slots, and slots as lengths.

  Attributes:
    lengths: int32 [N], lengths of the slots, descending.
    order: int32 [N], the examples by descending length: the deal before any shuffle.
    slots: int32 [N], the slots of row 0, of row 1, ...
    starts: int64 [rows + 1], the place in `slots` of each row's first slot.
    row_length: tokens of a row.
  """

  lengths: np.ndarray
  order: np.ndarray
  slots: np.ndarray
  starts: np.ndarray
  row_length: int

  @property
  def rows(self) -> int:
    """Rows per epoch."""
    return len(self.starts) - 1

  @property
  def padding_share(self) -> float:
    """The share of all row positions that holds no token."""
    return 1 - float(self.lengths.sum(dtype=np.int64)) / (self.rows * self.row_length)


@dataclass(frozen=True)
class Deal:
  """The examples of one epoch by slot, and the order of its rows; `examples_of_row` reads it."""

  examples: np.ndarray  # int32 [N], the example in each slot
  rows: np.ndarray  # int32 [rows], the planned row of each row of the epoch


def make_plan(lengths: np.ndarray, row_length: int, max_examples: int) -> Plan:
  """Plans rows by best-fit decreasing: each length, longest first, goes to the fullest row that still has room.

  Args:
    lengths: int32 [N], tokens of each example (both sides of a pair), 1 to `row_length`.
    row_length: tokens of a row.
    max_examples: the most examples in a row; 1 means no packing.
  """
  order = np.argsort(-lengths, kind="stable").astype(np.int32)
  lengths = lengths[order]
  row_of_slot = _best_fit(lengths, row_length, max_examples)
  slots = np.argsort(row_of_slot, kind="stable").astype(np.int32)
  starts = np.concatenate([[0], np.cumsum(np.bincount(row_of_slot))])
  return Plan(lengths, order, slots, starts, row_length)


def _best_fit(lengths: np.ndarray, row_length: int, max_examples: int) -> np.ndarray:
  """Assigns each slot its row, int32 [N]; `lengths` descend, so equal lengths are placed many at a time."""
  row_of_slot = np.empty(len(lengths), np.int32)
  filled = np.zeros(len(lengths), np.int32)  # examples in each row
  rows = 0
  open_rows: dict[int, list[int]] = {}  # rows by the room left in them
  rooms: list[int] = []  # the keys of open_rows, ascending

  def reopen(chosen: list[int], room: int) -> None:
    """Registers the room that is left in rows, unless they are full."""
    unfilled = [row for row in chosen if filled[row] < max_examples]
    if unfilled and room:
      if room not in open_rows:
        open_rows[room] = []
        insort(rooms, room)
      open_rows[room] += unfilled

  starts = np.flatnonzero(np.diff(lengths, prepend=0))
  for start, end in zip(starts, [*starts[1:], len(lengths)], strict=True):
    length = int(lengths[start])
    while start < end:
      k = bisect_left(rooms, length)
      if k == len(rooms):
        per_row = min(row_length // length, max_examples)
        count = -(-(end - start) // per_row)
        room = row_length
        chosen = list(range(rows, rows + count))
        rows += count
      else:
        room = rooms[k]
        candidates = open_rows[room]
        count = min(end - start, len(candidates))
        chosen = candidates[-count:]
        del candidates[-count:]
        if not candidates:
          del open_rows[room], rooms[k]
      row_of_slot[start : start + count] = chosen
      filled[chosen] += 1
      start += count
      reopen(chosen, room - length)
  return row_of_slot


def deal(plan: Plan, seed: int, epoch: int) -> Deal:
  """Deals the examples of one epoch.

  The order comes from the raw bits of a counter-based generator, which NumPy guarantees to keep, and not from
  `Generator.permutation`, which NumPy may change.
  """
  n = len(plan.order)
  bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n + plan.rows)
  examples = plan.order[np.lexsort((bits[:n], -plan.lengths))]
  return Deal(examples, np.argsort(bits[n:], kind="stable").astype(np.int32))


def examples_of_row(plan: Plan, dealt: Deal, r: int) -> np.ndarray:
  """Returns the examples of row `r` of an epoch, int32 [1 to max_examples]."""
  row = dealt.rows[r]
  return dealt.examples[plan.slots[plan.starts[row] : plan.starts[row + 1]]]


def pack_in_order(lengths: np.ndarray, row_length: int, max_examples: int) -> list[range]:
  """Packs consecutive examples into rows, for one pass in file order; returns the examples of each row."""
  rows = []
  first = 0
  room = row_length
  for i, length in enumerate(lengths.tolist()):
    if length > room or i - first == max_examples:
      rows.append(range(first, i))
      first = i
      room = row_length
    room -= length
  return [*rows, range(first, len(lengths))]
