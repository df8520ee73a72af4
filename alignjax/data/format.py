"""A user's record as an `Example`: prompt messages and the completions that follow them.

The formats, detected by their fields:

  preference   {"prompt", "chosen", "rejected"}: strings or lists of messages. Without "prompt" the
               two lists are whole dialogues, and the prompt is what they share.
  hh           {"chosen", "rejected"}: whole dialogues as text, as in Anthropic's HH-RLHF:
               "\\n\\nHuman: ...\\n\\nAssistant: ...".
  messages     {"messages": [{"role", "content"}, ...]}: the loss is on every assistant turn.
  completion   {"prompt", "completion"}: strings or lists of messages; the loss is on the completion.
  unpaired     the same with "label": true for a desirable completion, false for an undesirable one.
  ranked       {"prompt", "responses", "rankings"}: two or more completions, and the rank of each: 1 is the
               best, equal ranks are ties.
  stepwise     {"prompt", "completions", "labels"}: the steps of one answer, strings, and for each if it
               is right: true, false, or null for unknown.
  prompt       {"prompt"}: a string or a list of messages.
  question     {"question", "answer"}, as in GSM8K: the question is the prompt. A text answer is its completion;
               another, such as a number, serves rewards alone.

If a record has a "completion" in addition to a pair or "messages", and training could take either, it is refused:
`data.format` decides. A completion that `alignjax generate` wrote with "finished": false was cut at its budget; it is
dropped, and counted.

A record may add the numbers "margin" and "weight", "tools" (a list of JSON schemas, which the chat template writes),
and anything else, such as an "id". A message may have "tool_calls" (with arguments as an object or its JSON text), and
the role "tool". A `null` field counts as absent.

A pair, or a completion with a label, may have a "confidence" from 0 to 1: the probability that its label is right.
Training on pairs and on labelled completions then learns from both labels, each with its probability. Ranked training
refuses one that is not 1; supervised training takes the chosen side whatever it is.

A record may hold more than a kind of training needs. Pairs also serve supervised training (the chosen side), sampling
(the prompt), unpaired training (a desirable and an undesirable example) and ranked training. Desirable labelled
completions also serve supervised training. A label is true or false, and nothing else, in every kind.
With a third completion in the field "reference", pairs are triples.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from alignjax.data.dialogues import FORMATS, is_hh, split_prompt
from alignjax.data.field import Dialogue, Message, Tool, as_many, dialogue, flag, number, required, tools
from alignjax.data.source import Record, Source
from alignjax.errors import InputError

Made = TypeVar("Made")


@dataclass(frozen=True)
class Example:
  """One record, whatever its format.

  Attributes:
    prompt: the messages before the first completion token.
    completions: (chosen, rejected), (chosen, rejected, reference), (completion,), () or the responses; each
      begins and ends with an assistant's message. Stepwise data has the steps of one answer.
    margin: by how much the chosen side is better, in units of reward; 0 if the record has none.
    weight: of the example in the loss.
    labels: one for each completion: the probability that it is desirable; its rank; 1 right, 0 wrong, None
      unknown. () for kinds without labels.
    confidence: the probability that the chosen side of a pair is the better one; 1 if the record has none.
    tools: the functions that the model may call.
    cut: True if the completion was cut off before its end ("finished" in a record of `alignjax generate`).
  """

  prompt: Dialogue
  completions: tuple[Dialogue, ...]
  margin: float = 0.0
  confidence: float = 1.0
  weight: float = 1.0
  labels: tuple[float | None, ...] = ()
  tools: tuple[Tool, ...] = ()
  cut: bool = False


def read(source: Source, i: int, kind: str, format: str = "auto") -> Example:
  """Reads record `i` of a source as an example of `kind`.

  Raises:
    InputError: the record is malformed; the message names the place, the field and the remedy.
  """
  return placed(source, i, lambda record: parse(record, kind, format))


def placed(source: Source, i: int, convert: Callable[[Record], Made]) -> Made:
  """Converts record `i` of a source, and adds its place to an InputError of `convert`."""
  record = source[i]
  try:
    return convert(record)
  except InputError as error:
    left_out = [f"column '{name}' is left out: {kind} has no JSON form" for name, kind in source.left_out.items()]
    note = ""
    if left_out:
      note = f" ({'; '.join(left_out[:4])})"
    raise InputError(f"{source.where(i)}: {error}{note}") from error


def parse(record: Record, kind: str, format: str = "auto") -> Example:
  """Parses a record as an example of `kind`, one of `KINDS`.

  Raises:
    InputError: a field is missing or of a wrong type. The message names the field; `read` adds the
      place.
  """
  wanted = KINDS[kind]
  name = format
  if format == "auto":
    name = detect(record)
    _refuse_ambiguous(record, name, wanted)
  prompt, *completions = FORMATS[name](record)
  if name not in wanted.formats or (wanted.needs and not completions):
    raise InputError(f"no field {wanted.needs}, which {kind} data needs: {wanted.shape}")
  if wanted.third:
    third = dialogue(record, wanted.third, "assistant")
    whole_prompt, answer = split_prompt(prompt, third)
    if whole_prompt == prompt:
      third = answer
    completions.append(third)
  confidence = 1.0
  if name in (*PAIRS, "unpaired") and wanted.doubted:
    confidence = number(record.get("confidence"), "confidence", default=1.0, least=0.0, most=1.0)
  return Example(
    prompt,
    tuple(completions[: wanted.completions]),
    margin=number(record.get("margin"), "margin", default=0.0, least=-math.inf),
    confidence=confidence,
    weight=number(record.get("weight"), "weight", default=1.0, least=0.0),
    labels=_labels(record, name, wanted, confidence),
    tools=tools(record),
    cut=name in ("completion", "unpaired") and record.get("finished") in (False, 0),
  )


def _labels(record: Record, name: str, wanted: "Kind", confidence: float) -> tuple[float | None, ...]:
  """The labels of a record in the format `name`, which are right with a probability of `confidence`."""
  labels = wanted.labels_of_a_pair
  if name not in PAIRS:
    labels = wanted.labels(record)
  if confidence == 1 or wanted.doubted is None:
    return labels
  return wanted.doubted(labels, confidence)


def detect(record: Record) -> str:
  """Returns the name of the record's format.

  Raises:
    InputError: no format has its fields.
  """
  present = {field for field, value in record.items() if value is not None}
  if "chosen" in present or "rejected" in present:
    if record.get("prompt") is None and is_hh(record.get("chosen")) and is_hh(record.get("rejected")):
      return "hh"
    return "preference"
  for format, fields in (
    ("unpaired", {"completion", "label"}),
    ("ranked", {"responses"}),
    ("stepwise", {"completions"}),
  ):
    if fields <= present:
      return format
  for format in ("messages", "completion", "prompt"):
    if format in present:
      return format
  if {"question", "answer"} <= present:
    return "question"
  raise InputError(f"none of the known fields among {sorted(record)}: {_SHAPES['any']}")


def _refuse_ambiguous(record: Record, name: str, wanted: "Kind") -> None:
  """Raises InputError if a record of the format `name` also has a "completion" that the kind could train on."""
  if not wanted.needs or record.get("completion") is None or name not in (*PAIRS, "messages"):
    return
  other = "completion"
  if record.get("label") is not None:
    other = "unpaired"
  if other not in wanted.formats:
    return
  field = "chosen"
  if name == "messages":
    field = "messages"
  raise InputError(
    f"fields '{field}' and 'completion' are both there; set data.format={other} or data.format={name}, or rename one "
    "(a run keeps its data.format: continue it as another one, with run.init=that run)"
  )


def rivals(example: Example, kind: str) -> list[tuple[int, int]]:
  """Returns the pairs of completions, by their places in an example, that teach nothing if they are equal."""
  if kind == "stepwise":
    return []
  ranks: Sequence[float | None] = range(min(len(example.completions), 2))
  if kind == "ranked":
    ranks = example.labels
  places = range(len(ranks))
  return [(i, j) for i in places for j in places[i + 1 :] if ranks[i] != ranks[j]]


def flaw(example: Example, kind: str = "preference") -> str | None:
  """Returns the reason for which a well-formed example teaches nothing, or None if it teaches something."""
  if _asks_nothing(example.prompt):
    return "empty prompt"
  for completion in example.completions:
    if not completion or completion[-1]["role"] != "assistant":
      return "no assistant turn at the end"
    if completion[0]["role"] != "assistant":
      return "no assistant turn after the prompt"
    if any(turn["role"] == "assistant" and _is_empty(turn) for turn in completion):
      return "empty completion"
  if any(example.completions[i] == example.completions[j] for i, j in rivals(example, kind)):
    return "chosen equal to rejected"
  if kind == "sft" and 0.0 in example.labels:
    return "undesirable completion"
  if example.cut and example.completions:
    return "cut-off completion"  # the model would learn to end at the budget
  if example.labels and all(label is None for label in example.labels):
    return "no labelled step"
  return None


def _is_empty(turn: Message) -> bool:
  """True for a turn that neither says anything nor calls a tool."""
  return not (turn["content"].strip() or turn.get("tool_calls"))


def _asks_nothing(prompt: Dialogue) -> bool:
  """True if a prompt ends with nothing to answer; an empty system turn or tool result at its end does not count."""
  turns = list(prompt)
  while turns and turns[-1]["role"] in ("system", "tool") and not turns[-1]["content"].strip():
    turns.pop()
  return not turns or _is_empty(turns[-1])


def _undesirable(record: Record) -> tuple[float, ...]:
  """Returns (0.0,) for a completion that is labelled undesirable, else ()."""
  label = record.get("label")
  if label is None or flag(label, "label"):
    return ()
  return (0.0,)


def _desirable_or_not(record: Record) -> tuple[float, ...]:
  return (flag(required(record, "label"), "label"),)


def _no_labels(record: Record) -> tuple[float, ...]:
  return ()


def _rankings(record: Record) -> tuple[float, ...]:
  ranks = as_many(record, "rankings", "responses")
  return tuple(number(rank, f"rankings[{i}]", None, -math.inf) for i, rank in enumerate(ranks))


def _step_labels(record: Record) -> tuple[float | None, ...]:
  labels = list(as_many(record, "labels", "completions"))
  for i, label in enumerate(labels):
    if label is not None:
      labels[i] = flag(label, f"labels[{i}]")
  return tuple(labels)


def _as_they_are(labels: tuple[float | None, ...], confidence: float) -> tuple[float | None, ...]:
  """The labels of a kind whose loss reads `Example.confidence`."""
  del confidence
  return labels


def _of_desirable(labels: tuple[float | None, ...], confidence: float) -> tuple[float | None, ...]:
  """The probability that each completion is desirable."""
  return tuple(confidence if label else 1 - confidence for label in labels)


def _no_doubt(labels: tuple[float | None, ...], confidence: float) -> tuple[float | None, ...]:
  raise InputError(
    f"field 'confidence' is {confidence:g}: the loss of a ranking takes its labels for right; leave the field out, or "
    "train on pairs (algorithm.loss=bradley_terry)"
  )


_SHAPES = {
  "any": (
    'a record is {"prompt", "chosen", "rejected"}, {"messages"}, {"prompt", "completion"}, the same with "label", '
    '{"prompt", "responses", "rankings"}, {"prompt", "completions", "labels"}, {"prompt"} or {"question", "answer"}'
  ),
}
PAIRS = ("preference", "hh")
BEFORE_COMPLETION = (
  "chosen",
  "rejected",
  "label",
  "responses",
  "completions",
  "messages",
)  # `detect` prefers


class Kind(NamedTuple):
  """What a kind of training takes from a record.

  Attributes:
    formats: the names in `FORMATS` that serve it.
    completions: the most that it takes, in the order of the format.
    needs: the field that a record of another format lacks, for the message.
    shape: a valid record, for the message.
    labels: reads the labels of a record that is no pair.
    labels_of_a_pair: the labels of a pair.
    doubted: (labels, confidence below 1) -> the labels of a record whose labels may be wrong; None: the kind does not
      read the field "confidence".
    third: the field of one more completion.
  """

  formats: tuple[str, ...]
  completions: int
  needs: str = ""
  shape: str = ""
  labels: Callable[[Record], tuple[float | None, ...]] = _no_labels
  labels_of_a_pair: tuple[float | None, ...] = ()
  doubted: Callable[[tuple[float | None, ...], float], tuple[float | None, ...]] | None = None
  third: str = ""


_ANY = sys.maxsize
_UNPAIRED = Kind(
  formats=("unpaired", *PAIRS),
  completions=2,
  needs="'label'",
  shape='an example is {"prompt", "completion", "label"}, or a pair',
  labels=_desirable_or_not,
  labels_of_a_pair=(1.0, 0.0),
  doubted=_of_desirable,
)
KINDS = {
  "preference": Kind(
    formats=PAIRS,
    completions=2,
    needs="'chosen' and 'rejected'",
    shape='a pair is {"prompt", "chosen", "rejected"}',
    doubted=_as_they_are,
  ),
  "sft": Kind(
    formats=("messages", "completion", "unpaired", "question", *PAIRS),
    completions=1,
    needs="'completion'",
    shape='an example is {"messages"}, {"prompt", "completion"} or {"question", "answer"} with an answer in words',
    labels=_undesirable,
  ),
  "unpaired": _UNPAIRED,
  "mismatched": _UNPAIRED,  # its rows come with rows in which each prompt has the completion of the example before
  "triple": Kind(
    formats=PAIRS,
    completions=3,
    needs="'chosen' and 'rejected'",
    shape='a triple is {"prompt", "chosen", "rejected", "reference"}',
    doubted=_as_they_are,
    third="reference",
  ),
  "ranked": Kind(
    formats=("ranked", *PAIRS),
    completions=_ANY,
    needs="'responses'",
    shape='a ranking is {"prompt", "responses", "rankings"}, or a pair',
    labels=_rankings,
    labels_of_a_pair=(1.0, 2.0),
    doubted=_no_doubt,
  ),
  "stepwise": Kind(
    formats=("stepwise",),
    completions=_ANY,
    needs="'completions'",
    shape='an answer in steps is {"prompt", "completions", "labels"}',
    labels=_step_labels,
  ),
  "prompt": Kind(formats=tuple(FORMATS), completions=0),
  "text": Kind(formats=tuple(FORMATS), completions=_ANY),  # every text of a record
}
