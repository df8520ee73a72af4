"""Hugging Face's tokenizer.json with the chat template that a model came with.

A dialogue's ids are those of `apply_chat_template`, with one exception: if users wrote the text of a control token,
it is encoded as plain text, piece by piece. A completion is encoded separately from the prompt. So the prompt's ids are
those that the sampler sees, and a token never spans the start of an assistant's turn.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import tokenizers
from etils import epath

from alignjax.data import cache, calls, first_bytes, hf_json, placeholder
from alignjax.data.field import Message, Tool
from alignjax.data.hf_folder import Folder, read_folder, read_text
from alignjax.data.jinja_template import FIRST, LAST, TODAY, JinjaTemplate
from alignjax.data.placeholder import Placeholders
from alignjax.data.turn import find_turns
from alignjax.errors import InputError

_VERSION = 1  # of the encoding; a change makes another tokenizer


class Token(NamedTuple):
  """An id, and the place in the text of its first character."""

  id: int
  start: int


@dataclass(frozen=True)
class HFTokenizer:
  """Text to ids and back, and the chat template that goes with the ids.

  Attributes:
    json: the tokenizer as text of the `tokenizers` library, with every control token marked as special.
    template: renders dialogues.
    fingerprint: hex sha256 of all that decides the ids.
    control: the control tokens' ids by their texts.
    bos_id: the id of the beginning of a sequence; -1 if there is none.
    eos_id: the id of the end of a sequence.
    pad_id: the id that fills rows; `eos_id` if the model has none. No mask is derived from it.
    stop_id: the id that ends an assistant's turn.
  """

  json: str = field(repr=False)
  template: JinjaTemplate
  fingerprint: str
  control: dict[str, int]
  bos_id: int
  eos_id: int
  pad_id: int
  stop_id: int

  @property
  def identity(self) -> tuple[str, str]:
    """What decides the ids of a dialogue: the fingerprint, which covers the template."""
    return self.fingerprint, "jinja"

  @cached_property
  def vocab_size(self) -> int:
    """The largest id + 1, added tokens included; a model may have more rows."""
    return max(self._parser.get_vocab(with_added_tokens=True).values()) + 1

  def encode(self, text: str) -> list[int]:
    """Encodes plain text; the result never has a control id."""
    if self._pattern.search(text):
      return self._plain(text).ids
    return self._parse(text).ids

  def decode(self, ids: Sequence[int]) -> str:
    """Decodes ids to text, without control ids."""
    with _failing(lambda reason: f"the tokenizer cannot decode {list(ids[:8])} ({reason})"):
      return self._parser.decode(list(map(int, ids)), skip_special_tokens=True)

  def piece(self, number: int) -> str:
    """Returns the name of an id in the vocabulary, such as that of a control token; "<7>" of one without a name."""
    return self._parser.id_to_token(number) or f"<{number}>"

  def render(
    self, messages: list[Message], add_generation_prompt: bool = False, tools: Sequence[Tool] = ()
  ) -> list[int]:
    """Encodes a dialogue, ready for a completion if `add_generation_prompt`."""
    hidden = Placeholders(self._pattern)
    hidden_messages = self._hide(hidden, messages)
    tools = hidden.hide(tools)
    text = self.template.render(hidden_messages, add_generation_prompt, tools).text
    return [token.id for token in self._tokens(text, hidden)]

  def complete(
    self, prompt: list[Message], messages: list[Message], tools: Sequence[Tool] = ()
  ) -> tuple[list[int], list[int]]:
    """Encodes a completion after `render(prompt, add_generation_prompt=True)`: (ids, loss mask of 1 and 0).

    The mask is 1 on every turn of the assistant, including the token that ends it; the ids end with the last of these.

    Raises:
      InputError: the template refuses the dialogue, rewrites it as it grows, or does not end the last turn.
    """
    hidden = Placeholders(self._pattern)
    dialogue = self._hide(hidden, [*prompt, *messages])
    tools = hidden.hide(tools)
    try:
      text, start, spans = find_turns(self.template, dialogue, len(prompt), tools)
    except InputError as error:
      raise InputError(hidden.reveal(str(error))) from error
    ends = dict(spans)
    borders = sorted({start, *ends, len(text)})
    ids = []
    mask = []
    for begin, end in pairwise(borders):
      tokens = self._after(text[:begin], text[begin:end], hidden)
      trained = self._trained(tokens, text, ends.get(begin, begin))
      ids += [token.id for token in tokens]
      mask += [1] * trained + [0] * (len(tokens) - trained)
    length = max((k + 1 for k, trained in enumerate(mask) if trained), default=0)
    if not length or ids[length - 1] != self.stop_id:
      raise InputError(
        f"the chat template does not end the last turn with {self._parser.id_to_token(self.stop_id)!r}, as it does "
        "others; a model that is not trained to stop does not stop"
      )
    return ids[:length], mask[:length]

  def _hide(self, hidden: Placeholders, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns messages for the template, with placeholders and without fields that are null."""
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if any("tool_calls" in message for message in present):
      present = calls.with_arguments(present, self._calls_as_text)
    return [hidden.hide(message) for message in present]

  def _trained(self, tokens: list[Token], text: str, end: int) -> int:
    """Counts a turn's tokens that the loss is on: those before `end`, without blanks after the last control token."""
    inside = sum(token.start < end for token in tokens)
    last = next((k for k in reversed(range(inside)) if tokens[k].id in self._control_ids), None)
    if last is None or (last + 1 < inside and text[tokens[last + 1].start : end].strip()):
      return inside
    return last + 1

  def _after(self, before: str, text: str, hidden: Placeholders) -> list[Token]:
    """Encodes a text that continues another one.

    Some tokenizers put a space in front of the start of a text, and some control tokens
    swallow the blanks after them. So the text is encoded together with what comes before it, from the last control
    token on. If that changes the tokens of the part before, the text is encoded alone.

    Args:
      before: the other text, whose tokens stay as they are.
      text: what follows it.
      hidden: the placeholders in both.

    Returns:
      The tokens of `text`, with places in the joined text.
    """
    lead_start = max((match.start() for match in self._pattern.finditer(before)), default=0)
    lead = before[lead_start:]
    lead_ids = [token.id for token in self._tokens(lead, hidden)]
    tokens = self._tokens(lead + text, hidden)
    if [token.id for token in tokens[: len(lead_ids)]] == lead_ids:
      return [Token(token.id, token.start + lead_start) for token in tokens[len(lead_ids) :]]
    return [Token(token.id, token.start + len(before)) for token in self._tokens(text, hidden)]

  def _tokens(self, text: str, hidden: Placeholders) -> list[Token]:
    """Encodes a rendered text; only what the template wrote can become a control id."""
    tokens = []
    for part, start, forged in hidden.split(text):
      encode = self._plain if forged else self._parse
      ids, offsets = self._continued(encode, part, start)
      if forged:  # one character of the rendered text
        offsets = [0] * len(ids)
      tokens += [Token(number, start + offset) for number, offset in zip(ids, offsets, strict=True)]
    return tokens

  def _continued(
    self, encode: Callable[[str], tokenizers.Encoding], part: str, start: int
  ) -> tuple[list[int], list[int]]:
    """Encodes a part of a text that begins at `start`: (ids, places of their first characters in the part).

    Behind the start of a text, the part is encoded after a newline, as in transformers: no space is put in front
    of it then.
    """
    if start:
      encoding = encode("\n" + part)
      count = len(self._newline)
      if encoding.ids[:count] == self._newline:
        return encoding.ids[count:], [max(first - 1, 0) for first, _ in encoding.offsets[count:]]
    encoding = encode(part)
    return encoding.ids, [first for first, _ in encoding.offsets]

  def _parse(self, text: str) -> tokenizers.Encoding:
    return _encode(self._parser, text)

  def _plain(self, text: str) -> tokenizers.Encoding:
    """Encodes a text in which control tokens' texts are plain text.

    Raises:
      InputError: the library makes a control id of one all the same.
    """
    encoding = _encode(self._plain_parser, text)
    for match in self._pattern.finditer(text):
      if match[0] != self.template.variables.get("unk_token") and self.control[match[0]] in encoding.ids:
        raise InputError(f"this tokenizer takes the plain text {match[0]!r} for a control token; leave it out")
    return encoding

  @cached_property
  def _parser(self) -> tokenizers.Tokenizer:
    return _open(self.json)

  @cached_property
  def _plain_parser(self) -> tokenizers.Tokenizer:
    plain = _open(self.json)  # not `_parser` with another setting, because threads share it
    plain.encode_special_tokens = True
    return plain

  @cached_property
  def _pattern(self) -> re.Pattern:
    return placeholder.pattern(set(self.control))

  @cached_property
  def _control_ids(self) -> frozenset[int]:
    return frozenset(self.control.values())

  @cached_property
  def _calls_as_text(self) -> bool:
    return calls.takes_text(self.template)

  @cached_property
  def _newline(self) -> list[int]:
    return self._parse("\n").ids

  def __getstate__(self) -> dict[str, Any]:
    return {f.name: getattr(self, f.name) for f in fields(self)}  # a pickled parser loses its settings


