"""An example as token sequences, and the parts of it that fit a row.

A side is the prompt followed by one completion. A pair has two sides, each with its own copy of the
prompt; a supervised example has one; a prompt is a side of its own. A record gives one example, or, if the kind
is unpaired, one for each of its completions. Every record is measured once (`census.py`). From the measures
alone, `fit` decides if an example is kept, cut or dropped, so another row length needs no other pass.
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
REASONS = (  # for dropping a record; the place in this list is the record's status
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
ABSENT = REASONS.index("none")  # no flaw: a record may give fewer examples than its kind allows

UNPAIRED = ("unpaired", "mismatched")
SHARING = ("preference", "triple", "ranked")  # kinds with several completions of one prompt in a row


class Side(NamedTuple):
  """One sequence.

  Attributes:
    ids: int32 [length], prompt and completion.
    mask: float32 [length], 1 on the ids that the loss is on.
    prompt: how many of the ids belong to the prompt.
    labels: float32 [length], for stepwise data: 1 where the mask is on a right step, 0 elsewhere.
    start: how many ids of the prompt precede the first; another side has them for both.
  """

  ids: np.ndarray
  mask: np.ndarray
  prompt: int = 0
  labels: np.ndarray | None = None
  start: int = 0


class Encoded(NamedTuple):
  """An example in tokens.

  Attributes:
    prompt: its ids.
    completions: (ids, mask) of each.
    rivals: see format.rivals.
    labels: for stepwise data: for each id of the only completion, 1 if it ends a right step, else 0.
  """

  prompt: list[int]
  completions: list[tuple[list[int], list[int]]]
  rivals: Sequence[tuple[int, int]] = ()
  labels: Sequence[float] | None = None

  def sides(self, share_prompt: bool = False) -> list[Side]:
    """Makes the sequences that go into a row, uncut.

    If the prompt is shared, the first side has it; the others begin with its last id, which predicts their first.
    """
    if not self.completions:
      return [_side(self.prompt, [], [])]
    first, *others = (_side(self.prompt, ids, mask, self.labels) for ids, mask in self.completions)
    if share_prompt:
      others = list(map(_continued, others))
    return [first, *others]


class Measure(NamedTuple):
  """The lengths of an example in tokens.

  Attributes:
    prompt: length of the prompt, with the ids that open the assistant's turn.
    completions: length of each completion, with the end of turn.
    shared: how many ids at the front of the completions teach nothing: the longest common front of two rivals, or
      the ids before the first label of a stepwise answer.
  """

  prompt: int
  completions: tuple[int, ...]
  shared: int


class Fit(NamedTuple):
  """The decision on N examples: first examples of all records, then second examples, if the kind has them.

  Attributes:
    status: uint8 [N], a number in `REASONS`.
    lengths: int32 [N, sides], tokens of the sides in a row.
    cut: bool [N], True for a kept example that lost the end of a completion.
  """

  status: np.ndarray
  lengths: np.ndarray
  cut: np.ndarray


def most_examples(kind: str) -> int:
  """The largest number of examples that a record may give."""
  if kind in UNPAIRED:
    return KINDS[kind].completions
  return 1


def unpair(example: Example) -> list[Example]:
  """Splits an example into one for each completion and its label, without the margin, which has no meaning then."""
  return [
    replace(example, completions=(completion,), labels=(label,), margin=0.0)
    for completion, label in zip(example.completions, example.labels, strict=True)
  ]


def examples_of(example: Example, kind: str) -> list[Example]:
  """Returns the examples that a record gives to training of `kind`."""
  if kind in UNPAIRED:
    return unpair(example)
  return [example]


def mismatch(prompt: Side, completion: Side) -> Side:
  """Joins the prompt of one side with the completion of another."""
  start = completion.prompt
  ids = np.concatenate([prompt.ids[: prompt.prompt], completion.ids[start:]])
  mask = np.concatenate([np.zeros(prompt.prompt, np.float32), completion.mask[start:]])
  return Side(ids, mask, prompt.prompt)


def encode(example: Example, tokenizer: Tokenizer, kind: str = "preference", separator: str = "\n") -> Encoded:
  """Renders and tokenises an example, prompt and completions separately, so that the border between them is exact.

  Args:
    example: of `kind`.
    tokenizer: of the model that reads it.
    kind: one of format.KINDS.
    separator: follows each step if the kind is "stepwise".
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
  """Joins steps, each with the separator after it: (ids, mask, labels). The last id of each carries its label."""
  ids: list[int] = []
  mask: list[int] = []
  id_labels: list[float] = []
  for step, label in zip(steps, labels, strict=True):
    ids += [*step, *separator]
    before = len(ids) - len(mask) - 1
    mask += [0] * before + [int(label is not None)]
    id_labels += [0.0] * before + [label or 0.0]
  return ids, mask, id_labels


