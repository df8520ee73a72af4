"""A user's record as an `Example`: prompt messages and the completions that follow them.

The formats, told apart by their fields:

  preference   {"prompt", "chosen", "rejected"}: strings or lists of messages. Without "prompt" the
               two lists are whole dialogues, and the prompt is what they share.
  hh           {"chosen", "rejected"}: whole dialogues as text, as in Anthropic's HH-RLHF:
               "\\n\\nHuman: ...\\n\\nAssistant: ...".
  messages     {"messages": [{"role", "content"}, ...]}: the loss is on every assistant turn.
  completion   {"prompt", "completion"}: strings or lists of messages; the loss is on the completion.
  unpaired     the same with "label": true for a desirable completion, false for an undesirable one.
  ranked       {"prompt", "responses", "rankings"}: two or more completions, and the rank of each: 1 is the
               best, equal ranks are ties.
  stepwise     {"prompt", "completions", "labels"}: the steps of one answer, strings, and whether each is
               right: true, false, or null where nobody knows.
  prompt       {"prompt"}: a string or a list of messages.
  question     {"question", "answer"}, as in GSM8K: the question is the prompt. An answer in words is its completion;
               another, such as a number, is there for rewards alone.

A record with a "completion" beside a pair or "messages" is refused where training could take either: `data.format`
says which. A completion that `alignjax generate` wrote with "finished": false was cut at its budget: it is dropped, and
counted.
Each may add the numbers "margin" and "weight", "tools" (a list of JSON schemas, which the chat template writes), and
anything else, such as an "id". A message may hold "tool_calls" (with arguments as an object or its JSON text), and
have the role "tool". A `null` field
counts as absent. A record that holds more than a kind of training needs serves it too: pairs can
feed supervised training (with the chosen side), sampling (with the prompt), unpaired training (a
desirable and an undesirable example each) and ranked training, and labelled completions supervised
training, if they are desirable. A label is true or false, and nothing else, in every kind.
With a field "reference" beside, a third completion, pairs are triples.
"""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from alignjax.data.field import Dialogue, Tool, as_many, dialogue, flag, listed, number, required, text, tools
from alignjax.data.source import Record, Source
from alignjax.errors import InputError

Made = TypeVar("Made")


@dataclass(frozen=True)
class Example:
  """One record, whatever its format.

  Attributes:
    prompt: the messages before the first completion token.
    completions: (chosen, rejected), (chosen, rejected, reference), (completion,), () or the responses; each
      begins and ends with an assistant's message. Of stepwise data they are the steps of one answer.
    margin: by how much the chosen side is better, in units of reward; 0 if the record does not say.
    weight: of the example in the loss.
    labels: what is known of each completion: 1 desirable, 0 undesirable; its rank; 1 right, 0 wrong, None
      unknown. () for kinds without labels.
    tools: what the model may call.
    cut: whether the completion was cut off before its end, as a record of `alignjax generate` says with "finished".
  """

  prompt: Dialogue
  completions: tuple[Dialogue, ...]
  margin: float = 0.0
  weight: float = 1.0
  labels: tuple[float | None, ...] = ()
  tools: tuple[Tool, ...] = ()
  cut: bool = False


def read(source: Source, i: int, kind: str, format: str = "auto") -> Example:
  """Record `i` of a source as an example of `kind`.

  Raises:
    InputError: the record is malformed; the message names the place, the field and the remedy.
  """
  return placed(source, i, lambda record: parse(record, kind, format))


def placed(source: Source, i: int, made_of: Callable[[Record], Made]) -> Made:
  """What `made_of` makes of record `i` of a source; its InputError gets the place."""
  record = source[i]
  try:
    return made_of(record)
  except InputError as error:
    left_out = [f"column '{name}' is left out: {kind} has no JSON form" for name, kind in source.left_out.items()]
    note = f" ({'; '.join(left_out[:4])})" if left_out else ""
    raise InputError(f"{source.where(i)}: {error}{note}") from error


