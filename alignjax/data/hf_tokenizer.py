"""Hugging Face's tokenizer.json with the chat template that a model came with.

A dialogue's ids are `apply_chat_template`'s, but for texts of control tokens that users wrote: those are
encoded as plain text, piece by piece. A completion is encoded apart from the prompt, so that the prompt's ids are
those that the sampler sees, and every turn of the assistant begins with a token of its own.
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

_VERSION = 1  # of how ids are made; another one is another tokenizer


class Token(NamedTuple):
  """An id, and the character of the text where it begins."""

  id: int
  start: int


@dataclass(frozen=True)
class HFTokenizer:
  """Text to ids and back, and the chat template that goes with the ids.

  Attributes:
    json: of the `tokenizers` library, with every control token marked as special.
    template: how dialogues are rendered.
    fingerprint: hex sha256 of all that decides the ids.
    control: the control tokens' ids by their texts.
    bos_id: -1 if there is none.
    eos_id: the end of a sequence.
    pad_id: what fills rows, or `eos_id` where there is none; no mask is ever read off it.
    stop_id: what ends an assistant's turn.
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
    """What decides the ids of a dialogue: the fingerprint, which has the template in it."""
    return self.fingerprint, "jinja"

  @cached_property
  def vocab_size(self) -> int:
    """The largest id + 1, added tokens included; a model may have more rows."""
    return max(self._parser.get_vocab(with_added_tokens=True).values()) + 1

  def encode(self, text: str) -> list[int]:
    """The ids of plain text; control ids never come out."""
    return self._plain(text).ids if self._pattern.search(text) else self._parse(text).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; control ids vanish."""
    with _failing(lambda reason: f"the tokenizer cannot decode {list(ids[:8])} ({reason})"):
      return self._parser.decode(list(map(int, ids)), skip_special_tokens=True)

  def render(
    self, messages: list[Message], add_generation_prompt: bool = False, tools: Sequence[Tool] = ()
  ) -> list[int]:
    """The ids of a dialogue, ready for a completion if `add_generation_prompt`."""
    hidden = Placeholders(self._pattern)
    messages, tools = self._hide(hidden, messages), hidden.hide(tools)
    text = self.template.render(messages, add_generation_prompt, tools).text
    return [token.id for token in self._tokens(text, hidden)]

  def complete(
    self, prompt: list[Message], messages: list[Message], tools: Sequence[Tool] = ()
  ) -> tuple[list[int], list[int]]:
    """The ids of a completion after `render(prompt, add_generation_prompt=True)`, and their loss mask: 1 or 0.

    The mask is on every turn of the assistant up to the token that ends it; the last of these ends the ids.

    Raises:
      InputError: the template refuses the dialogue, rewrites it as it grows, or does not end the last turn.
    """
    hidden = Placeholders(self._pattern)
    dialogue, tools = self._hide(hidden, [*prompt, *messages]), hidden.hide(tools)
    try:
      text, start, spans = find_turns(self.template, dialogue, len(prompt), tools)
    except InputError as error:
      raise InputError(hidden.reveal(str(error))) from error
    ends = dict(spans)
    borders = sorted({start, *ends, len(text)})
    ids, mask = [], []
    for a, b in pairwise(borders):
      tokens = self._after(text[:a], text[a:b], hidden)
      trained = self._trained(tokens, text, ends.get(a, a))
      ids += [token.id for token in tokens]
      mask += [1] * trained + [0] * (len(tokens) - trained)
    length = len(mask) - mask[::-1].index(1) if 1 in mask else 0
    if not length or ids[length - 1] != self.stop_id:
      raise InputError(
        f"the chat template does not end the last turn with {self._parser.id_to_token(self.stop_id)!r}, as it does "
        "others; a model that is not trained to stop does not stop"
      )
    return ids[:length], mask[:length]

  def _hide(self, hidden: Placeholders, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the template takes them, with placeholders and without fields that are null."""
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if any("tool_calls" in message for message in present):
      present = calls.with_arguments(present, self._calls_as_text)
    return [hidden.hide(message) for message in present]

  def _trained(self, tokens: list[Token], text: str, end: int) -> int:
    """How many of a turn's tokens the loss is on: those before `end`, without blanks after the last control token."""
    inside = sum(token.start < end for token in tokens)
    last = next((k for k in reversed(range(inside)) if tokens[k].id in self._control_ids), None)
    if last is None or (last + 1 < inside and text[tokens[last + 1].start : end].strip()):
      return inside
    return last + 1

  def _after(self, before: str, text: str, hidden: Placeholders) -> list[Token]:
    """The tokens of a text that goes on after another one.

    Some tokenizers put a space in front of what they take for the start of a text, and some control tokens
    swallow the blanks after them. So the text is encoded behind the last control token before it; where that
    would change a token on the other side, it is encoded alone.
    """
    lead = before[max((match.start() for match in self._pattern.finditer(before)), default=0) :]
    known = [token.id for token in self._tokens(lead, hidden)]
    tokens = self._tokens(lead + text, hidden)
    if [token.id for token in tokens[: len(known)]] == known:
      tokens, shift = tokens[len(known) :], len(before) - len(lead)
    else:
      tokens, shift = self._tokens(text, hidden), len(before)
    return [Token(token.id, token.start + shift) for token in tokens]

  def _tokens(self, text: str, hidden: Placeholders) -> list[Token]:
    """The tokens of a rendered text; only what the template wrote can become a control id."""
    tokens = []
    for part, start, forged in hidden.split(text):
      encode = self._plain if forged else self._parse
      found, skip = encode(part), 0
      if start:  # behind a newline, as transformers does: no space is put in front of it there
        behind, newline = encode("\n" + part), self._newline
        if behind.ids[: len(newline)] == newline:
          found, skip = behind, len(newline)
      begins = (start if forged else start + max(a - (skip > 0), 0) for a, _ in found.offsets[skip:])
      tokens += map(Token, found.ids[skip:], begins)
    return tokens

  def _parse(self, text: str) -> tokenizers.Encoding:
    return _encode(self._parser, text)

  def _plain(self, text: str) -> tokenizers.Encoding:
    found = _encode(self._plain_parser, text)
    for match in self._pattern.finditer(text):
      if match[0] != self.template.variables.get("unk_token") and self.control[match[0]] in found.ids:
        raise InputError(f"this tokenizer takes the plain text {match[0]!r} for a control token; leave it out")
    return found

  @cached_property
  def _parser(self) -> tokenizers.Tokenizer:
    return _open(self.json)

  @cached_property
  def _plain_parser(self) -> tokenizers.Tokenizer:
    plain = _open(self.json)  # of its own: threads share these, and the setting would reach them all
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
    return {f.name: getattr(self, f.name) for f in fields(self)}  # the library forgets its settings