def step_ends(tokenizer: Tokenizer, separator: str) -> tuple[tuple[int, ...], ...]:
  """Returns the sequences of ids that end a step.

  These are the ids whose text ends with the separator, one by one, and the encoded separator.
  """
  ids = (i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).endswith(separator))
  return tuple(sorted({(i,) for i in ids} | {tuple(tokenizer.encode(separator))}))


def check_steps(example: Example, encoded: Encoded, separator: str, ends: tuple[tuple[int, ...], ...]) -> None:
  """Raises InputError if an answer would be cut into other steps when a policy writes it.

  Args:
    example: a stepwise example.
    encoded: the same in tokens.
    separator: the text that follows each step.
    ends: see `step_ends`.
  """
  remedy = "remove it, or set data.step_separator to another"
  steps = [step[0]["content"] for step in example.completions]
  for i, step in enumerate(steps):
    if separator in step:
      raise InputError(f"field 'completions[{i}]' holds the step separator {separator!r}, at which it is cut; {remedy}")
  ids, mask = encoded.completions[0]
  places = _step_places(ids, ends)
  if len(places) != len(steps) or not set(np.flatnonzero(mask)) <= set(places):
    raise InputError(
      f"field 'completions' has {len(steps)} steps, of which a policy's answer would have {len(places)}: this "
      f"tokenizer writes the step separator {separator!r} otherwise beside some text; set data.step_separator to "
      "another"
    )


def _step_places(ids: Sequence[int], ends: tuple[tuple[int, ...], ...]) -> list[int]:
  """Returns the places at which a step of an answer ends.

  The first of several separators in a row ends a step (as in algorithms/step_reward.py).
  """
  lengths = {len(end) for end in ends}
  known_ends = set(ends)

  def ends_step(k: int) -> bool:
    return any(tuple(ids[max(k + 1 - length, 0) : k + 1]) in known_ends for length in lengths)

  is_end = list(map(ends_step, range(len(ids))))
  return [k for k in range(1, len(ids)) if is_end[k] and not is_end[k - 1]]


def measure(encoded: Encoded) -> Measure:
  """Measures an encoded example."""
  completions = [ids for ids, _ in encoded.completions]
  shared = max((_common(completions[i], completions[j]) for i, j in encoded.rivals), default=0)
  if encoded.labels is not None:
    shared = encoded.completions[0][1].index(1)
  return Measure(len(encoded.prompt), tuple(map(len, completions)), shared)


