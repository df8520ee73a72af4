"""Chat templates of the Hugging Face hub: Jinja, rendered in a sandbox to the text of `apply_chat_template`.

A template is a program that came with a model. It sees plain JSON values alone, can change nothing,
and reaches no file, network or clock: `strftime_now` gives the same day forever, since ids that
change overnight can neither be kept nor compared. How much time and memory it may take is limited (`jinja_limits.py`).
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

TODAY = datetime.datetime(2024, 7, 26)  # the day that Llama 3's templates write where there is no clock

# Of the private-use characters, which stand for no text. Those from FIRST on are placeholder.py's.
OPEN, CLOSE, FIRST, LAST = map(chr, (0xF0000, 0xF0001, 0xF0002, 0xFFFFD))
_PRIVATE = re.compile(f"[{OPEN}-{LAST}]")
# What a template's own code can end in, beside the errors of Jinja's own.
_ERRORS = (
  *(jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError),
  *(RecursionError, MemoryError),
)
_DATE = re.compile(r"%-?[aAbBdeHIjmMpSyYFTDRnt%]")  # of strftime: what depends on no zone, locale or platform


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
    variables: what it may name beside the dialogue: bos_token and such, as text.
  """

  source: str
  variables: dict[str, str]

  def __post_init__(self):
    if _PRIVATE.search(self.source):
      raise InputError(f"the chat template holds a character from U+{ord(OPEN):X} to U+{ord(LAST):X}; remove it")
    _compile(self.source)

  @property
  def marks_turns(self) -> bool:
    """Whether `{% generation %}` says what the assistant writes."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

  def render(self, messages: Sequence[Any], add_generation_prompt: bool = False, tools: Sequence[Any] = ()) -> Rendered:
    """A dialogue as text, ready for a completion if `add_generation_prompt`.

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
      raise InputError(f"the chat template can not write this dialogue: {_reason(error)}") from error
    return _spans(text)


class _Generation(Extension):
  """`{% generation %}...{% endgeneration %}` around what the assistant writes."""

  tags = frozenset({"generation"})

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

  def _enclose(self, caller) -> str:
    return OPEN + caller() + CLOSE


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> tuple[jinja2.Template, frozenset[str]]:
  """The template, and the variables that it reads."""
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
  """What an error says, in one line of some length: a template chooses its own words."""
  text = " ".join(str(getattr(error, "message", None) or error or type(error).__name__)[:2000].split())
  return text if len(text) <= 500 else f"{text[:500]}..."


def _raise(message: str) -> None:
  raise jinja2.TemplateError(str(message)[:2000])


def _strftime_now(form: str) -> str:
  if len(form) > 200 or "%" in _DATE.sub("", form):
    raise jinja2.TemplateError(f"strftime_now({form[:200]!r}) is not supported; write the day into the template")
  return TODAY.strftime(form)


def _spans(text: str) -> Rendered:
  """A text without the marks of `{% generation %}`, and where they stood."""
  parts, spans, length, start = [], [], 0, 0
  for part in re.split(f"([{OPEN}{CLOSE}])", text):
    if part == OPEN:
      start = length
    elif part == CLOSE:
      spans.append((start, length))
    else:
      parts.append(part)
      length += len(part)
  return Rendered("".join(parts), spans)