def parse(record: Record, kind: str, format: str = "auto") -> Example:
  """A record as an example of `kind`, one of `KINDS`.

  Raises:
    InputError: a field is missing or of a wrong type. The message names the field; `read` adds the
      place.
  """
  wanted = KINDS[kind]
  name = detect(record) if format == "auto" else format
  if format == "auto" and wanted.needs and (other := _rival(record, name)) in wanted.formats:
    field = "messages" if name == "messages" else "chosen"
    raise InputError(
      f"fields '{field}' and 'completion' are both there; set data.format={other} or data.format={name}, or rename one "
      "(a run that began without goes on as another, with run.init=that run)"
    )
  prompt, *completions = FORMATS[name](record)
  if name not in wanted.formats or (wanted.needs and not completions):
    raise InputError(f"no field {wanted.needs}, which {kind} data needs: {wanted.shape}")
  if wanted.third:
    third = dialogue(record, wanted.third, "assistant")
    whole, cut = _apart(prompt, third)
    completions.append(cut if whole == prompt else third)
  return Example(
    prompt,
    tuple(completions[: wanted.completions]),
    margin=number(record, "margin", default=0.0, least=-math.inf),
    weight=number(record, "weight", default=1.0, least=0.0),
    labels=wanted.labels(record) if name not in PAIRS else wanted.labels_of_a_pair,
    tools=tools(record),
    cut=name in ("completion", "unpaired") and record.get("finished") in (False, 0),
  )


def detect(record: Record) -> str:
  """The name of the record's format."""
  present = {field for field, value in record.items() if value is not None}
  if "chosen" in present or "rejected" in present:
    sides = [record.get(field) for field in ("prompt", "chosen", "rejected")]
    return "hh" if sides[0] is None and all(map(_is_hh, sides[1:])) else "preference"
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


def _rival(record: Record, name: str) -> str:
  """The format, other than `name`, by which a record's "completion" is read; "" where no other was found first."""
  if record.get("completion") is None or name not in (*PAIRS, "messages"):
    return ""
  return "completion" if record.get("label") is None else "unpaired"


def rivals(example: Example, kind: str) -> list[tuple[int, int]]:
  """Which completions of an example, by their places, mean nothing if they are equal."""
  if kind == "stepwise":
    return []
  ranks = example.labels if kind == "ranked" else range(min(len(example.completions), 2))
  places = range(len(ranks))
  return [(i, j) for i in places for j in places[i + 1 :] if ranks[i] != ranks[j]]


def flaw(example: Example, kind: str = "preference") -> str | None:
  """Why a well-formed example teaches nothing, or None if it does teach something."""
  if _asks_nothing(example.prompt):
    return "empty prompt"
  for completion in example.completions:
    if not completion or completion[-1]["role"] != "assistant":
      return "no assistant turn at the end"
    if completion[0]["role"] != "assistant":
      return "no assistant turn after the prompt"
    said = (turn["content"].strip() or turn.get("tool_calls") for turn in completion if turn["role"] == "assistant")
    if not all(said):
      return "empty completion"
  if any(example.completions[i] == example.completions[j] for i, j in rivals(example, kind)):
    return "chosen equal to rejected"
  if kind == "sft" and 0.0 in example.labels:
    return "undesirable completion"
  if example.cut and example.completions:
    return "cut-off completion"  # which is none: it would be trained to end where its budget did
  if example.labels and all(label is None for label in example.labels):
    return "no labelled step"
  return None


def _asks_nothing(prompt: Dialogue) -> bool:
  """Whether a prompt ends with nothing to answer; a system turn or a tool's result may be empty behind something."""
  turns = list(prompt)
  while turns and turns[-1]["role"] in ("system", "tool") and not turns[-1]["content"].strip():
    turns.pop()
  return not turns or not (turns[-1]["content"].strip() or turns[-1].get("tool_calls"))


def read_preference(record: Record) -> tuple[Dialogue, ...]:
  """(prompt, chosen, rejected) of a record with these fields, "prompt" optional if the sides are dialogues."""
  sides = [dialogue(record, field, "assistant") for field in ("chosen", "rejected")]
  if record.get("prompt") is not None:
    return _apart(_prompt(record), *sides)
  for field in ("chosen", "rejected"):
    if isinstance(record[field], str):
      raise InputError(f"field 'prompt' is missing, and field '{field}' is no dialogue that holds it")
  return split_shared(*sides)


def read_hh(record: Record) -> tuple[Dialogue, ...]:
  """(prompt, chosen, rejected) of two dialogues written as text."""
  for field in ("chosen", "rejected"):
    if not _is_hh(required(record, field)):
      raise InputError(f"field '{field}' is no dialogue that starts with '\\n\\nHuman:'")
  return split_shared(*(_hh_dialogue(record, field) for field in ("chosen", "rejected")))


