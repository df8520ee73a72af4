"""An example as token sequences, and what of it fits a row.

A side is the prompt followed by one completion: a pair has two, each with its own copy of the
prompt, a supervised example has one, a prompt is a side of its own. A record gives one example, but
as many as it has completions where the kind is unpaired. Every record is measured once
(`census.py`); from the measures `fit` decides, without the tokens, what is kept, what is cut and
what is dropped, so another row length needs no other pass.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from alignjax.data.format import KINDS, Example, rivals
from alignjax.data.tokenizer import Tokenizer
from alignjax.errors import InputError

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
  "no labelled step",
  "no labelled step after the cut",
  "undesirable completion",
  "no assistant turn after the prompt",
  "cut-off completion",
)
ABSENT = REASONS.index("none")  # not a record's fault: it gives fewer examples than its kind may


UNPAIRED = ("unpaired", "mismatched")
SHARING = ("preference", "triple", "ranked")  # kinds whose completions answer one prompt in one row


class Side(NamedTuple):
  """One sequence.

  Attributes:
    ids: int32 [length], prompt and completion.
    mask: float32 [length], 1 on the ids that the loss is on.
    prompt: how many of the ids are the prompt's.
    labels: float32 [length], of stepwise data: 1 where the mask is on a right step, 0 elsewhere.
    start: how many ids of the prompt come before the first: those that another side shares with this one.
  """

  ids: np.ndarray
  mask: np.ndarray
  prompt: int = 0
  labels: np.ndarray | None = None
  start: int = 0


class Encoded(NamedTuple):
  """An example in tokens.

  Attributes:
    prompt: ids.
    completions: (ids, mask) of each.
    rivals: see format.rivals.
    labels: of stepwise data: for each id of the one completion, whether it ends a right step.
  """

  prompt: list[int]
  completions: list[tuple[list[int], list[int]]]
  rivals: Sequence[tuple[int, int]] = ()
  labels: Sequence[float] | None = None

  def sides(self, share_prompt: bool = False) -> list[Side]:
    """The sequences that go into a row, uncut.

    Where the prompt is shared, the first holds it; the others begin with its last id, which predicts their first.
    """
    if not self.completions:
      return [_side(self.prompt, [], [])]
    first, *others = (_side(self.prompt, ids, mask, self.labels) for ids, mask in self.completions)
    return [first, *(_continued(side) if share_prompt else side for side in others)]


class Measure(NamedTuple):
  """The lengths of an example in tokens.

  Attributes:
    prompt: of the prompt, with the ids that open the assistant's turn.
    completions: of each completion, with the end of turn.
    shared: how many ids at the front teach nothing: those that two rivals have in common (the most of any
      two), or those before the first label of an answer in steps.
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


def encode(example: Example, tokenizer: Tokenizer, kind: str = "preference", separator: str = "\n") -> Encoded:
  """Renders and tokenises an example; prompt and completions apart, so that their border is exact.

  Args:
    example: of `kind`.
    tokenizer: of the model that reads it.
    kind: one of format.KINDS.
    separator: what follows each step, where kind is "stepwise".
  """
  tools = example.tools
  prompt = tokenizer.render(example.prompt, add_generation_prompt=True, tools=tools)
  if kind == "stepwise":
    steps = [tokenizer.encode(step[0]["content"]) for step in example.completions]
    ids, mask, labels = join_steps(steps, example.labels, tokenizer.encode(separator))
    return Encoded(prompt, [(ids, mask)], (), labels)
  completions = [tokenizer.complete(example.prompt, completion, tools) for completion in example.completions]
  return Encoded(prompt, completions, rivals(example, kind))


def join_steps(
  steps: Sequence[list[int]], labels: Sequence[float | None], separator: list[int]
) -> tuple[list[int], list[int], list[float]]:
  """(ids, mask, labels) of steps, each with the separator after it, whose last id alone carries the step's label."""
  ids, mask, values = [], [], []
  for step, label in zip(steps, labels, strict=True):
    ids += [*step, *separator]
    before = len(ids) - len(mask) - 1
    mask += [0] * before + [int(label is not None)]
    values += [0.0] * before + [label or 0.0]
  return ids, mask, values


def step_ends(tokenizer: Tokenizer, separator: str) -> tuple[tuple[int, ...], ...]:
  """The sequences of ids that end a step: each id whose text ends with the separator, and the separator as encoded."""
  ids = (i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).endswith(separator))
  return tuple(sorted({(i,) for i in ids} | {tuple(tokenizer.encode(separator))}))


def check_steps(example: Example, encoded: Encoded, separator: str, ends: tuple[tuple[int, ...], ...]) -> None:
  """Raises InputError where an answer would be cut into other steps when a policy writes it than it is here.

  Args:
    example: of stepwise data.
    encoded: the same in tokens.
    separator: that follows each step.
    ends: of `step_ends`.
  """
  remedy = "take it out, or set data.step_separator to another"
  steps = [step[0]["content"] for step in example.completions]
  for i, step in enumerate(steps):
    if separator in step:
      raise InputError(f"field 'completions[{i}]' holds the step separator {separator!r}, at which it is cut; {remedy}")
  ids, mask = encoded.completions[0]
  found = _step_places(ids, ends)
  if len(found) != len(steps) or not set(np.flatnonzero(mask)) <= set(found):
    raise InputError(
      f"field 'completions' has {len(steps)} steps, of which a policy's answer would have {len(found)}: this tokenizer "
      f"writes the step separator {separator!r} otherwise beside some text; set data.step_separator to another"
    )


