"""Which part of a rendered dialogue the assistant writes.

A template with `{% generation %}` says so itself. Of another one it is what each assistant turn adds: the
dialogue rendered before it, ready for a completion, against the dialogue rendered with it. Either way what is
written must stay: a template that writes a turn otherwise once another follows (as Qwen3's, which
takes the thoughts out of earlier turns) would train on what no model ever sees.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from alignjax.data.jinja_template import JinjaTemplate
from alignjax.errors import InputError

_AROUND = 24  # characters, of what a message shows of a text


class Turns(NamedTuple):
  """A dialogue as text, and what of it is the assistant's.

  Attributes:
    text: prompt and completion.
    start: where the completion begins.
    spans: (first character, last + 1) of its parts by the assistant.
  """

  text: str
  start: int
  spans: list[tuple[int, int]]


def find_turns(template: JinjaTemplate, messages: Sequence[Any], first: int, tools: Sequence[Any] = ()) -> Turns:
  """The text of a dialogue whose completion begins at message `first`, and the assistant's turns in that.

  Raises:
    InputError: the template writes a message otherwise once others follow it, or refuses the dialogue.
  """
  text, marked = template.render(messages, tools=tools)
  before = lambda i: template.render(messages[:i], add_generation_prompt=True, tools=tools).text
  prompt = before(first)
  if not text.startswith(prompt):
    raise InputError(
      f"the prompt ends otherwise before a completion ({_difference(prompt, text)}): the chat template's generation "
      "prompt is not how it begins an assistant's turn; give a template in which it is"
    )
  start, spans = len(prompt), []
  for i in range(first, len(messages)):
    if messages[i]["role"] != "assistant":
      continue
    a = before(i) if i > first else prompt
    b = template.render(messages[: i + 1], tools=tools).text if i + 1 < len(messages) else text
    for part in (a, b):
      if not text.startswith(part):
        raise InputError(
          f"the chat template rewrites message {i + 1} of {len(messages)} (assistant) once others follow "
          f"({_difference(part, text)}); train on the last turn alone, with those before it in the prompt, "
          "or give a template that leaves earlier turns as they were"
        )
    spans.append((len(a), len(b)))
  if template.marks_turns:
    spans = [(max(a, start), b) for a, b in marked if b > start]
  return Turns(text, start, spans)


def _difference(before: str, after: str) -> str:
  """Both texts around the place where they part."""
  at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
  excerpt = lambda text: json.dumps(text[max(0, at - _AROUND) : at + _AROUND], ensure_ascii=False)
  return f"{excerpt(before)} became {excerpt(after)}"
