"""The parts of a rendered dialogue that the assistant writes.

A template with `{% generation %}` marks them. With another template, they are what each assistant turn adds: the
difference between the dialogue rendered before it, ready for a completion, and the dialogue rendered with it. Either
way a written turn must stay as it is. Some templates rewrite a turn once another follows (Qwen3's removes the thoughts
of earlier turns); training would then be on a text that no model ever sees.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from alignjax.data.jinja_template import JinjaTemplate
from alignjax.errors import InputError

_AROUND = 24  # characters of context that a message shows


class Turns(NamedTuple):
  """A dialogue as text, and the assistant's parts of it.

  Attributes:
    text: prompt and completion.
    start: the place of the completion's first character.
    spans: (first character, last + 1) of the assistant's parts of the completion.
  """

  text: str
  start: int
  spans: list[tuple[int, int]]


def find_turns(template: JinjaTemplate, messages: Sequence[Any], first: int, tools: Sequence[Any] = ()) -> Turns:
  """Renders a dialogue and finds the assistant's turns in the completion, which begins at message `first`.

  Raises:
    InputError: the template writes a message otherwise once others follow it, or refuses the dialogue.
  """
  text, marked = template.render(messages, tools=tools)

  def opened(turn: int) -> str:
    """The text before a turn, ready for it."""
    return template.render(messages[:turn], add_generation_prompt=True, tools=tools).text

  prompt = opened(first)
  if not text.startswith(prompt):
    raise InputError(
      f"the prompt ends otherwise before a completion ({_difference(prompt, text)}): the chat template's generation "
      "prompt is not how it begins an assistant's turn; give a template in which it is"
    )
  start = len(prompt)
  spans = []
  for i in range(first, len(messages)):
    if messages[i]["role"] != "assistant":
      continue
    before = opened(i) if i > first else prompt
    through = template.render(messages[: i + 1], tools=tools).text if i + 1 < len(messages) else text
    for part in (before, through):
      if not text.startswith(part):
        raise InputError(
          f"the chat template rewrites message {i + 1} of {len(messages)} (assistant) once others follow "
          f"({_difference(part, text)}); train on the last turn alone, with those before it in the prompt, "
          "or give a template that leaves earlier turns as they were"
        )
    spans.append((len(before), len(through)))
  if template.marks_turns:
    spans = [(max(begin, start), end) for begin, end in marked if end > start]
  return Turns(text, start, spans)


def _difference(before: str, after: str) -> str:
  """Shows both texts around the first character in which they differ."""
  pairs = enumerate(zip(before, after, strict=False))
  place = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
  excerpt = slice(max(0, place - _AROUND), place + _AROUND)
  shown = [json.dumps(text[excerpt], ensure_ascii=False) for text in (before, after)]
  return " became ".join(shown)
