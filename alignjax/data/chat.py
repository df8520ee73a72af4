"""Dialogues as token ids, and the ids that the loss is on, for our own templates.

Rendering happens in token space: the pieces of a template are control ids, which no text can
produce, and the contents between them are tokenised one by one. So a prompt's ids are a prefix of
the ids of prompt and completion, and a text cannot forge a turn.

In a completion the loss is on the content of every assistant turn and on the id that ends it, because a
model that is never trained to stop does not stop.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from alignjax.data.field import Message, Tool
from alignjax.errors import InputError

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Template:
  """The control ids around each turn.

  Attributes:
    start: ids before a dialogue.
    opening: ids before a content, by role. If "system" is absent, its content is written at the start
      of the next turn.
    closing: ids after a content, by role; the last id of the assistant's is the end of turn.
  """

  name: str
  start: tuple[int, ...]
  opening: dict[str, tuple[int, ...]]
  closing: dict[str, tuple[int, ...]]

  @property
  def stop_id(self) -> int:
    """The id that ends an assistant turn."""
    return self.closing["assistant"][-1]


class Pieces(NamedTuple):
  """The texts of a template's control ids: before a dialogue, and (before, after) each content by role."""

  start: str
  turns: dict[str, tuple[str, str]]


# The native template marks every turn. Mistral's has no system turn. Mistral's tools write the system text into the
# last user turn, which moves as a dialogue grows; here the text stays in the first turn after it.
TEMPLATES = {
  "alignjax": Pieces(
    "<s>",
    {
      "system": ("<|system|>", "<|end|>"),
      "user": ("<|user|>", "<|end|>"),
      "assistant": ("<|assistant|>", "<|end|>"),
    },
  ),
  "mistral-v3": Pieces("<s>", {"user": ("[INST]", "[/INST]"), "assistant": ("", "</s>")}),
}


def find_template(control_ids: dict[str, int]) -> Template | None:
  """Returns the first template of `TEMPLATES` whose pieces are all control pieces, or None."""
  ids: dict[str, tuple[int, ...]] = {piece: (number,) for piece, number in control_ids.items()}
  ids[""] = ()
  for name, (start, turns) in TEMPLATES.items():
    needed = [start, *(piece for pieces in turns.values() for piece in pieces)]
    if all(piece in ids for piece in needed):
      return Template(
        name,
        ids[start],
        {role: ids[before] for role, (before, _) in turns.items()},
        {role: ids[after] for role, (_, after) in turns.items()},
      )
  return None


def render(
  template: Template, encode: Encode, messages: list[Message], add_generation_prompt: bool = False
) -> list[int]:
  """Encodes a dialogue as token ids.

  Args:
    template: the control ids.
    encode: text -> ids; it must not add control ids of its own.
    messages: of roles that the template has; a system text is put before the next user message if it has no system
      turn.
    add_generation_prompt: also append the ids that open the assistant's turn.

  Raises:
    InputError: the template cannot write a message: a tool call or result, or a system text without a user message
      after it.
  """
  ids = list(template.start)
  for role, content in _turns(template, messages):
    ids += [*template.opening[role], *encode(content), *template.closing[role]]
  if add_generation_prompt:
    ids += template.opening["assistant"]
  return ids


def complete(template: Template, encode: Encode, messages: list[Message]) -> tuple[list[int], list[int]]:
  """Encodes a completion: (ids that follow a generation prompt, 1 for each that the loss is on, else 0).

  Args:
    template: the control ids.
    encode: text -> ids; it must not add control ids of its own.
    messages: begins with an assistant's message, whose opening is part of the generation prompt.

  Raises:
    InputError: as `render`.
  """
  ids = []
  mask = []
  for i, (role, content) in enumerate(_turns(template, messages)):
    opening = () if i == 0 else template.opening[role]
    turn = [*encode(content), *template.closing[role]]
    ids += [*opening, *turn]
    mask += [0] * len(opening) + [int(role == "assistant")] * len(turn)
  return ids, mask


def refuse_tools(template: Template, tools: Sequence[Tool]) -> None:
  """Raises InputError if there are tools: these templates have no place for them."""
  if tools:
    raise InputError(f"the template '{template.name}' has no place for tools; {_OTHER}")


_OTHER = "take a tokenizer.json whose chat template has, or leave such records out"


def _turns(template: Template, messages: list[Message]) -> Iterator[tuple[str, str]]:
  """Iterates (role, content) of the turns; a system text is put before the next content if the template has no
  system turn.

  Raises:
    InputError: the template cannot write a message.
  """
  waiting = ""
  for message in messages:
    role, content = message["role"], message["content"]
    if role == "tool" or message.get("tool_calls"):
      raise InputError(f"the template '{template.name}' has no place for tool calls and what they return; {_OTHER}")
    if role not in template.opening:
      waiting += f"{content}\n\n"
    elif waiting and role == "assistant":
      break
    else:
      yield role, waiting + content
      waiting = ""
  if waiting:
    raise InputError(
      f"a system message comes before no user message, which the template '{template.name}' "
      "cannot write; put a user message after it"
    )