def open_hf(path: epath.Path) -> HFTokenizer:
  """Opens a tokenizer.json, with the template and the special tokens' names from the files beside it.

  Raises:
    InputError: a file is missing or damaged, they disagree, or the template ends no turn with a control token.
  """
  folder, parser = read_folder(path), open_parser(path)
  try:
    return _assemble(folder, parser)
  except InputError as error:
    raise InputError(f"{path}: {error}") from error


def open_parser(path: epath.Path) -> tokenizers.Tokenizer:
  """What a tokenizer.json holds, as it is.

  Raises:
    InputError: it can not be read, or is damaged, or a pointer to the file.
  """
  text = read_text(path)
  if reason := first_bytes.foreign(text[: first_bytes.HEAD].encode()):
    raise InputError(f"{path}: no tokenizer.json of the tokenizers library: it {reason}")
  refused = "{}: no tokenizer.json of the tokenizers library ({}); fetch it again".format
  if reason := hf_json.flaw(text):
    raise InputError(refused(path, reason))
  with _failing(lambda reason: refused(path, reason)):
    parser = _open(text)
    parser.encode("text", add_special_tokens=False)
  if reason := hf_json.sparse(list(parser.get_vocab(with_added_tokens=True).values())):
    raise InputError(refused(path, reason))
  return parser


