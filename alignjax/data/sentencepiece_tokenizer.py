"""SentencePiece: training a tokenizer that is safe for chat, and loading one.

Encoding and decoding leave text unchanged, newlines, double spaces and
emoji included (byte pieces spell characters that the vocabulary lacks). The one exception is U+2581,
SentencePiece's own mark for a space, which is decoded as a space. The turn markers are control
pieces: ids to which no text is ever encoded, and which decoding leaves out.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import sentencepiece
from etils import epath

from alignjax.data import chat, first_bytes
from alignjax.data.field import Message, Tool
from alignjax.data.files import expand
from alignjax.data.format import read
from alignjax.data.source import open_source
from alignjax.errors import InputError, check_path
from alignjax.system import output, ranges, reading

MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PLAIN = ".txt"  # ending of files whose lines are texts instead of records
_LONGEST = 4096  # characters of a training line; SentencePiece silently skips lines that are too long


@dataclass(frozen=True)
class SentencePieceTokenizer:
  """Text to ids and back, and the chat template that goes with the ids.

  Attributes:
    processor: the SentencePiece model.
    template: renders dialogues.
    fingerprint: hex sha256 of the model file's content.
  """

  processor: sentencepiece.SentencePieceProcessor
  template: chat.Template
  fingerprint: str

  @property
  def identity(self) -> tuple[str, str]:
    """What decides the ids of a dialogue: the model's fingerprint and the template's name."""
    return self.fingerprint, self.template.name

  @property
  def vocab_size(self) -> int:
    return self.processor.vocab_size()

  @property
  def bos_id(self) -> int:
    return self.processor.bos_id()

  @property
  def eos_id(self) -> int:
    return self.processor.eos_id()

  @property
  def pad_id(self) -> int:
    """The id that fills rows, or the end of sequence in a model without one; no mask is ever derived from it."""
    pad = self.processor.pad_id()
    if pad < 0:
      return self.eos_id
    return pad

  @property
  def stop_id(self) -> int:
    """The id that ends an assistant's turn."""
    return self.template.stop_id

  def encode(self, text: str) -> list[int]:
    """Encodes plain text; the result never has a control id."""
    return self.processor.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    """Decodes ids to text, without control ids and ids of no piece."""
    known = range(self.vocab_size)  # a model's vocabulary may be padded to more
    return self.processor.decode([i for i in map(int, ids) if i in known and i not in self._control])

  def piece(self, number: int) -> str:
    """Returns the name of an id in the vocabulary, such as that of a control token; "<7>" of one without a name."""
    if number >= self.vocab_size:  # a model's vocabulary may be padded to more
      return f"<{number}>"
    return self.processor.id_to_piece(number)

  def render(
    self, messages: list[Message], add_generation_prompt: bool = False, tools: Sequence[Tool] = ()
  ) -> list[int]:
    """Encodes a dialogue, ready for a completion if `add_generation_prompt`."""
    chat.refuse_tools(self.template, tools)
    return chat.render(self.template, self.encode, messages, add_generation_prompt)

  def complete(
    self, prompt: list[Message], messages: list[Message], tools: Sequence[Tool] = ()
  ) -> tuple[list[int], list[int]]:
    """Encodes a completion after `render(prompt, add_generation_prompt=True)`: (ids, loss mask)."""
    chat.refuse_tools(self.template, tools)
    return chat.complete(self.template, self.encode, messages)

  @cached_property
  def _control(self) -> frozenset[int]:
    return frozenset(filter(self.processor.is_control, range(self.vocab_size)))


def open_sentencepiece(path: epath.PathLike) -> SentencePieceTokenizer:
  """Opens a SentencePiece model: one that `train_tokenizer` wrote, or Mistral's v3.

  Raises:
    InputError: the file is missing, is no SentencePiece model, or has the control pieces of no known chat template.
  """
  try:
    model = reading.read_bytes(path)
  except OSError as error:
    raise InputError(
      f"{path}: the tokenizer cannot be read ({error.strerror}); "
      "give a SentencePiece .model file, a tokenizer.json, or a folder with one of them"
    ) from error
  if reason := first_bytes.foreign(model[: first_bytes.HEAD]):
    raise InputError(f"{path}: no SentencePiece model: it {reason}")
  try:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)  # the constructor treats an empty file as no file
  except RuntimeError as error:
    raise InputError(f"{path}: no SentencePiece model, or a damaged one; fetch it again or train one") from error
  control = filter(processor.is_control, range(processor.vocab_size()))
  template = chat.find_template({processor.id_to_piece(i): i for i in control})
  if template is None:
    known = ", ".join(chat.TEMPLATES)
    raise InputError(
      f"{path}: lacks the control pieces of every known chat template ({known}); train a tokenizer, or give the "
      "model's tokenizer.json with its chat template"
    )
  return SentencePieceTokenizer(processor, template, hashlib.sha256(model).hexdigest())


