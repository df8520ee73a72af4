"""A data set as batches: what a run's configuration says, and `Dataset`, which does it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alignjax.data import cache as cached
from alignjax.data import packing
from alignjax.data.census import take_census
from alignjax.data.field import columns
from alignjax.data.format import FORMATS, KINDS, Example
from alignjax.data.source import Record, Source, open_source
from alignjax.data.stream import Batches, Examples, Layout, NumpyBatch, Rows, fill_row, stack
from alignjax.data.tokenizer import Tokenizer
from alignjax.data.transform import ABSENT, KEPT, REASONS, SHARING, UNPAIRED, Fit, content_hash, fit
from alignjax.errors import InputError
from alignjax.system import ranges
from alignjax.system.ranges import Count, Several, ShareBelowOne, Whole


@dataclass(frozen=True)
class DataConfig:
  """What to read, and the shape of a batch."""

  train: str = ""  # JSON lines or an array, gzip or not, Parquet, Arrow or ArrayRecord; globs and commas join files
  eval: str = ""  # the same; if empty, the held-out share of `train`
  holdout: ShareBelowOne = 0.1  # share of the prompts of `train` set aside when `eval` is empty; 0: none
  tokenizer: str = ""  # a .model file, a tokenizer.json, a folder with one, or hf://org/name; empty: that of run.init
  format: str = "auto"  # or one of format.FORMATS, for every record
  rows: Count = 32  # B, rows of a batch over all hosts
  row_length: Several = 1024  # T, tokens of a row
  pack: bool = True  # several examples in a row; off: one
  max_examples: Count = 16  # P, the most examples (pairs) in a packed row
  max_prompt_length: Whole = 0  # tokens; records with a longer prompt are dropped; 0: no limit
  overlong: str = "drop"  # examples longer than a row; "cut": the end of their completions
  share_prompts: bool = False  # a prompt once for all its completions in a row, not once for each
  step_separator: str = "\n"  # follows each step of an answer in steps, whose label is learned at its last token
  workers: Whole = 0  # processes that prepare batches; 0: two threads of the main one
  cache: str = ""  # where indices and measures are kept; empty: $ALIGNJAX_CACHE, ~/.cache/alignjax

  def __post_init__(self):
    ranges.check_record("data", self)
    _require(self.step_separator != "", "step_separator", self.step_separator, "a string, such as a newline")
    _require(self.overlong in ("drop", "cut"), "overlong", self.overlong, "'drop' or 'cut'")
    _require(self.format in ("auto", *FORMATS), "format", self.format, f"auto, {', '.join(FORMATS)}")


LABELLED = (*UNPAIRED, "ranked", "stepwise")


def check_sharing(config: DataConfig, kind: str) -> None:
  """Raises InputError where prompts are to be shared that have no several completions in a row."""
  _require(
    not config.share_prompts or kind in SHARING, "share_prompts", True, f"off: {kind} data has no several completions"
  )


@dataclass(frozen=True, eq=False)
class Dataset:
  """The examples of one split as batches; made by `open`.

  Attributes:
    source: all records of the split's files.
    tokenizer: of the model that reads them.
    config: what is read, and the shape of a batch.
    kind: one of format.KINDS, but "text".
    split: "train" or "eval".
    seed: of the order of the batches.
    member: bool [R], which of the records belong to the split.
    prompts: int32 [N], tokens of each example's prompt.
    fit: what becomes of each of their examples.
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
    """Opens a split; its records are all checked and measured at the first time.

    The held-out share is chosen by a hash of the prompt: it is the same in every run, for every
    kind and seed, and no prompt is on both sides.

    Raises:
      InputError: a file or a record is malformed, or no example is left.
    """
    _require(kind in KINDS and kind != "text", "kind", kind, ", ".join(name for name in KINDS if name != "text"))
    _require(
      kind != "mismatched" or config.rows > 1, "rows", config.rows, "at least 2 where completions are mismatched"
    )
    _require(split in ("train", "eval"), "split", split, "train or eval")
    unused = kind != "stepwise" and config.step_separator != DataConfig.step_separator
    _require(not unused, "step_separator", config.step_separator, f"left alone: {kind} data has no steps")
    check_sharing(config, kind)
    path = config.eval if split == "eval" and config.eval else config.train
    _require(path != "", "train", path, "the path of a data file")
    if split == "eval" and not config.eval and not config.holdout:
      raise InputError("data.eval is empty and data.holdout is 0; give one of them to evaluate")
    source = open_source(path, config.cache)
    census = take_census(source, tokenizer, kind, config.format, config.cache, config.step_separator)
    member = np.ones(len(source), bool)
    if not config.eval:
      held_out = census.group < np.uint64(config.holdout * 2**64)
      member = held_out if split == "eval" else ~held_out
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
    """What is left of the split, in file order (of unpaired data all records' first examples, then the second)."""
    kept = np.flatnonzero(self._mine & (self.fit.status == KEPT)).astype(np.int32)
    parts, records = np.divmod(kept, np.int32(len(self.source)))
    c, lengths = self.config, self.fit.lengths[kept]
    settings = c.format, records, parts, lengths, c.step_separator, c.share_prompts
    return Examples(self.source, self.tokenizer, self.kind, *settings)

  @cached_property
  def layout(self) -> Layout:
    """The shape of a row. Prompts are never packed."""
    packed = self.config.pack and self.kind != "prompt"
    examples = self.config.max_examples if packed else 1
    beside = self._mismatched_length(examples) if self.kind == "mismatched" else 0
    sides = self.fit.lengths.shape[1]
    responses = sides if self.kind == "ranked" else 0
    readers = sides - 1 if self.config.share_prompts else 0
    return Layout(self.kind, self.config.row_length, examples, self.tokenizer.pad_id, beside, responses, readers)

  @cached_property
  def plan(self) -> packing.Plan:
    """The rows of an epoch."""
    lengths = self.examples.lengths.sum(axis=1)
    return packing.make_plan(lengths, self.layout.length, self.layout.examples)

  @cached_property
  def fingerprint(self) -> str:
    """Hex sha256 of all that the batches depend on but the seed: data, tokenizer, split and shape."""
    c = self.config
    return cached.digest(
      "dataset",
      1,
      self.source.fingerprint,
      self.tokenizer.identity,
      (self.kind, c.format, "all" if c.eval else self.split, 0 if c.eval else c.holdout),
      (c.rows, self.layout.length, self.layout.examples, c.max_prompt_length, c.overlong),
      *([c.step_separator] if self.kind == "stepwise" else []),
      *self._sharing,
    )

  @cached_property
  def content(self) -> np.ndarray:
    """A sha256 of the tokens and mask of each example, uint8 [M, 32]; made in one pass and kept."""
    c = self.config
    cut = (self.layout.length, c.max_prompt_length, c.overlong)
    split = "all" if c.eval else self.split, 0 if c.eval else c.holdout
    tokens = self.tokenizer.identity, asdict(self.tokenizer.template)
    key = cached.digest(
      "content", 2, self.source.fingerprint, tokens, (self.kind, c.format), split, cut, *self._sharing
    )

    def make(folder: Path) -> None:
      hashes = [content_hash(self.examples[m].sides) for m in range(len(self))]
      np.save(folder / "content.npy", np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32))

    return np.load(cached.folder(c.cache, key, make) / "content.npy", mmap_mode="r")

  @cached_property
  def labels(self) -> tuple[int, int]:
    """How many examples have a label of the lower class, and of the higher; made in one pass and kept.

    Of unpaired data these are undesirable and desirable completions; of steps, answers with a wrong step and with a
    right one; of rankings, those whose responses are all tied and the others. (0, 0) for kinds without labels.
    """
    if self.kind not in LABELLED:
      return 0, 0
    c = self.config
    split = "all" if c.eval else self.split, 0 if c.eval else c.holdout
    cut = (self.layout.length, c.max_prompt_length, c.overlong)
    steps = [c.step_separator] if self.kind == "stepwise" else []
    kept = *cut, *steps, *self._sharing  # with the split, what decides which examples are left
    key = cached.digest(
      "labels", 2, self.source.fingerprint, self.tokenizer.identity, (self.kind, c.format), split, kept
    )

    def make(folder: Path) -> None:
      found = [_classes(self.examples.labels(m), self.kind) for m in range(len(self))]
      np.save(folder / "labels.npy", np.array(found, np.int64).sum(axis=0))

    low, high = np.load(cached.folder(c.cache, key, make) / "labels.npy")
    return int(low), int(high)

  def label_lines(self) -> list[str]:
    """What the labels leave to be learned, as lines for people: their counts, and where one class is empty."""
    low, high = self.labels
    if self.kind in UNPAIRED:
      lines = [f"{high:,} desirable and {low:,} undesirable"]
      if not low or not high:
        missing, change = ("undesirable", "more") if high else ("desirable", "less")
        lines.append(f"no {missing} example: nothing is compared, all of these are only made {change} likely")
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
    """Counts of the split: what was read, what was lost and why, and what an epoch consists of."""
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
    r, kind = self.report, "unpaired" if self.kind == "mismatched" else self.kind
    return [
      f"{self._name}: {r['examples']:,} {kind} examples of {r['records']:,} records, {r['tokens']:,} tokens",
      f"  {r['rows']:,} rows of {self.layout.length:,} tokens an epoch, "
      f"{r['examples'] / r['rows']:.2f} examples a row, {r['padding_share']:.1%} padding",
      *(f"  {line}" for line in self.label_lines()),
      *(f"  {line}" for line in self._losses()),
      *(f"  {line}" for line in self.held_out_lines()),
    ]

  def batches(self, step: int = 0, process_index: int = 0, process_count: int = 1) -> Batches:
    """This host's rows [B / process_count, ...] of the batches of steps `step`, `step` + 1, ... without end.

    The batch of a step is a pure function of (fingerprint, seed, step), the same for any number of
    hosts (which hold its rows in order) and workers. Every example comes once per epoch; a batch
    may span two epochs.

    With workers, a program needs the `if __name__ == "__main__"` guard. `close()` ends the
    iterator's threads and processes.
    """
    rows = self.config.rows
    _share(rows, process_index, process_count)
    mine = Rows(self.examples, self.plan, self.layout, self.seed, rows, process_index, process_count)
    return Batches(mine, step, self.config.workers)

  def epoch(self, rows: int = 0, process_index: int = 0, process_count: int = 1) -> Iterator[NumpyBatch]:
    """This host's rows of the batches of one pass, each example once, in file order.

    Args:
      rows: of a batch over all hosts; 0: as in training. The last batch is filled up with empty rows.
      process_index: of this host.
      process_count: hosts.
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
      first = number - number % rows  # of the batch
      around = [m for row in (*ranges[number : first + rows], *ranges[first:number]) for m in row]
      return fill_row(items, self.layout, self.examples[around[-1]])

    starts = range(process_index * share, len(ranges), rows)
    return (stack([fill(row) for row in range(start, start + share)]) for start in starts)

  def where(self, record_id: int) -> str:
    """The place of a record: "pairs.jsonl:732"."""
    return self.source.where(record_id)

  def record(self, record_id: int) -> Record:
    """A record as it is on disk."""
    return self.source[record_id]

  def columns(self, record_ids: Sequence[int]) -> dict[str, list]:
    """The fields of these records as lists, in their order: what rewards read. None where a record lacks the field."""
    return columns([self.record(int(record_id)) for record_id in record_ids])

  def example(self, record_id: int) -> Example:
    """A record as messages."""
    return self.examples.parse(record_id)

  @property
  def _sharing(self) -> tuple[str, ...]:
    """What shared prompts add to a digest; nothing where they are not shared."""
    return ("shared prompts",) if self.config.share_prompts else ()

  @property
  def _mine(self) -> np.ndarray:
    """bool [N], which of the examples belong to the split."""
    return np.tile(self.member, len(self.fit.status) // len(self.source))

  def _mismatched_length(self, examples: int) -> int:
    """The most tokens of a row in which each prompt has the completion of the example before."""
    kept = self._mine & (self.fit.status == KEPT)
    prompts = self.prompts[kept]
    completions = self.fit.lengths[kept, 0] - prompts
    longest = min(
      self.config.row_length + completions.max() - completions.min(),  # one completion comes, and one goes
      examples * (prompts.max() + completions.max()),
    )
    multiple = math.gcd(self.config.row_length, 128)  # as well cut for an accelerator as the rows are
    return -(-int(longest) // multiple) * multiple

  @property
  def _name(self) -> str:
    path = self.config.eval if self.split == "eval" else ""
    return f"{path or self.config.train} [{self.split}]"

  def _dropped(self) -> Iterator[tuple[str, int, str]]:
    """(reason, records, place of the first) of what is missing from the split."""
    for number, reason in enumerate(REASONS):
      if number not in (KEPT, ABSENT):
        lost = np.flatnonzero(self._mine & (self.fit.status == number))
        if len(lost):
          yield reason, len(lost), self._first(lost)

  def _first(self, examples: np.ndarray) -> str:
    """The place of the first of these examples in the files."""
    return self.where(int((examples % len(self.source)).min()))

  def held_out_lines(self) -> list[str]:
    """How much of the file is set aside from training, in a line; none where that is not asked for."""
    if self.split == "eval" or self.config.eval or not self.config.holdout:
      return []
    count = len(self.source) - int(self.member.sum())
    share = f"data.holdout={self.config.holdout:g}"
    if not count:
      return [f"no record is held out ({share}), so training refuses it: set data.holdout=0, or data.eval to a file"]
    return [f"held out for evaluation: {count:,} of {len(self.source):,} records ({share}, by a hash of the prompt)"]

  def _why_empty(self) -> str:
    """The end of the message where a split has no example."""
    if self.member.any():
      return "; ".join(self._losses())
    held, total = f"data.holdout={self.config.holdout:g}, by a hash of the prompt", len(self.source)
    records = f"its {total} {_plural(total, 'record')}"
    if self.split == "eval":
      return (
        f"none of {records} is in the share that is held out ({held}); set data.holdout=0 to train without evaluation, "
        "or data.eval to a file"
      )
    return f"all of {records} are in the share that is held out ({held}); set data.holdout=0, or data.eval to a file"

  def _losses(self) -> Iterator[str]:
    noun = "record" if len(self.fit.status) == len(self.source) else "example"
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
  """Rows of each host."""
  if rows % process_count:
    raise InputError(f"{rows} rows do not divide over {process_count} hosts; choose a multiple")
  if not 0 <= process_index < process_count:
    raise InputError(f"process_index {process_index} is not below process_count {process_count}")
  return rows // process_count


def _plural(count: int, noun: str) -> str:
  return noun if count == 1 else f"{noun}s"


def _require(true: bool, field: str, value: Any, allowed: str) -> None:
  if not true:
    raise InputError(f"data.{field} is {value!r}; it must be {allowed}")


def _classes(labels: Sequence[float | None], kind: str) -> tuple[bool, bool]:
  """Whether an example is one of the lower class, and of the higher; see `Dataset.labels`."""
  if kind == "ranked":
    varied = len(set(labels)) > 1
    return not varied, varied
  return 0.0 in labels, 1.0 in labels
