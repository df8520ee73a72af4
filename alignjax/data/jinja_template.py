"""Chat templates of the Hugging Face hub: Jinja, rendered in a sandbox to the text of `apply_chat_template`.

A template is a program that came with a model. It sees plain JSON values alone, can change nothing,
and reaches no file, network or clock. `strftime_now` returns the same day forever, because ids that
change overnight can neither be cached nor compared. Its time and memory are limited (`jinja_limits.py`).
"""

import datetime
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension

from alignjax.data import jinja_limits
from alignjax.errors import InputError

TODAY = datetime.datetime(2024, 7, 26)  # the day that Llama 3's templates write if there is no clock

# Private-use characters, which no text needs. Those from FIRST on belong to placeholder.py.
OPEN, CLOSE, FIRST, LAST = map(chr, (0xF0000, 0xF0001, 0xF0002, 0xFFFFD))
_PRIVATE = re.compile(f"[{OPEN}-{LAST}]")
# The errors that a template's code can raise: Jinja's, and those of the Python expressions in it.
_ERRORS = (
  *(jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError),
  *(RecursionError, MemoryError),
)
_DATE = re.compile(r"%-?[aAbBdeHIjmMpSyYFTDRnt%]")  # strftime codes that depend on no zone, locale or platform


class Rendered(NamedTuple):
  """A dialogue as text.

  Attributes:
    text: all of it.
    spans: (first character, last + 1) of each part that `{% generation %}` encloses.
  """

  text: str
  spans: list[tuple[int, int]]


@dataclass(frozen=True)
class JinjaTemplate:
  """A chat template.

  Attributes:
    source: the Jinja text.
    variables: names that it may use in addition to the dialogue, such as bos_token, and their texts.
  """

  source: str
  variables: dict[str, str]

  def __post_init__(self):
    if _PRIVATE.search(self.source):
      raise InputError(f"the chat template holds a character from U+{ord(OPEN):X} to U+{ord(LAST):X}; remove it")
    _compile(self.source)

  @property
  def marks_turns(self) -> bool:
    """True if `{% generation %}` marks the assistant's parts."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

  def render(self, messages: Sequence[Any], add_generation_prompt: bool = False, tools: Sequence[Any] = ()) -> Rendered:
    """Renders a dialogue as text, ready for a completion if `add_generation_prompt`.

    Raises:
      InputError: the template refuses the dialogue, fails, or has no place for the tools.
    """
    template, names = _compile(self.source)
    if tools and "tools" not in names:
      raise InputError("the chat template has no place for tools; take one that has, or leave such records out")
    dialogue = {"messages": messages, "tools": tools or None, "documents": None}
    try:
      variables = self.variables | dialogue | {"add_generation_prompt": add_generation_prompt}
      text = jinja_limits.render(template, variables)
    except _ERRORS as error:
      raise InputError(f"the chat template cannot write this dialogue: {_reason(error)}") from error
    return _spans(text)


class _Generation(Extension):
  """The tags `{% generation %}...{% endgeneration %}`, which enclose the assistant's parts."""

  tags = frozenset({"generation"})  # type: ignore[assignment]  # Jinja only reads it

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

  def _enclose(self, caller) -> str:
    return OPEN + caller() + CLOSE


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> tuple[jinja2.Template, frozenset[str]]:
  """Compiles a template; returns it and the names of the variables that it reads."""
  if len(source) > jinja_limits.LONGEST:
    raise InputError(f"the chat template has {len(source)} characters; the most is {jinja_limits.LONGEST}")
  environment = jinja_limits.SafeEnvironment([_Generation])
  environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
  try:
    return jinja_limits.compile_template(environment, source)
  except jinja2.TemplateSyntaxError as error:
    raise InputError(f"line {error.lineno} of the chat template is no Jinja: {_reason(error)}") from error
  except (RecursionError, MemoryError, SyntaxError) as error:  # the parser's, and Python's of what it made
    raise InputError("the chat template is nested too deeply; write it flatter") from error
  except (jinja2.TemplateError, ValueError, OverflowError) as error:  # such as a number of thousands of digits
    raise InputError(f"the chat template is no Jinja: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
  """The message of an error in one line of limited length: a template chooses its own words."""
  message = str(getattr(error, "message", None) or error or type(error).__name__)
  text = " ".join(message[:2000].split())
  if len(text) > 500:
    return f"{text[:500]}..."
  return text


def _raise(message: str) -> None:
  raise jinja2.TemplateError(str(message)[:2000])


def _strftime_now(form: str) -> str:
  if len(form) > 200 or "%" in _DATE.sub("", form):
    raise jinja2.TemplateError(f"strftime_now({form[:200]!r}) is not supported; write the day into the template")
  return TODAY.strftime(form)


def _spans(text: str) -> Rendered:
  """Takes the marks of `{% generation %}` out of a text and turns them into spans."""
  parts = []
  spans = []
  length, start = 0, 0
  for part in re.split(f"([{OPEN}{CLOSE}])", text):
    if part == OPEN:
      start = length
    elif part == CLOSE:
      spans.append((start, length))
    else:
      parts.append(part)
      length += len(part)
  return Rendered("".join(parts), spans)
