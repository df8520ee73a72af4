"""The interface of tokenizers, and the opening of one from its file or folder.

Two kinds: SentencePiece models with a template of ours (`sentencepiece_tokenizer.py`, `chat.py`), and
Hugging Face's tokenizer.json with the chat template that a model came with (`hf_tokenizer.py`).
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol

from etils import epath

from alignjax.data.field import Message, Tool
from alignjax.data.hf_tokenizer import open_hf, open_parser
from alignjax.data.sentencepiece_tokenizer import open_sentencepiece
from alignjax.errors import InputError
from alignjax.system import hub

PROBE = "One text, written in words that tokenizers of other models cut in other ways: 12 + 30 = 42, isn't it?"
_FILES = ("tokenizer.json", "tokenizer.model")
SAME = 16  # of the last ids of that text


class HasVocabulary(Protocol):
  """What of a tokenizer decides the shapes of a model."""

  @property
  def vocab_size(self) -> int:
    """The largest id + 1."""


class Tokenizer(HasVocabulary, Protocol):
  """Text to ids and back, and the chat template that goes with the ids."""

  @property
  def template(self) -> Any:
    """The rendering of dialogues: a dataclass of plain values."""

  @property
  def fingerprint(self) -> str:
    """Hex sha256 of what decides the ids; a checkpoint is used only with the tokenizer of its training."""

  @property
  def identity(self) -> tuple[str, str]:
    """The fingerprint and the template's name."""

  @property
  def bos_id(self) -> int:
    """The id of the beginning of a sequence, -1 if there is none."""

  @property
  def eos_id(self) -> int:
    """The id of the end of a sequence."""

  @property
  def pad_id(self) -> int:
    """The id that fills rows, or `eos_id` if there is none; no mask is ever derived from it."""

  @property
  def stop_id(self) -> int:
    """The id that ends an assistant's turn."""

  def encode(self, text: str) -> list[int]:
    """Encodes plain text; the result never has a control id."""

  def decode(self, ids: Sequence[int]) -> str:
    """Decodes ids to text, without control ids."""

  def piece(self, number: int) -> str:
    """Returns the name of an id in the vocabulary, such as that of a control token."""

  def render(
    self, messages: list[Message], add_generation_prompt: bool = False, tools: Sequence[Tool] = ()
  ) -> list[int]:
    """Encodes a dialogue, ready for a completion if `add_generation_prompt`.

    Raises:
      InputError: the template cannot write these messages or tools.
    """

  def complete(
    self, prompt: list[Message], messages: list[Message], tools: Sequence[Tool] = ()
  ) -> tuple[list[int], list[int]]:
    """Encodes a completion after `render(prompt, add_generation_prompt=True)`: (ids, loss mask of 1 and 0).

    Raises:
      InputError: the template cannot write these messages or tools, or not after that prompt.
    """


def check_ids(tokenizer: Tokenizer, folder: str) -> None:
  """Raises InputError if the tokenizer.json in a folder of weights, whose ids the embeddings use, has other ids."""
  path = hub.local(folder) / "tokenizer.json"
  if not path.exists():
    return
  theirs = open_parser(path).encode(PROBE, add_special_tokens=False).ids
  # Libraries differ in the space before the first word, so the first ids do not count.
  if theirs[-SAME:] != tokenizer.encode(PROBE)[-SAME:]:
    raise InputError(f"data.tokenizer: gives other ids than {path}, which belongs to the weights beside it; name that")


_SLOW = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json", "tiktoken.model")  # of tokenizers of other libraries


def _remedy(folder: epath.Path) -> str:
  """The end of the message about a folder without a readable tokenizer: what to do about it."""
  names = {path.name for path in folder.iterdir()}
  if others := [name for name in _SLOW if name in names]:
    return (
      f"{' and '.join(others)} alone are not read: save it once more with transformers' "
      "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )
  models = sorted(name for name in names if name.endswith(".model"))
  if models:
    return f"name the file: {folder / models[0]}"
  inner = sorted(path.name for path in folder.iterdir() if any((path / name).exists() for name in _FILES))
  if inner:
    return f"{folder / inner[0]} holds one"
  return "give the one that holds them"


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
  """Opens a SentencePiece .model file, a tokenizer.json, or a folder with one of them (tokenizer.json first).

  The folder may be on the hub: hf://org/name.

  Raises:
    InputError: it does not exist, is damaged, or has no chat template.
  """
  if not os.fspath(path):
    raise InputError("no tokenizer is named; give a SentencePiece .model file, a tokenizer.json, or their folder")
  file = hub.local(os.fspath(path))
  if file.is_dir():
    folder = file
    file = next((folder / name for name in _FILES if (folder / name).exists()), None)
    if file is None:
      raise InputError(f"{path}: neither {' nor '.join(_FILES)} is in this folder; {_remedy(folder)}")
    hub.check_link(file)
  if not file.exists():
    raise InputError(
      f"{path}: the tokenizer cannot be read (no such file); {hub.hint(os.fspath(path))}"
      "give a SentencePiece .model file, a tokenizer.json, or a folder with one of them"
    )
  if file.suffix == ".json":
    return open_hf(file)
  return open_sentencepiece(file)