def read_messages(record: Record) -> tuple[Dialogue, ...]:
  """(prompt, completion) of a dialogue: the completion starts at the first assistant turn."""
  turns = dialogue(record, "messages")
  first = next((i for i, m in enumerate(turns) if m["role"] == "assistant"), len(turns))
  return turns[:first], turns[first:]


def read_completion(record: Record) -> tuple[Dialogue, ...]:
  """(prompt, completion) of a record with these fields."""
  return _apart(_prompt(record), dialogue(record, "completion", "assistant"))


def read_prompt(record: Record) -> tuple[Dialogue, ...]:
  """(prompt,) of a record that may hold anything else besides."""
  return (_prompt(record),)


def read_question(record: Record) -> tuple[Dialogue, ...]:
  """(prompt, completion) of a question and its answer; (prompt,) where the answer is no text."""
  prompt, answer = dialogue(record, "question", "user"), required(record, "answer")
  return (prompt, dialogue(record, "answer", "assistant")) if isinstance(answer, str) else (prompt,)


def read_ranked(record: Record) -> tuple[Dialogue, ...]:
  """(prompt, response, response, ...) of a record with these fields."""
  prompt, count = _prompt(record), len(listed(record, "responses"))
  if count < 2:
    raise InputError(f"field 'responses' holds {count}; a ranking is of two or more")
  responses = (dialogue(record["responses"], i, "assistant", f"responses[{i}]") for i in range(count))
  return _apart(prompt, *responses)


def read_stepwise(record: Record) -> tuple[Dialogue, ...]:
  """(prompt, step, step, ...) of a record with these fields."""
  prompt, steps = _prompt(record), listed(record, "completions")
  if not steps:
    raise InputError("field 'completions' is empty; it must hold the steps of an answer")
  return prompt, *([{"role": "assistant", "content": text(step, f"completions[{i}]")}] for i, step in enumerate(steps))


def split_shared(chosen: Dialogue, rejected: Dialogue) -> tuple[Dialogue, Dialogue, Dialogue]:
  """Cuts two dialogues at the last border where both go on with an assistant turn after the same messages.

  Without such a border the prompt comes out empty (and the pair is dropped as such).
  """
  cut = 0
  for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)):
    if a["role"] == b["role"] == "assistant":
      cut = i
    if a != b:
      break
  return chosen[:cut], chosen[cut:], rejected[cut:]


def _prompt(record: Record) -> Dialogue:
  prompt = dialogue(record, "prompt", "user")
  if prompt and prompt[-1]["role"] == "assistant":
    raise InputError("field 'prompt' ends with an assistant turn; end it with the user's")
  return prompt


def _apart(prompt: Dialogue, *sides: Dialogue) -> tuple[Dialogue, ...]:
  """(prompt, completion, ...) where some data sets repeat the prompt at the front of the sides.

  There it may have other turns before it, as a system turn that the prompt lacks: these are the prompt's if all sides
  agree on them. Or it is without the prompt's own system turn.
  """
  leads = [_lead(prompt, side) for side in sides]
  if leads and leads[0] and all(lead == leads[0] for lead in leads):
    start = len(leads[0]) + len(prompt)
    return leads[0] + prompt, *(side[start:] for side in sides)
  return prompt, *(_without(prompt, side) for side in sides)


def _without(prompt: Dialogue, side: Dialogue) -> Dialogue:
  """A side without the prompt at its front, or without what follows the prompt's system turn."""
  bare = prompt[1:] if prompt and prompt[0]["role"] == "system" else []
  for repeated in (prompt, bare):
    if repeated and side[: len(repeated)] == repeated:
      return side[len(repeated) :]
  return side


def _lead(prompt: Dialogue, side: Dialogue) -> Dialogue:
  """The turns of a whole dialogue before the prompt and its answer; [] where it begins with either."""
  n = len(prompt)
  if not prompt or not side or side[0]["role"] == "assistant" or _without(prompt, side) is not side:
    return []
  places = (k for k in range(1, len(side) - n) if side[k : k + n] == prompt and side[k + n]["role"] == "assistant")
  return side[: next(places, 0)]


