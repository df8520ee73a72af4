"""An example as token sequences, and what of it fits a row.

A side is the prompt followed by one completion: a pair has two, each with its own copy of the
prompt, a supervised example has one, a prompt is a side of its own. A record gives one example, but
as many as it has completions where the kind is unpaired. Every record is measured once
(`census.py`); from the measures `fit` decides, without the tokens, what is kept, what is cut and
what is dropped, so another row length needs no other pass.
"""

import hashlib
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from alignjax.data.format import KINDS, Example
from alignjax.data.tokenizer import Tokenizer

KEPT = 0
REASONS = (  # why a record is not in the data; its number is the record's status
  "kept",
  "empty prompt",
  "no assistant turn at the end",
  "empty completion",
  "chosen equal to rejected",
  "over-long prompt",
  "over-long example",
  "chosen equal to rejected after the cut",
  "none",
)
ABSENT = REASONS.index("none")  # not a record's fault: it gives fewer examples than its kind may


UNPAIRED = ("unpaired", "mismatched")


class Side(NamedTuple):
  """One sequence.

  Attributes:
    ids: int32 [length], prompt and completion.
    mask: float32 [length], 1 on the ids that the loss is on.
    prompt: how many of the ids are the prompt's.
  """

  ids: np.ndarray
  mask: np.ndarray
  prompt: int = 0


class Encoded(NamedTuple):
  """An example in tokens: the ids of the prompt, and (ids, mask) of each completion."""

  prompt: list[int]
  completions: list[tuple[list[int], list[int]]]

  def sides(self) -> list[Side]:
    """The sequences that go into a row, uncut."""
    if not self.completions:
      return [_side(self.prompt, [], [])]
    return [_side(self.prompt, ids, mask) for ids, mask in self.completions]


class Measure(NamedTuple):
  """The lengths of an example in tokens.

  Attributes:
    prompt: of the prompt, with the ids that open the assistant's turn.
    completions: of each completion, with the end of turn.
    shared: how many ids the two completions of a pair have in common at their front.
  """

  prompt: int
  completions: tuple[int, ...]
  shared: int


class Fit(NamedTuple):
  """What becomes of N examples: all records' first ones, then all second ones, if the kind has such.

  Attributes:
    status: uint8 [N], a number in `REASONS`.
    lengths: int32 [N, sides], of the sides as they are laid into a row.
    cut: bool [N], whether a kept example lost the end of a completion.
  """

  status: np.ndarray
  lengths: np.ndarray
  cut: np.ndarray


def most_examples(kind: str) -> int:
  """How many examples a record may give."""
  return KINDS[kind].completions if kind in UNPAIRED else 1


def unpair(example: Example) -> list[Example]:
  """Each completion with its own label as an example of its own; margins have no meaning there."""
  return [
    replace(example, completions=(completion,), labels=(label,), margin=0.0)
    for completion, label in zip(example.completions, example.labels, strict=True)
  ]


def examples_of(example: Example, kind: str) -> list[Example]:
  """The examples that a record gives to training of `kind`."""
  return unpair(example) if kind in UNPAIRED else [example]


def mismatch(prompt: Side, completion: Side) -> Side:
  """The prompt of one side with the completion of another."""
  start = completion.prompt
  ids = np.concatenate([prompt.ids[: prompt.prompt], completion.ids[start:]])
  mask = np.concatenate([np.zeros(prompt.prompt, np.float32), completion.mask[start:]])
  return Side(ids, mask, prompt.prompt)


def encode(example: Example, tokenizer: Tokenizer) -> Encoded:
  """Renders and tokenises an example; prompt and completions apart, so that their border is exact."""
  prompt = tokenizer.render(example.prompt, add_generation_prompt=True)
  return Encoded(prompt, [tokenizer.complete(completion) for completion in example.completions])


def measure(encoded: Encoded) -> Measure:
  """The lengths of an encoded example."""
  completions = [ids for ids, _ in encoded.completions]
  shared = 0
  if len(completions) == 2:
    for a, b in zip(*completions, strict=False):
      if a != b:
        break
      shared += 1
  return Measure(len(encoded.prompt), tuple(map(len, completions)), shared)


def fit(
  status: np.ndarray,
  prompt: np.ndarray,
  completions: np.ndarray,
  shared: np.ndarray,
  row_length: int,
  max_prompt_length: int = 0,
  overlong: str = "drop",
) -> Fit:
  """Decides what fits a row of `row_length` tokens.

  A prompt is never cut: it must leave room for a token of each completion, and keep to
  `max_prompt_length` (0: no limit). Completions that do not fit are dropped, or cut at the end if
  `overlong` is "cut": of a pair the longer side gives way first.

  Args:
    status: uint8 [N], what the census found in each record.
    prompt: int32 [N]. Like the next two as in `Measure`.
    completions: int32 [N, 0 to 2].
    shared: int32 [N].
    row_length: of a row, in tokens.
    max_prompt_length: in tokens.
    overlong: "drop" or "cut".
  """
  status = status.copy()
  count = completions.shape[1]
  lengths = prompt[:, None] + (completions if count else 0)

  def reject(where: np.ndarray, reason: str) -> None:
    status[where & (status == KEPT)] = REASONS.index(reason)

  if count == 2:
    reject((completions == shared[:, None]).all(1), "chosen equal to rejected")
  if max_prompt_length:
    reject(prompt > max_prompt_length, "over-long prompt")
  reject(max(count, 1) * (prompt + (count > 0)) > row_length, "over-long prompt")
  over = lengths.sum(1) > row_length
  if overlong == "drop":
    reject(over, "over-long example")
  elif count == 2:  # the shorter side keeps its length if it takes no more than half of the row
    most = np.maximum(row_length // 2, row_length - lengths.min(1))
    lengths = np.where(over[:, None], np.minimum(lengths, most[:, None]), lengths)
    left = lengths - prompt[:, None]
    reject((left[:, 0] == left[:, 1]) & (left[:, 0] <= shared), "chosen equal to rejected after the cut")
  else:
    lengths = np.minimum(lengths, row_length)
  return Fit(status, lengths, over & (status == KEPT))


def cut(sides: list[Side], lengths: np.ndarray) -> list[Side]:
  """The sides at the lengths that `fit` allows."""
  return [Side(s.ids[:n], s.mask[:n], s.prompt) for s, n in zip(sides, lengths, strict=True)]


def content_hash(sides: list[Side]) -> bytes:
  """sha256 of the ids and masks of an example's sides: equal where a model can see no difference."""
  content = hashlib.sha256()
  for side in sides:
    content.update(len(side.ids).to_bytes(8, "little"))
    content.update(side.ids.astype("<i4").tobytes())
    content.update(side.mask.astype("<f4").tobytes())
  return content.digest()


def _side(prompt: list[int], ids: list[int], mask: list[int]) -> Side:
  return Side(np.asarray(prompt + ids, np.int32), np.asarray([0] * len(prompt) + mask, np.float32), len(prompt))
