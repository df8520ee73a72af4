"""A data set as batches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alignjax.data import cache as cached
from alignjax.data import packing
from alignjax.data.census import take_census
from alignjax.data.field import columns
from alignjax.data.format import Example
from alignjax.data.settings import DataConfig, check_request, check_sharing, require
from alignjax.data.source import Record, Source, open_source
from alignjax.data.stream import Batches, Examples, Layout, NumpyBatch, Rows, fill_row, make_layout, stack
from alignjax.data.tokenizer import Tokenizer
from alignjax.data.transform import ABSENT, KEPT, REASONS, UNPAIRED, Fit, content_hash, fit
from alignjax.errors import InputError

LABELLED = (*UNPAIRED, "ranked", "stepwise")


@dataclass(frozen=True, eq=False)
class Dataset:
  """The examples of one split as batches; made by `open`.

  Attributes:
    source: all records of the split's files.
    tokenizer: of the model that reads them.
    config: what is read, and the shape of a batch.
    kind: one of format.KINDS except "text".
    split: "train" or "eval".
    seed: of the order of the batches.
    member: bool [R], the records that belong to the split.
    prompts: int32 [N], tokens of each example's prompt.
    fit: for each example, if it is kept and at which length.
  """

  source: Source
  tokenizer: Tokenizer
  config: DataConfig
  kind: str
  split: str
  seed: int
  member: np.ndarray
  prompts: np.ndarray
  fit: Fit

  @classmethod
  def open(cls, config: DataConfig, tokenizer: Tokenizer, kind: str, split: str = "train", seed: int = 0) -> "Dataset":
    """Opens a split; the first opening checks and measures all records.

    The held-out share is chosen by a hash of the prompt: it is the same in every run, for every
    kind and seed, and no prompt is on both sides.

    Raises:
      InputError: a file or a record is malformed, or no example is left.
    """
    check_request(config, kind, split)
    check_sharing(config, kind)
    path = config.train
    if split == "eval" and config.eval:
      path = config.eval
    require(path != "", "train", path, "the path of a data file")
    if split == "eval" and not config.eval and not config.holdout:
      raise InputError("data.eval is empty and data.holdout is 0; give one of them to evaluate")
    source = open_source(path, config.cache)
    census = take_census(source, tokenizer, kind, config.format, config.cache, config.step_separator)
    member = np.ones(len(source), bool)
    if not config.eval:
      member = census.group < np.uint64(config.holdout * 2**64)
      if split == "train":
        member = ~member
    measures = census.status, census.prompt, census.completions, census.shared
    fits = fit(*measures, config.row_length, config.max_prompt_length, config.overlong, config.share_prompts)
    dataset = cls(source, tokenizer, config, kind, split, seed, member, census.prompt, fits)
    if not len(dataset):
      raise InputError(f"{dataset._name}: no example is left: {dataset._why_empty()}")
    if kind == "ranked" and not dataset.labels[1]:
      raise InputError(
        f"{dataset._name}: all responses of all {len(dataset):,} rankings are tied, so there is no order to learn; "
        "give some other ranks"
      )
    return dataset

  def __len__(self) -> int:
    return len(self.examples)

  @cached_property
  def examples(self) -> Examples:
    """The kept examples of the split, in file order (unpaired data: all first examples of records, then the second)."""
    kept = np.flatnonzero(self._mine & (self.fit.status == KEPT)).astype(np.int32)
    parts, records = np.divmod(kept, np.int32(len(self.source)))
    return Examples(
      self.source,
      self.tokenizer,
      self.kind,
      self.config.format,
      records,
      parts,
      self.fit.lengths[kept],
      self.config.step_separator,
      self.config.share_prompts,
    )

  @cached_property
  def layout(self) -> Layout:
    """The shape of a row."""
    layout = make_layout(self.config, self.kind, texts=self.fit.lengths.shape[1], pad_id=self.tokenizer.pad_id)
    if self.kind == "mismatched":
      layout = replace(layout, mismatched_length=self._mismatched_length(layout.examples))
    return layout

  @cached_property
  def plan(self) -> packing.Plan:
    """The rows of an epoch."""
    lengths = self.examples.lengths.sum(axis=1)
    return packing.make_plan(lengths, self.layout.length, self.layout.examples)

  @cached_property
  def fingerprint(self) -> str:
    """Hex sha256 of all that the batches depend on except the seed: data, tokenizer, split and shape."""
    c = self.config
    return cached.digest(
      "dataset",
      1,
      self.source.fingerprint,
      self.tokenizer.identity,
      (self.kind, c.format, *self._membership),
      (c.rows, self.layout.length, self.layout.examples, c.max_prompt_length, c.overlong),
      *self._stepping,
      *self._sharing,
    )

  @cached_property
  def content(self) -> np.ndarray:
    """A sha256 of the tokens and mask of each example, uint8 [M, 32]; computed in one pass and cached."""
    tokenization = self.tokenizer.identity, asdict(self.tokenizer.template)
    kind = self.kind, self.config.format
    key = cached.digest(
      "content", 2, self.source.fingerprint, tokenization, kind, self._membership, self._cutting, *self._sharing
    )

    def make(folder: Path) -> None:
      hashes = [content_hash(self.examples[m].sides) for m in range(len(self))]
      np.save(folder / "content.npy", np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32))

    return np.load(cached.folder(self.config.cache, key, make) / "content.npy", mmap_mode="r")

  @cached_property
  def labels(self) -> tuple[int, int]:
    """(examples with a label of the lower class, of the higher class); computed in one pass and cached.

    Unpaired data has undesirable and desirable completions; stepwise data has answers with a wrong step and answers
    with a right one; ranked data has rankings whose responses are all tied, and the others. (0, 0) for kinds without
    labels.
    """
    if self.kind not in LABELLED:
      return 0, 0
    selection = *self._cutting, *self._stepping, *self._sharing  # with the split, this decides which examples are left
    kind = self.kind, self.config.format
    key = cached.digest(
      "labels", 3, self.source.fingerprint, self.tokenizer.identity, kind, self._membership, selection
    )

    def make(folder: Path) -> None:
      classes = [_classes(self.examples.labels(m), self.kind) for m in range(len(self))]
      np.save(folder / "labels.npy", np.array(classes, np.int64).sum(axis=0))

    low, high = np.load(cached.folder(self.config.cache, key, make) / "labels.npy")
    return int(low), int(high)

  def label_lines(self) -> list[str]:
    """Lines for people on the labels: the count of each class, and the consequence if one is empty."""
    low, high = self.labels
    if self.kind in UNPAIRED:
      lines = [f"{high:,} desirable and {low:,} undesirable"]
      if not low:
        lines.append("no undesirable example: nothing is compared, all of these are only made more likely")
      elif not high:
        lines.append("no desirable example: nothing is compared, all of these are only made less likely")
      return lines
    if self.kind == "stepwise":
      lines = [f"{high:,} answers with a right step, {low:,} with a wrong one"]
      if not low or not high:
        lines.append("all steps have one label: a score that is always the same fits them")
      return lines
    if self.kind == "ranked" and low:
      return [f"{low:,} {_plural(low, 'ranking')} in which all responses are tied: no order is learned from them"]
    return []

  @cached_property
  def report(self) -> dict[str, Any]:
    """Counts of the split: records read, examples lost and why, and the size of an epoch."""
    return {
      "records": int(self.member.sum()),
      "blank_lines": self.source.blanks,
      "examples": len(self),
      "dropped": {reason: count for reason, count, _ in self._dropped()},
      "cut": int((self.fit.cut & self._mine).sum()),
      "tokens": int(self.examples.lengths.sum(dtype=np.int64)),
      "rows": self.plan.rows,
      "padding_share": self.plan.padding_share,
    }

  def report_lines(self) -> list[str]:
    """The report as lines for people."""
    r = self.report
    kind = self.kind
    if kind == "mismatched":
      kind = "unpaired"
    return [
      f"{self._name}: {r['examples']:,} {kind} examples of {r['records']:,} records, {r['tokens']:,} tokens",
      f"  {r['rows']:,} rows of {self.layout.length:,} tokens an epoch, "
      f"{r['examples'] / r['rows']:.2f} examples a row, {r['padding_share']:.1%} padding",
      *(f"  {line}" for line in self.label_lines()),
      *(f"  {line}" for line in self._losses()),
      *(f"  {line}" for line in self.held_out_lines()),
    ]

  def batches(self, step: int = 0, process_index: int = 0, process_count: int = 1) -> Batches:
    """Iterates this host's rows [B / process_count, ...] of the batches of steps `step`, `step` + 1, ... without end.

    The batch of a step is a pure function of (fingerprint, seed, step). It is the same for any number of workers
    and of hosts, which hold its rows in order. Every example comes once per epoch; a batch may span two epochs.

    With workers, a program needs the `if __name__ == "__main__"` guard. `close()` ends the
    iterator's threads and processes.
    """
    rows = self.config.rows
    _share(rows, process_index, process_count)
    mine = Rows(self.examples, self.plan, self.layout, self.seed, rows, process_index, process_count)
    return Batches(mine, step, self.config.workers)

  def epoch(self, rows: int = 0, process_index: int = 0, process_count: int = 1) -> Iterator[NumpyBatch]:
    """Iterates this host's rows of the batches of one pass, each example once, in file order.

    Args:
      rows: rows of a batch over all hosts; 0: as in training. Empty rows complete the last batch.
      process_index: the number of this host.
      process_count: the number of hosts.
    """
    rows = rows or self.config.rows
    share = _share(rows, process_index, process_count)
    lengths = self.examples.lengths.sum(axis=1)
    ranges = packing.pack_in_order(lengths, self.layout.length, self.layout.examples)
    ranges += [range(0)] * (-len(ranges) % rows)

    def fill(number: int) -> NumpyBatch:
      items = [self.examples[m] for m in ranges[number]]
      if self.kind != "mismatched" or not items:
        return fill_row(items, self.layout)
      first = number - number % rows  # the first row of the batch
      rotated = [*ranges[number : first + rows], *ranges[first:number]]  # the batch's rows from this one, cyclically
      before = next(row for row in reversed(rotated) if row)
      return fill_row(items, self.layout, self.examples[before[-1]])

    starts = range(process_index * share, len(ranges), rows)
    return (stack([fill(row) for row in range(start, start + share)]) for start in starts)

  def where(self, record_id: int) -> str:
    """The place of a record: "pairs.jsonl:732"."""
    return self.source.where(record_id)

  def record(self, record_id: int) -> Record:
    """A record as it is on disk."""
    return self.source[record_id]

  def columns(self, record_ids: Sequence[int]) -> dict[str, list]:
    """The fields of these records as lists, for rewards, in the order of `record_ids`; None for a missing field."""
    return columns([self.record(int(record_id)) for record_id in record_ids])

  def example(self, record_id: int) -> Example:
    """A record as messages."""
    return self.examples.parse(record_id)

  @property
  def _membership(self) -> tuple[str, float]:
    """The part of a digest that tells which records belong to the split: (name, held-out share)."""
    if self.config.eval:
      return "all", 0
    return self.split, self.config.holdout

  @property
  def _cutting(self) -> tuple[int, int, str]:
    """The part of a digest that tells what is dropped or cut."""
    return self.layout.length, self.config.max_prompt_length, self.config.overlong

  @property
  def _stepping(self) -> tuple[str, ...]:
    """The part of a digest for stepwise data; empty for other kinds."""
    if self.kind == "stepwise":
      return (self.config.step_separator,)
    return ()

  @property
  def _sharing(self) -> tuple[str, ...]:
    """The part of a digest for shared prompts; empty if prompts are not shared."""
    if self.config.share_prompts:
      return ("shared prompts",)
    return ()

  @property
  def _mine(self) -> np.ndarray:
    """bool [N], the examples that belong to the split."""
    return np.tile(self.member, len(self.fit.status) // len(self.source))

  def _mismatched_length(self, examples: int) -> int:
    """An upper bound on the tokens of a row in which each prompt has the completion of the example before."""
    kept = self._mine & (self.fit.status == KEPT)
    prompts = self.prompts[kept]
    completions = self.fit.lengths[kept, 0] - prompts
    longest = min(
      self.config.row_length + completions.max() - completions.min(),  # a row gains one completion and loses one
      examples * (prompts.max() + completions.max()),
    )
    multiple = math.gcd(self.config.row_length, 128)  # as well aligned for an accelerator as the rows are
    return -(-int(longest) // multiple) * multiple

  @property
  def _name(self) -> str:
    path = self.config.train
    if self.split == "eval":
      path = self.config.eval or path
    return f"{path} [{self.split}]"

  def _dropped(self) -> Iterator[tuple[str, int, str]]:
    """(reason, examples, place of the first) for each reason to drop examples of the split."""
    for number, reason in enumerate(REASONS):
      if number in (KEPT, ABSENT):
        continue
      lost = np.flatnonzero(self._mine & (self.fit.status == number))
      if len(lost):
        yield reason, len(lost), self._first(lost)

  def _first(self, examples: np.ndarray) -> str:
    """The place of the first of these examples in the files."""
    return self.where(int((examples % len(self.source)).min()))

  def held_out_lines(self) -> list[str]:
    """A line for people on how much of the file is held out from training; no line if nothing is to be."""
    if self.split == "eval" or self.config.eval or not self.config.holdout:
      return []
    count = len(self.source) - int(self.member.sum())
    share = f"data.holdout={self.config.holdout:g}"
    if not count:
      return [f"no record is held out ({share}), so training refuses it: set data.holdout=0, or data.eval to a file"]
    return [f"held out for evaluation: {count:,} of {len(self.source):,} records ({share}, by a hash of the prompt)"]

  def _why_empty(self) -> str:
    """The end of the message about a split without examples."""
    if self.member.any():
      return "; ".join(self._losses())
    held = f"data.holdout={self.config.holdout:g}, by a hash of the prompt"
    total = len(self.source)
    records = f"its {total} {_plural(total, 'record')}"
    if self.split == "eval":
      return (
        f"none of {records} is in the share that is held out ({held}); set data.holdout=0 to train without evaluation, "
        "or data.eval to a file"
      )
    return f"all of {records} are in the share that is held out ({held}); set data.holdout=0, or data.eval to a file"

  def _losses(self) -> Iterator[str]:
    noun = "record"
    if len(self.fit.status) != len(self.source):  # a record may give several examples
      noun = "example"
    for reason, count, first in self._dropped():
      yield f"dropped {count:,} {_plural(count, noun)}: {reason} (first: {first})"
    cut = np.flatnonzero(self._mine & self.fit.cut)
    if len(cut):
      yield f"cut {len(cut):,} {_plural(len(cut), noun)} to the row (first: {self._first(cut)})"
    for name, kind in self.source.left_out.items():
      yield f"left out column '{name}': {kind} has no JSON form"
    if self.source.blanks:
      count = self.source.blanks
      yield f"skipped {count:,} blank {_plural(count, 'line')}"


def _share(rows: int, process_index: int, process_count: int) -> int:
  """The rows of each host."""
  if rows % process_count:
    raise InputError(f"{rows} rows do not divide over {process_count} hosts; choose a multiple")
  if not 0 <= process_index < process_count:
    raise InputError(f"process_index {process_index} is not below process_count {process_count}")
  return rows // process_count


def _plural(count: int, noun: str) -> str:
  if count == 1:
    return noun
  return f"{noun}s"


def _classes(labels: Sequence[float | None], kind: str) -> tuple[bool, bool]:
  """(True if an example is one of the lower class, True if one of the higher); see `Dataset.labels`."""
  if kind == "ranked":
    varied = len(set(labels)) > 1
    return not varied, varied
  known = [label for label in labels if label is not None]
  return any(label < 1 for label in known), any(label > 0 for label in known)  # a doubted label is of both