def _assemble(folder: Folder, parser: tokenizers.Tokenizer) -> HFTokenizer:
  template = JinjaTemplate(folder.template, folder.named)
  closing, between = _frame(template)
  _add(parser, folder.added)
  known = parser.get_added_tokens_decoder().values()
  written = placeholder.pattern({token.content for token in known if not token.content.isspace()})
  control = _mark_control(parser, {*folder.named.values(), *folder.special, *written.findall(between)})
  stop = placeholder.pattern(set(control)).search(closing)
  if not stop:
    where = " before {% endgeneration %}" if template.marks_turns else ""
    raise InputError(
      f"the chat template ends an assistant's turn with {closing!r}{where}, in which there is no special token; "
      "a model could not learn to stop: end the turn with one, such as eos_token"
    )
  ids = {name: _named(folder, parser, name) for name in ("bos", "eos", "pad")}
  stop_id = control[stop[0]]
  eos_id = stop_id if ids["eos"] is None else ids["eos"]
  bos_id, pad_id = (default if ids[name] is None else ids[name] for name, default in (("bos", -1), ("pad", eos_id)))
  special = bos_id, eos_id, pad_id, stop_id
  fingerprint = cache.digest(
    "hf", _VERSION, folder.tokenizer, template.source, template.variables, control, special, TODAY.isoformat()
  )
  return HFTokenizer(parser.to_str(), template, fingerprint, control, *special)


def _frame(template: JinjaTemplate) -> tuple[str, str]:
  """What a template writes after the last answer, and what between an answer and the next question."""
  question, answer = {"role": "user", "content": FIRST}, {"role": "assistant", "content": LAST}
  text, spans = template.render([question, answer])
  place = text.rfind(LAST)
  if place < 0:
    raise InputError("the chat template does not write what the assistant says; take another")
  end = len(text)
  if template.marks_turns:
    end = next((b for a, b in spans if a <= place < b), None)
    if end is None:
      raise InputError("the chat template's {% generation %} does not enclose what the assistant says; correct it")
  longer = template.render([question, answer, question]).text
  return text[place + 1 : end], longer.rpartition(FIRST)[0].rpartition(LAST)[2]


def _add(parser: tokenizers.Tokenizer, added: dict[int, dict[str, Any]]) -> None:
  """Gives added tokens the flags of tokenizer_config.json, as transformers does."""
  known = parser.get_added_tokens_decoder()
  for number, entry in sorted(added.items()):
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    token = tokenizers.AddedToken(**{name: entry[name] for name in names if name in entry})
    if repr(known.get(number)) != repr(token):
      (parser.add_special_tokens if token.special else parser.add_tokens)([token])
    if parser.token_to_id(token.content) != number:
      raise InputError(
        f"tokenizer_config.json has {token.content!r} as token {number}, tokenizer.json as "
        f"{parser.token_to_id(token.content)}; they are of different models"
      )


def _mark_control(parser: tokenizers.Tokenizer, texts: set[str]) -> dict[str, int]:
  """The control tokens by their texts: those that are special, and those of `texts` that the vocabulary has.

  All become special, and are found in a text as it stands: a normalizer could make one of what is none.
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
  return {text: parser.token_to_id(text) for text in sorted(control)}


def _named(folder: Folder, parser: tokenizers.Tokenizer, name: str) -> int | None:
  """The id of the special token called `name`, or None."""
  text = folder.named.get(f"{name}_token")
  if text is None:
    number = folder.generation.get(f"{name}_token_id")
    number = next(iter(number), None) if isinstance(number, list) else number
    return None if number == -1 else number
  if parser.token_to_id(text) is None:
    raise InputError(f"{name}_token is {text!r}, which tokenizer.json does not have; they are of different models")
  return parser.token_to_id(text)


def _open(json: str) -> tokenizers.Tokenizer:
  parser = tokenizers.Tokenizer.from_str(json)
  parser.no_truncation()  # files may hold settings of the training, such as "cut after 512"
  parser.no_padding()
  if getattr(parser.model, "dropout", None):  # merges left out at random
    parser.model.dropout = None
  return parser


def _encode(parser: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
  with _failing(lambda reason: f"the tokenizer cannot encode {text[:20]!r} ({reason})"):
    return parser.encode(text, add_special_tokens=False)


@contextlib.contextmanager
def _failing(line: Callable[[str], str]) -> Iterator[None]:
  """Makes an InputError of what the library raises: nothing narrower than Exception, and panics, which are none."""
  try:
    yield
  except BaseException as error:
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise InputError(line(" ".join(str(error).split())[:200])) from error
