"""Chat templates of the Hugging Face hub: Jinja, rendered in a sandbox to the text of `apply_chat_template`.

A template is a program that came with a model. It sees plain JSON values alone, can change nothing,
and reaches no file, network or clock: `strftime_now` gives the same day forever, since ids that
change overnight can neither be kept nor compared.
"""

import datetime
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignjax.errors import InputError

TODAY = datetime.datetime(2024, 7, 26)  # the day that Llama 3's templates write where there is no clock

# Of the private-use characters, which stand for no text. Those from FIRST on are placeholder.py's.
OPEN, CLOSE, FIRST, LAST = map(chr, (0xF0000, 0xF0001, 0xF0002, 0xFFFFD))
_PRIVATE = re.compile(f"[{OPEN}-{LAST}]")
# What a template's own code can end in, beside the errors of Jinja's own.
_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


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
      text = template.render(self.variables | dialogue | {"add_generation_prompt": add_generation_prompt})
    except _ERRORS as error:
      raise InputError(f"the chat template can not write this dialogue: {error}") from error
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
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
  )
  environment.filters["tojson"] = _tojson
  environment.globals |= {"raise_exception": _raise, "strftime_now": TODAY.strftime}
  try:
    names = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), frozenset(names)
  except jinja2.TemplateSyntaxError as error:
    raise InputError(f"line {error.lineno} of the chat template is no Jinja: {error.message}") from error


def _tojson(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
  # Jinja's own escapes what HTML would read as a tag.
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


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