def open_hf(path: epath.Path) -> HFTokenizer:
  """Opens a tokenizer.json, with the template and the special tokens' names from the files beside it.

  Raises:
    InputError: a file is missing or damaged, they disagree, or the template ends no turn with a control token.
  """
  folder = read_folder(path)
  parser = open_parser(path)
  try:
    return _assemble(folder, parser)
  except InputError as error:
    raise InputError(f"{path}: {error}") from error


def open_parser(path: epath.Path) -> tokenizers.Tokenizer:
  """Opens a tokenizer.json alone, ignoring the files beside it; `open_hf` also reads chat template and special tokens.

  Raises:
    InputError: the file is missing, is no tokenizer.json (such as a Git LFS pointer or a web page), is damaged, or has
      ids far beyond its number of tokens.
  """
  text = read_text(path)
  if reason := first_bytes.foreign(text[: first_bytes.HEAD].encode()):
    raise InputError(f"{path}: no tokenizer.json of the tokenizers library: it {reason}")

  def message(reason: str) -> str:
    return f"{path}: no tokenizer.json of the tokenizers library ({reason}); fetch it again"

  if reason := hf_json.flaw(text):
    raise InputError(message(reason))
  with _failing(message):
    parser = _open(text)
    parser.encode("text", add_special_tokens=False)
  if reason := hf_json.sparse(list(parser.get_vocab(with_added_tokens=True).values())):
    raise InputError(message(reason))
  return parser