def _undesirable(record: Record) -> tuple[float, ...]:
  """(0.0,) of a completion that its record calls undesirable; () of others."""
  label = record.get("label")
  return () if label is None or flag(label, "label") else (0.0,)


def _rankings(record: Record) -> tuple[float, ...]:
  ranks = dict(enumerate(as_many(record, "rankings", "responses")))
  return tuple(number(ranks, i, None, -math.inf, f"rankings[{i}]") for i in ranks)


def _step_labels(record: Record) -> tuple[float | None, ...]:
  labels = as_many(record, "labels", "completions")
  return tuple(None if label is None else flag(label, f"labels[{i}]") for i, label in enumerate(labels))


def _is_hh(value: Any) -> bool:
  return isinstance(value, str) and _HH_TURN.match(value) is not None


def _hh_dialogue(record: Record, field: str) -> Dialogue:
  _, *parts = _HH_TURN.split(text(record[field], field))
  roles = {"Human": "user", "Assistant": "assistant"}
  return [
    {"role": roles[name], "content": content.strip()} for name, content in zip(parts[::2], parts[1::2], strict=True)
  ]


_HH_TURN = re.compile(r"(?:\A\s*|(?:\r\n|\n|\r(?!\n)){2})(Human|Assistant):")
_SHAPES = {
  "any": (
    'a record is {"prompt", "chosen", "rejected"}, {"messages"}, {"prompt", "completion"}, the same with "label", '
    '{"prompt", "responses", "rankings"}, {"prompt", "completions", "labels"}, {"prompt"} or {"question", "answer"}'
  ),
}
FORMATS = {
  "preference": read_preference,
  "hh": read_hh,
  "messages": read_messages,
  "completion": read_completion,
  "unpaired": read_completion,
  "ranked": read_ranked,
  "stepwise": read_stepwise,
  "prompt": read_prompt,
  "question": read_question,
}
PAIRS = ("preference", "hh")
BEFORE_COMPLETION = ("chosen", "rejected", "label", "responses", "completions", "messages")  # what `detect` sees first


class Kind(NamedTuple):
  """What a kind of training takes from a record.

  Attributes:
    formats: the names in `FORMATS` that hold it.
    completions: the most that it takes, in the order of the format.
    needs: the field that is missing where a format is none of these.
    shape: of a right record, for the message.
    labels: the labels of a record that is no pair, ...
    labels_of_a_pair: ... and those of a pair.
    third: the field of one more completion.
  """

  formats: tuple[str, ...]
  completions: int
  needs: str = ""
  shape: str = ""
  labels: Callable[[Record], tuple[float, ...]] = lambda record: ()
  labels_of_a_pair: tuple[float, ...] = ()
  third: str = ""


_ANY = sys.maxsize
_UNPAIRED = Kind(
  ("unpaired", *PAIRS),
  2,
  "'label'",
  'an example is {"prompt", "completion", "label"}, or a pair',
  lambda record: (flag(required(record, "label"), "label"),),
  (1.0, 0.0),
)
KINDS = {
  "preference": Kind(PAIRS, 2, "'chosen' and 'rejected'", 'a pair is {"prompt", "chosen", "rejected"}'),
  "sft": Kind(
    ("messages", "completion", "unpaired", "question", *PAIRS),
    1,
    "'completion'",
    'an example is {"messages"}, {"prompt", "completion"} or {"question", "answer"} with an answer in words',
    _undesirable,
  ),
  "unpaired": _UNPAIRED,
  "mismatched": _UNPAIRED,  # laid beside rows in which each prompt has the completion of the example before
  "triple": Kind(
    PAIRS, 3, "'chosen' and 'rejected'", 'a triple is {"prompt", "chosen", "rejected", "reference"}', third="reference"
  ),
  "ranked": Kind(
    ("ranked", *PAIRS),
    _ANY,
    "'responses'",
    'a ranking is {"prompt", "responses", "rankings"}, or a pair',
    _rankings,
    (1.0, 2.0),
  ),
  "stepwise": Kind(
    ("stepwise",), _ANY, "'completions'", 'an answer in steps is {"prompt", "completions", "labels"}', _step_labels
  ),
  "prompt": Kind(tuple(FORMATS), 0),
  "text": Kind(tuple(FORMATS), _ANY),  # all that there is
}
