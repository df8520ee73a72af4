"""A model as clients know it: its name, its engine, and the texts of its tokens."""

import functools
import os
import time
from collections.abc import Sequence
from typing import Any

from alignjax.data.field import Dialogue, Tool
from alignjax.errors import InputError
from alignjax.serving import calls
from alignjax.serving.engine import Ask, Engine
from alignjax.serving.fields import RefusedError
from alignjax.serving.wire import Sampling


class Served:
  """A run under the name that requests give.

  Attributes:
    name: in the field "model".
    source: the run directory or folder.
    engine: of the run.
    created: seconds since 1970.
  """

  def __init__(self, name: str, source: str, engine: Engine):
    self.name = name
    self.source = source
    self.engine = engine
    self.created = int(time.time())
    self.tokenizer = engine.run.tokenizer
    self.token_text = functools.lru_cache(maxsize=65536)(self._token_text)

  def encode(self, text: str, special: bool = True) -> list[int]:
    """Encodes a plain text, after the id of the beginning of a sequence if the tokenizer has one and it is wanted.

    The text of a special token by itself gives its id: programs ask for those by their texts.
    """
    if text in self.special:
      return [self.special[text]]
    ids = self.tokenizer.encode(text)
    if special and self.tokenizer.bos_id >= 0:
      ids = [self.tokenizer.bos_id, *ids]
    return ids

  def encode_all(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Encodes the prompts that are texts."""
    return [self.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]

  def render(self, messages: Dialogue, tools: Sequence[Tool] = (), generation: bool = True) -> list[int]:
    """Encodes a dialogue, up to the opening of the assistant's turn if `generation`.

    Raises:
      RefusedError: the template cannot write these messages, or has no place for tools.
    """
    try:
      return self.tokenizer.render(messages, add_generation_prompt=generation, tools=tools)
    except InputError as error:
      param = "messages"
      if tools:
        param = "tools"
      raise RefusedError(f"field '{param}': {error}", param) from error

  @functools.cached_property
  def special(self) -> dict[str, int]:
    """The ids of the tokens that begin, end and fill a sequence, by their texts."""
    tokenizer = self.tokenizer
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_id)
    return {self.tokenizer.piece(number): number for number in ids if number >= 0}

  @functools.cached_property
  def call_form(self) -> calls.Form | None:
    """How the model's template writes a call of a tool; None if it does not."""
    return calls.form_of(self.tokenizer)

  def _token_text(self, number: int) -> str:
    """Returns the text of one token; a control token's, which decoding leaves out, is its name in the vocabulary."""
    return self.tokenizer.decode([number]) or self.tokenizer.piece(number)

  def length(self, number: int) -> int:
    """Counts the characters of one token that are part of a text."""
    return len(self.tokenizer.decode([number]))

  def ask(self, prompt: Sequence[int], sampling: Sampling, seed: int, **more: Any) -> Ask:
    """Makes the `Ask` of one completion, without the `prompt_id` and `sample_id` that `more` has.

    Raises:
      RefusedError: the prompt is empty, holds an id that the model does not have, or leaves no room in the context.
    """
    context = self.engine.context
    if not prompt:
      raise RefusedError("the prompt has no tokens; write something", "prompt")
    vocab = self.engine.run.model.config.vocab
    if max(prompt) >= vocab:
      raise RefusedError(f"the prompt has the token id {max(prompt)}; those of the model end at {vocab - 1}", "prompt")
    most = sampling.max_tokens
    if most is None:
      most = context - len(prompt)
    if len(prompt) + max(most, 1) > context:
      raise RefusedError(
        f"the prompt has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}; together at most {context}: "
        "shorten the prompt, or ask for less",
        "max_tokens" if len(prompt) < context else "prompt",
        code="context_length_exceeded",
      )
    return Ask(
      prompt=tuple(prompt),
      max_tokens=most,
      seed=seed,
      temperature=sampling.temperature,
      top_k=sampling.top_k,
      top_p=sampling.top_p,
      stops=sampling.stops,
      **{"streamed": sampling.stream, **more},
    )

  def check_schema(self, schema: str) -> None:
    """Raises RefusedError if a JSON schema, as text, cannot be held here."""
    try:
      self.engine.grammars.check(schema)
    except InputError as error:
      raise RefusedError(f"field 'response_format': {error}", "response_format") from error

  def record(self) -> dict[str, Any]:
    """Makes the model's record of /v1/models."""
    return {
      "id": self.name,
      "object": "model",
      "created": self.created,
      "owned_by": "alignjax",
      "max_model_len": self.engine.context,
      "step": self.engine.run.step,
    }


def name_of(source: str) -> str:
  """Returns the name of a run that was given none: the last part of its path."""
  return os.path.basename(os.path.normpath(source)) or source