def _assemble(folder: Folder, parser: tokenizers.Tokenizer) -> HFTokenizer:
  """Makes the tokenizer of a folder; `parser` is changed: it gets the folder's tokens and flags."""
  template = JinjaTemplate(folder.template, folder.named)
  closing, between = _frame(template)
  _add(parser, folder.added)
  known = parser.get_added_tokens_decoder().values()
  written = placeholder.pattern({token.content for token in known if not token.content.isspace()})
  control = _mark_control(parser, {*folder.named.values(), *folder.special, *written.findall(between)})
  stop = placeholder.pattern(set(control)).search(closing)
  if not stop:
    place = ""
    if template.marks_turns:
      place = " before {% endgeneration %}"
    raise InputError(
      f"the chat template ends an assistant's turn with {closing!r}{place}, in which there is no special token; "
      "a model could not learn to stop: end the turn with one, such as eos_token"
    )
  stop_id = control[stop[0]]
  bos_id = _named(folder, parser, "bos", default=-1)
  eos_id = _named(folder, parser, "eos", default=stop_id)
  pad_id = _named(folder, parser, "pad", default=eos_id)
  special = bos_id, eos_id, pad_id, stop_id
  fingerprint = cache.digest(
    "hf", _VERSION, folder.tokenizer, template.source, template.variables, control, special, TODAY.isoformat()
  )
  return HFTokenizer(parser.to_str(), template, fingerprint, control, *special)


