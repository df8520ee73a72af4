"""Completions that fit a JSON schema: before each token, the ones with which the text can still become such a value."""

import functools
import json
from typing import Any

import numpy as np

from alignjax.data.hf_tokenizer import HFTokenizer
from alignjax.data.tokenizer import Tokenizer
from alignjax.errors import InputError

_COMPACT: Any = {"whitespace_flexible": False}  # a weak model would go on with blanks until it is cut


class Grammars:
  """The schemas of one model's vocabulary; made once, it takes a second for a large one."""

  def __init__(self, tokenizer: Tokenizer, vocab: int):
    """Takes the model's `vocab`, which may be padded to more than the tokenizer's.

    Raises:
      InputError: the package llguidance is not installed.
    """
    try:
      import llguidance
    except ImportError as error:
      raise InputError("a schema needs the package llguidance; pip install 'alignjax[serve]' on the server") from error
    self._library = llguidance
    self._words = -(-vocab // 32)
    source: Any = _Vocabulary(tokenizer)
    if isinstance(tokenizer, HFTokenizer):
      source = tokenizer.json
    else:
      source = llguidance.TokenizerWrapper(source)
    self._tokenizer = llguidance.LLTokenizer(source, n_vocab=vocab, eos_token=tokenizer.stop_id)
    self._compiled = functools.lru_cache(maxsize=256)(self._compile)

  def check(self, schema: str) -> None:
    """Raises InputError if a JSON schema is none, or has a part that cannot be held."""
    self._compiled(schema)

  def begin(self, schema: str) -> "Growing":
    """Makes the state of a completion that has no token yet."""
    return Growing(self._library.LLMatcher(self._tokenizer, self._compiled(schema), log_level=0), self._words)

  def _compile(self, schema: str) -> str:
    try:
      grammar = self._library.LLMatcher.grammar_from_json_schema(schema, defaults=_COMPACT)
      flaw = self._library.LLMatcher.validate_grammar(grammar, self._tokenizer)
    except ValueError as error:
      flaw = str(error)
    if flaw:
      raise InputError(f"the schema cannot be held: {' '.join(flaw.split())[:300]}")
    return grammar


class Growing:
  """A completion that follows a grammar, token by token."""

  def __init__(self, matcher: Any, words: int):
    self._matcher = matcher
    self._words = words

  def allowed(self) -> np.ndarray:
    """Returns a bit for each token that may come next, int32 [ceil(V / 32)], the lowest first."""
    return np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: self._words]

  def add(self, tokens: list[int]) -> bool:
    """Adds tokens that were drawn; returns whether the value is complete and nothing can follow."""
    self._matcher.consume_tokens(tokens)
    return self._matcher.is_stopped()


class _Vocabulary:
  """The bytes of a SentencePiece model's tokens, as llguidance reads them."""

  def __init__(self, tokenizer: Any):
    processor = getattr(tokenizer, "processor", None)
    if processor is None:
      return
    self.eos_token_id = tokenizer.stop_id
    self.bos_token_id = None
    numbers = range(processor.vocab_size())
    self.special_token_ids = [n for n in numbers if processor.is_control(n) or processor.is_unknown(n)]
    special = {*self.special_token_ids}
    self.tokens = [self._bytes(processor, n, n in special) for n in numbers]
    self._encode = tokenizer.encode

  def _bytes(self, processor: Any, number: int, special: bool) -> bytes:
    piece = processor.id_to_piece(number)
    if processor.is_byte(number):
      return bytes([int(piece[1:-1], 16)])
    if special:
      return piece.encode()
    return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

  def __call__(self, text: str) -> list[int]:
    return self._encode(text)


def text_of(schema: Any) -> str:
  """Returns a schema as JSON text, the same for equal ones."""
  return json.dumps(schema, sort_keys=True)