def _step_places(ids: Sequence[int], ends: tuple[tuple[int, ...], ...]) -> list[int]:
  """Where a step of an answer ends; of separators in a row the first ends one (as in algorithms/step_reward.py)."""
  lengths = {len(end) for end in ends}
  known = set(ends)
  separated = [any(tuple(ids[max(k + 1 - n, 0) : k + 1]) in known for n in lengths) for k in range(len(ids))]
  return [k for k in range(1, len(ids)) if separated[k] and not separated[k - 1]]


def measure(encoded: Encoded) -> Measure:
  """The lengths of an encoded example."""
  completions = [ids for ids, _ in encoded.completions]
  shared = max((_common(completions[i], completions[j]) for i, j in encoded.rivals), default=0)
  if encoded.labels is not None:
    shared = encoded.completions[0][1].index(1)
  return Measure(len(encoded.prompt), tuple(map(len, completions)), shared)


def _common(a: list[int], b: list[int]) -> int:
  """How many ids two sequences share at their front."""
  return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def fit(
  status: np.ndarray,
  prompt: np.ndarray,
  completions: np.ndarray,
  shared: np.ndarray,
  row_length: int,
  max_prompt_length: int = 0,
  overlong: str = "drop",
  share_prompt: bool = False,
) -> Fit:
  """Decides what fits a row of `row_length` tokens.

  A prompt is never cut: it must leave room for a token of each completion, and keep to
  `max_prompt_length` (0: no limit). Completions that do not fit are dropped, or cut at the end if
  `overlong` is "cut": of several sides the longest give way first.

  Args:
    status: uint8 [N], what the census found in each example.
    prompt: int32 [N]. Like the next two as in `Measure`.
    completions: int32 [N, sides]; 0 where an example has fewer.
    shared: int32 [N].
    row_length: of a row, in tokens.
    max_prompt_length: in tokens.
    overlong: "drop" or "cut".
    share_prompt: whether only the first side holds the prompt, and the others no more than its last id.
  """
  status = status.copy()
  count = completions.shape[1]
  body = completions if count else prompt[:, None]  # what may be cut; of a prompt alone nothing is left then
  present = body > 0
  opening = np.repeat(prompt[:, None], count, axis=1) if count else np.zeros_like(body)  # of a side, before that
  if share_prompt:
    opening[:, 1:] = 1
  opening = np.where(present, opening, 0)
  lengths = opening + body

  def reject(where: np.ndarray, reason: str) -> None:
    status[where & (status == KEPT)] = REASONS.index(reason)

  if count:
    reject(prompt == 0, "empty prompt")  # of a template that renders nothing: what would predict the first token?
  if count == 2:
    reject((completions == shared[:, None]).all(1), "chosen equal to rejected")
  if max_prompt_length:
    reject(prompt > max_prompt_length, "over-long prompt")
  reject((opening.sum(1) + present.sum(1) if count else prompt) > row_length, "over-long prompt")
  over = lengths.sum(1) > row_length
  if overlong == "drop":
    reject(over, "over-long example")
  else:
    level = np.maximum(_level(body, row_length - opening.sum(1)), 0)
    left = np.where(over[:, None], np.minimum(body, level[:, None]), body)
    lengths, left = opening + left, np.sort(left, axis=1)
    equal = (left[:, 1:] == left[:, :-1]) & (left[:, 1:] > 0) & (left[:, 1:] <= shared[:, None])
    reject(over & equal.any(1), "chosen equal to rejected after the cut")
    if count == 1:
      reject(over & (left[:, 0] <= shared), "no labelled step after the cut")
  return Fit(status, lengths, over & (status == KEPT))


def _level(completions: np.ndarray, room: np.ndarray) -> np.ndarray:
  """The length [N] to which the longest completions of each example are cut so that all fit its room [N]."""
  ascending = np.sort(completions, axis=1)
  before = np.cumsum(ascending, axis=1) - ascending
  return ((room[:, None] - before) // np.arange(completions.shape[1], 0, -1)).max(1)


def cut(sides: list[Side], lengths: np.ndarray) -> list[Side]:
  """The sides at the lengths that `fit` allows."""
  short = lambda side, n: side._replace(
    ids=side.ids[:n], mask=side.mask[:n], labels=None if side.labels is None else side.labels[:n]
  )
  return [short(side, n) for side, n in zip(sides, lengths, strict=False)]


def content_hash(sides: list[Side]) -> bytes:
  """sha256 of the ids and masks of an example's sides: equal where a model can see no difference."""
  content = hashlib.sha256()
  for side in sides:
    content.update(len(side.ids).to_bytes(8, "little"))
    content.update(side.ids.astype("<i4").tobytes())
    content.update(side.mask.astype("<f4").tobytes())
    if side.start:  # of the prompt before it, which another side holds
      content.update(side.start.to_bytes(8, "little"))
  return content.digest()


def _continued(side: Side) -> Side:
  """The side without its prompt, but for the last id of that."""
  before = side.prompt - 1
  return side._replace(ids=side.ids[before:], mask=side.mask[before:], prompt=1, start=before)


def _side(prompt: list[int], ids: list[int], mask: list[int], labels: Sequence[float] | None = None) -> Side:
  row = lambda values: np.asarray([0] * len(prompt) + list(values), np.float32)
  return Side(np.asarray(prompt + ids, np.int32), row(mask), len(prompt), None if labels is None else row(labels))
