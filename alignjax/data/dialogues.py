"""The prompt and completions of a user's record, one reader for each format (`format.py` describes them)."""

import re
from typing import Any

from alignjax.data.field import Dialogue, as_dialogue, dialogue, listed, required, text
from alignjax.data.source import Record
from alignjax.errors import InputError

_HH_TURN = re.compile(r"(?:\A\s*|(?:\r\n|\n|\r(?!\n)){2})(Human|Assistant):")


def read_preference(record: Record) -> tuple[Dialogue, ...]:
  """Returns (prompt, chosen, rejected) of a record with these fields; sides that are dialogues need no "prompt"."""
  sides = [dialogue(record, field, "assistant") for field in ("chosen", "rejected")]
  if record.get("prompt") is not None:
    return split_prompt(_prompt(record), *sides)
  for field in ("chosen", "rejected"):
    if isinstance(record[field], str):
      raise InputError(f"field 'prompt' is missing, and field '{field}' is no dialogue that holds it")
  return split_shared(*sides)


def read_hh(record: Record) -> tuple[Dialogue, ...]:
  """Returns (prompt, chosen, rejected) of two dialogues written as text."""
  for field in ("chosen", "rejected"):
    if not is_hh(required(record, field)):
      raise InputError(f"field '{field}' is no dialogue that starts with '\\n\\nHuman:'")
  return split_shared(*(_hh_dialogue(record, field) for field in ("chosen", "rejected")))


def read_messages(record: Record) -> tuple[Dialogue, ...]:
  """Returns (prompt, completion) of a dialogue: the completion starts at the first assistant turn."""
  turns = dialogue(record, "messages")
  first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
  return turns[:first], turns[first:]


def read_completion(record: Record) -> tuple[Dialogue, ...]:
  """Returns (prompt, completion) of a record with these fields."""
  return split_prompt(_prompt(record), dialogue(record, "completion", "assistant"))


def read_prompt(record: Record) -> tuple[Dialogue, ...]:
  """Returns (prompt,) of a record, whatever other fields it has."""
  return (_prompt(record),)


def read_question(record: Record) -> tuple[Dialogue, ...]:
  """Returns (prompt, completion) of a question and its answer; (prompt,) if the answer is not text."""
  prompt = dialogue(record, "question", "user")
  if isinstance(required(record, "answer"), str):
    return prompt, dialogue(record, "answer", "assistant")
  return (prompt,)


def read_ranked(record: Record) -> tuple[Dialogue, ...]:
  """Returns (prompt, response, response, ...) of a record with the fields "prompt" and "responses"."""
  prompt = _prompt(record)
  responses = listed(record, "responses")
  if len(responses) < 2:
    raise InputError(f"field 'responses' holds {len(responses)}; a ranking is of two or more")
  return split_prompt(prompt, *(as_dialogue(x, f"responses[{i}]", "assistant") for i, x in enumerate(responses)))


def read_stepwise(record: Record) -> tuple[Dialogue, ...]:
  """Returns (prompt, step, step, ...) of a record with the fields "prompt" and "completions"."""
  prompt = _prompt(record)
  steps = listed(record, "completions")
  if not steps:
    raise InputError("field 'completions' is empty; it must hold the steps of an answer")
  answer: list[Dialogue] = []
  for i, step in enumerate(steps):
    answer.append([{"role": "assistant", "content": text(step, f"completions[{i}]")}])
  return prompt, *answer


def split_shared(chosen: Dialogue, rejected: Dialogue) -> tuple[Dialogue, Dialogue, Dialogue]:
  """Cuts two dialogues at the last border where both continue with an assistant turn after the same messages.

  Returns (prompt, chosen, rejected). Without such a border the prompt is empty, and the pair is dropped for that.
  """
  cut = 0
  for i, (chosen_turn, rejected_turn) in enumerate(zip(chosen, rejected, strict=False)):
    if chosen_turn["role"] == rejected_turn["role"] == "assistant":
      cut = i
    if chosen_turn != rejected_turn:
      break
  return chosen[:cut], chosen[cut:], rejected[cut:]


def _prompt(record: Record) -> Dialogue:
  prompt = dialogue(record, "prompt", "user")
  if prompt and prompt[-1]["role"] == "assistant":
    raise InputError("field 'prompt' ends with an assistant turn; end it with the user's")
  return prompt


def split_prompt(prompt: Dialogue, *sides: Dialogue) -> tuple[Dialogue, ...]:
  """Returns (prompt, completion, ...), with the prompt removed from sides that repeat it at their front.

  In the sides, the prompt may follow other turns, such as a system turn that the field "prompt" lacks. If all sides
  agree on these turns, they become part of the prompt. A side may also lack the prompt's own system turn.
  """
  leads = [_lead(prompt, side) for side in sides]
  if leads and leads[0] and all(lead == leads[0] for lead in leads):
    start = len(leads[0]) + len(prompt)
    return leads[0] + prompt, *(side[start:] for side in sides)
  return prompt, *(_without(prompt, side) for side in sides)


def _without(prompt: Dialogue, side: Dialogue) -> Dialogue:
  """Removes the prompt from the front of a side; the side may repeat it without its system turn."""
  repetitions = [prompt]
  if prompt and prompt[0]["role"] == "system":
    repetitions.append(prompt[1:])
  for repeated in repetitions:
    if repeated and side[: len(repeated)] == repeated:
      return side[len(repeated) :]
  return side


def _lead(prompt: Dialogue, side: Dialogue) -> Dialogue:
  """The turns of a whole dialogue before the prompt and its answer; [] if it begins with either."""
  if not prompt or not side or side[0]["role"] == "assistant" or _without(prompt, side) is not side:
    return []
  for start in range(1, len(side) - len(prompt)):
    end = start + len(prompt)
    if side[start:end] == prompt and side[end]["role"] == "assistant":
      return side[:start]
  return []


def is_hh(value: Any) -> bool:
  """True for a dialogue that is written as one text, as in Anthropic's HH-RLHF."""
  return isinstance(value, str) and _HH_TURN.match(value) is not None


def _hh_dialogue(record: Record, field: str) -> Dialogue:
  _, *parts = _HH_TURN.split(text(record[field], field))
  roles = {"Human": "user", "Assistant": "assistant"}
  turns = zip(parts[::2], parts[1::2], strict=True)
  return [{"role": roles[name], "content": content.strip()} for name, content in turns]


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