def _frame(template: JinjaTemplate) -> tuple[str, str]:
  """Returns the texts that a template writes after the last answer, and between an answer and the next question."""
  question = {"role": "user", "content": FIRST}
  answer = {"role": "assistant", "content": LAST}
  text, spans = template.render([question, answer])
  place = text.rfind(LAST)
  if place < 0:
    raise InputError("the chat template does not write what the assistant says; take another")
  end = len(text)
  if template.marks_turns:
    enclosing = next((last for first, last in spans if first <= place < last), None)
    if enclosing is None:
      raise InputError("the chat template's {% generation %} does not enclose what the assistant says; correct it")
    end = enclosing
  longer = template.render([question, answer, question]).text
  return text[place + 1 : end], longer.rpartition(FIRST)[0].rpartition(LAST)[2]


def _add(parser: tokenizers.Tokenizer, added: dict[int, dict[str, Any]]) -> None:
  """Gives added tokens the flags of tokenizer_config.json, as transformers does."""
  known = parser.get_added_tokens_decoder()
  for number, entry in sorted(added.items()):
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    token = tokenizers.AddedToken(**{name: entry[name] for name in names if name in entry})
    if repr(known.get(number)) != repr(token):
      if token.special:
        parser.add_special_tokens([token])
      else:
        parser.add_tokens([token])
    if parser.token_to_id(token.content) != number:
      raise InputError(
        f"tokenizer_config.json has {token.content!r} as token {number}, tokenizer.json as "
        f"{parser.token_to_id(token.content)}; they are of different models"
      )


def _mark_control(parser: tokenizers.Tokenizer, texts: set[str]) -> dict[str, int]:
  """Returns the ids of the control tokens by text: of those that are special, and those of `texts` in the vocabulary.

  All become special in `parser`. They are searched in the text before it is normalised, because a normalizer could turn
  other text into one.
  """
  known = {token.content: token for token in parser.get_added_tokens_decoder().values()}
  special = {text for text, token in known.items() if token.special}
  control = {text for text in special | texts if text and parser.token_to_id(text) is not None}
  changed = []
  for text in sorted(control):
    flags = known.get(text) or tokenizers.AddedToken(text)
    if text not in special or flags.normalized:
      strip = {name: getattr(flags, name) for name in ("lstrip", "rstrip", "single_word")}
      changed.append(tokenizers.AddedToken(text, special=True, normalized=False, **strip))
  parser.add_special_tokens(changed)
  ids = {}
  for text in sorted(control):
    number = parser.token_to_id(text)
    assert number is not None, text
    ids[text] = number
  return ids


def _named(folder: Folder, parser: tokenizers.Tokenizer, name: str, default: int) -> int:
  """Returns the id of the special token called `name`: "bos", "eos" or "pad"; `default` if there is none."""
  text = folder.named.get(f"{name}_token")
  if text is None:
    number = folder.generation.get(f"{name}_token_id")
    if isinstance(number, list):
      number = next(iter(number), None)
    if number in (None, -1):
      return default
    return number
  known_number = parser.token_to_id(text)
  if known_number is None:
    raise InputError(f"{name}_token is {text!r}, which tokenizer.json does not have; they are of different models")
  return known_number


def _open(json: str) -> tokenizers.Tokenizer:
  """Opens the text of a tokenizer.json, without truncation, padding or random merges."""
  parser = tokenizers.Tokenizer.from_str(json)
  parser.no_truncation()  # the file may hold settings of the training, such as "cut after 512"
  parser.no_padding()
  if getattr(parser.model, "dropout", None):  # leaves merges out at random
    parser.model.dropout = None
  return parser


def _encode(parser: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
  with _failing(lambda reason: f"the tokenizer cannot encode {text[:20]!r} ({reason})"):
    return parser.encode(text, add_special_tokens=False)


@contextlib.contextmanager
def _failing(message: Callable[[str], str]) -> Iterator[None]:
  """Turns the library's errors into an InputError with `message(reason)`.

  The library raises plain Exception, and PanicException, which is not an Exception.
  """
  try:
    yield
  except BaseException as error:
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    reason = " ".join(str(error).split())[:200]
    raise InputError(message(reason)) from error