def train_tokenizer(texts: Iterable[str], path: str | os.PathLike, vocab_size: int = 8192) -> SentencePieceTokenizer:
  """Trains a byte-pair tokenizer with our turn markers and writes it to `path`; the same texts give the same file.

  Args:
    texts: any strings, for example `read_texts("pairs.jsonl")`. Memory grows with their total size.
    path: the .model file, written whole or not at all; `~` is the home folder.
    vocab_size: the number of all pieces: 8 control pieces, 256 bytes, the newline and the learned ones. A
      multiple of 128 suits accelerators.

  Raises:
    InputError: there is no text, too little of it for so large a vocabulary, or the vocabulary is too small.
  """
  if isinstance(texts, str | os.PathLike):
    raise InputError(f"{texts}: train_tokenizer takes texts, not a path; pass read_texts(path)")
  if not isinstance(texts, Iterable) or isinstance(texts, bytes):
    raise InputError(f"texts is {texts!r:.60}; give strings, such as those of read_texts(path)")
  check_path("path", path)
  ranges.check("vocab_size", vocab_size, ranges.Count)
  path = os.path.expanduser(path)
  output.check_file(path, "--out")
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_lines(texts),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      pad_id=0,
      bos_id=1,
      eos_id=2,
      unk_id=3,
      control_symbols=list(MARKERS),
      user_defined_symbols=["\n"],
      byte_fallback=True,
      character_coverage=0.9995,
      split_digits=True,
      # The defaults would fold Unicode, drop newlines and double spaces, and put a space in front.
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      max_sentence_length=8 * _LONGEST,  # bytes
      num_threads=1,  # the number is written into the model; BPE is fast with one
      minloglevel=2,
    )
  except RuntimeError as error:
    reason = str(error).rpartition("] ")[2].strip() or "there is no text to learn from"
    raise InputError(f"{path}: these texts give no tokenizer of {vocab_size} pieces: {reason}") from error
  output.write(path, model.getvalue(), "--out")
  return open_sentencepiece(path)


def read_texts(path: str | os.PathLike | Sequence, cache: str = "") -> Iterator[str]:
  """Iterates the texts to train a tokenizer on: each message's content in files of records, each line of .txt files.

  Args:
    path: a file, a folder of `datasets.save_to_disk`, a glob, several with commas between, or a list of such.
    cache: folder for the indices of large files; "": $ALIGNJAX_CACHE or ~/.cache/alignjax.

  Raises:
    InputError: while it iterates: a file is missing, unreadable, of an unknown format, or has no records.
  """
  for name in expand(path):
    if name.endswith(PLAIN):
      yield from _plain_lines(name)
      continue
    source = open_source([name], cache)
    for i in range(len(source)):
      example = read(source, i, "text")
      for dialogue in (example.prompt, *example.completions):
        yield from (message["content"] for message in dialogue)


def _plain_lines(name: str) -> Iterator[str]:
  """Iterates the lines of a text file, without their ends."""
  try:
    reading.check(name)
    with open(name, "rb") as file:
      if reason := first_bytes.foreign(file.read(first_bytes.HEAD)):
        raise InputError(f"{name}: {reason}")
    with open(name, encoding="utf-8-sig") as file:
      for line in file:
        yield line.removesuffix("\n")
  except UnicodeDecodeError as error:
    raise InputError(f"{name}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
  except OSError as error:
    raise InputError(f"{name}: cannot be read ({error.strerror or error})") from error


def _lines(texts: Iterable[str]) -> Iterator[str]:
  """Splits texts into lines of at most _LONGEST characters."""
  for text in texts:
    if not isinstance(text, str):
      raise InputError(f"texts: {text!r:.60} is a {type(text).__name__}; give strings")
    for line in text.split("\n"):
      for start in range(0, len(line), _LONGEST):
        yield line[start : start + _LONGEST]