def _common(a: list[int], b: list[int]) -> int:
  """Counts the ids that two sequences share at their front."""
  pairs = enumerate(zip(a, b, strict=False))
  return next((k for k, (x, y) in pairs if x != y), min(len(a), len(b)))


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

  A prompt is never cut: it must leave room for a token of each completion, and it must not exceed
  `max_prompt_length` (0: no limit). An example whose completions do not fit is dropped, or, if `overlong` is "cut",
  loses the ends of its longest completions.

  Args:
    status: uint8 [N], the place in `REASONS` of each example after the census.
    prompt: int32 [N], as in `Measure`.
    completions: int32 [N, sides], as in `Measure`; 0 where an example has fewer.
    shared: int32 [N], as in `Measure`.
    row_length: tokens of a row.
    max_prompt_length: the most tokens of a prompt.
    overlong: "drop" or "cut".
    share_prompt: True if only the first side has the prompt, and each other side its last id alone.
  """
  status = status.copy()
  count = completions.shape[1]
  if count:
    opening = np.repeat(prompt[:, None], count, axis=1)  # of each side: what is not cut
    body = completions  # of each side: what may be cut
  else:
    opening = np.zeros_like(prompt)[:, None]
    body = prompt[:, None]
  present = body > 0
  if share_prompt:
    opening[:, 1:] = 1
  opening = np.where(present, opening, 0)
  lengths = opening + body

  def reject(flawed: np.ndarray, reason: str) -> None:
    status[flawed & (status == KEPT)] = REASONS.index(reason)

  least = prompt
  if count:
    least = opening.sum(1) + present.sum(1)  # with one token of each completion
    reject(prompt == 0, "empty prompt")  # the template rendered nothing, so nothing predicts the first token
  if count == 2:
    reject((completions == shared[:, None]).all(1), "chosen equal to rejected")
  if max_prompt_length:
    reject(prompt > max_prompt_length, "over-long prompt")
  reject(least > row_length, "over-long prompt")
  over = lengths.sum(1) > row_length
  if overlong == "drop":
    reject(over, "over-long example")
  else:
    level = np.maximum(_level(body, row_length - opening.sum(1)), 0)
    left = np.where(over[:, None], np.minimum(body, level[:, None]), body)
    lengths = opening + left
    left = np.sort(left, axis=1)
    equal = (left[:, 1:] == left[:, :-1]) & (left[:, 1:] > 0) & (left[:, 1:] <= shared[:, None])
    reject(over & equal.any(1), "chosen equal to rejected after the cut")
    if count == 1:
      reject(over & (left[:, 0] <= shared), "no labelled step after the cut")
  return Fit(status, lengths, over & (status == KEPT))


def _level(completions: np.ndarray, room: np.ndarray) -> np.ndarray:
  """Computes the length [N] to which the longest completions of each example are cut so that all fit its room [N]."""
  ascending = np.sort(completions, axis=1)
  before = np.cumsum(ascending, axis=1) - ascending
  return ((room[:, None] - before) // np.arange(completions.shape[1], 0, -1)).max(1)


def cut(sides: list[Side], lengths: np.ndarray) -> list[Side]:
  """Cuts the sides to the lengths of `Fit`."""
  return [_shortened(side, length) for side, length in zip(sides, lengths, strict=False)]


def _shortened(side: Side, length: int) -> Side:
  if side.labels is not None:
    side = side._replace(labels=side.labels[:length])
  return side._replace(ids=side.ids[:length], mask=side.mask[:length])


def content_hash(sides: list[Side]) -> bytes:
  """Hashes the ids and masks of an example's sides with sha256: equal if a model cannot see a difference."""
  content = hashlib.sha256()
  for side in sides:
    content.update(len(side.ids).to_bytes(8, "little"))
    content.update(side.ids.astype("<i4").tobytes())
    content.update(side.mask.astype("<f4").tobytes())
    if side.start:  # ids of the prompt that another side has
      content.update(side.start.to_bytes(8, "little"))
  return content.digest()


def _continued(side: Side) -> Side:
  """Returns the side without its prompt except the prompt's last id."""
  before = side.prompt - 1
  return side._replace(ids=side.ids[before:], mask=side.mask[before:], prompt=1, start=before)


def _side(prompt: list[int], ids: list[int], mask: list[int], labels: Sequence[float] | None = None) -> Side:
  """Makes the sequence of a prompt and a completion, with mask and labels of the completion."""

  def with_prompt(values: Sequence[float]) -> np.ndarray:
    return np.asarray([0] * len(prompt) + list(values), np.float32)

  side = Side(np.asarray(prompt + ids, np.int32), with_prompt(mask), len(prompt))
  if labels is None:
    return side
  return side._replace(labels=with_prompt(labels))
