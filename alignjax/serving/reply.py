"""The answers of the OpenAI wire, as JSON values."""

import dataclasses
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from alignjax.data.field import Tool
from alignjax.serving import calls
from alignjax.serving.engine import Piece, TokenScore
from alignjax.serving.served import Served

Json = dict[str, Any]


@dataclasses.dataclass
class Usage:
  """The tokens of a request."""

  prompt: int = 0
  completion: int = 0

  def record(self) -> Json:
    """Makes the record "usage"."""
    return {
      "prompt_tokens": self.prompt,
      "completion_tokens": self.completion,
      "total_tokens": self.prompt + self.completion,
    }


@dataclasses.dataclass
class Answer:
  """All that one job has got.

  Attributes:
    index: its place among the choices.
    text: of the completion.
    tokens: of the completion, the stop token included.
    scores: of these tokens.
    prompt_scores: of the prompt's tokens but the first.
    finish: "stop" or "length"; "" before the end.
  """

  index: int
  text: str = ""
  tokens: Sequence[int] = ()
  scores: list[TokenScore] = dataclasses.field(default_factory=list)
  prompt_scores: list[TokenScore] = dataclasses.field(default_factory=list)
  finish: str = ""

  def add(self, piece: Piece) -> None:
    """Adds what a piece brings."""
    self.text += piece.text
    self.scores += piece.scores
    self.prompt_scores += piece.prompt_scores
    if piece.finish:
      self.finish = piece.finish
      self.tokens = piece.tokens


class Form:
  """The head of an answer's records: the same for a whole answer and for each chunk of a stream."""

  def __init__(self, kind: str, prefix: str, served: Served):
    """`kind` is the record's "object"; `prefix` begins its id."""
    self.kind = kind
    self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}

  def record(self, choices: Sequence[Json], **more: Any) -> Json:
    """Makes a record with these choices."""
    return {**self.head, "object": self.kind, "choices": list(choices), **more}


def error(message: str, kind: str, param: str = "", code: str = "") -> Json:
  """Makes the record of an error."""
  return {"error": {"message": message, "type": kind, "param": param or None, "code": code or None}}


def chat_choice(served: Served, answer: Answer, logprobs: bool, top: int, tools: Sequence[Tool] = ()) -> Json:
  """Makes a choice of a chat completion; calls of the `tools` that were offered are taken out of its text."""
  message, finish = _spoken(served, answer.text, answer.finish, tools)
  choice: Json = {
    "index": answer.index,
    "message": {"role": "assistant", **message},
    "finish_reason": finish,
    "logprobs": None,
  }
  if logprobs:
    choice["logprobs"] = chat_logprobs(served, answer.scores, top)
  return choice


def _spoken(served: Served, text: str, finish: str, tools: Sequence[Tool]) -> tuple[Json, str]:
  """Returns the content and the calls of a message, and why it ended."""
  form = None
  if tools and finish == "stop":
    form = served.call_form
  if form is None:
    return {"content": text}, finish
  content, found = calls.read(form, text, calls.names_of(tools))
  if not found:
    return {"content": text}, finish
  return {"content": content or None, "tool_calls": found}, "tool_calls"


def chat_delta(
  served: Served, index: int, piece: Piece, first: bool, logprobs: bool, top: int, tools: Sequence[Tool] = ()
) -> Json:
  """Makes a choice of a chat completion's chunk; with tools, one piece has the whole answer."""
  delta: Json = {}
  if first:
    delta = {"role": "assistant", "content": ""}
  message, finish = _spoken(served, piece.text, piece.finish, tools)
  if "tool_calls" in message:
    message["tool_calls"] = [{"index": place, **call} for place, call in enumerate(message["tool_calls"])]
  if piece.text:
    delta |= message
  choice: Json = {"index": index, "delta": delta, "finish_reason": finish or None, "logprobs": None}
  if logprobs:
    choice["logprobs"] = chat_logprobs(served, piece.scores, top)
  return choice


def chat_logprobs(served: Served, scores: Sequence[TokenScore], top: int) -> Json:
  """Makes the log-probs of a chat completion's tokens."""

  def shown(token: int, logp: float) -> Json:
    text = served.token_text(token)
    whole = "\N{REPLACEMENT CHARACTER}" not in text
    return {"token": text, "logprob": logp, "bytes": list(text.encode()) if whole else None}

  content = [
    {**shown(score.token, score.logp), "top_logprobs": [shown(*likely) for likely in score.top[:top]]}
    for score in scores
  ]
  return {"content": content, "refusal": None}


def completion_choice(served: Served, answer: Answer, logprobs: int | None, echoed: Sequence[int] | None) -> Json:
  """Makes a choice of a completion.

  Args:
    served: the model.
    answer: of the job.
    logprobs: the number of likeliest tokens beside each; None: no log-probs.
    echoed: the prompt, if it is a part of the answer.
  """
  text = answer.text
  lines = list(_lines(served, [*answer.prompt_scores, *answer.scores], logprobs or 0))
  if echoed is not None:
    text = served.tokenizer.decode(echoed) + text
    lines = [_Line(served.token_text(echoed[0]), served.length(echoed[0]), None, None), *lines]
  choice: Json = {"index": answer.index, "text": text, "finish_reason": answer.finish, "logprobs": None}
  if logprobs is not None:
    choice["logprobs"] = _legacy(lines, 0)
  return choice


def completion_delta(served: Served, index: int, piece: Piece, offset: int, logprobs: int | None) -> Json:
  """Makes a choice of a completion's chunk, whose text begins `offset` characters after that of the completion."""
  choice: Json = {"index": index, "text": piece.text, "finish_reason": piece.finish or None, "logprobs": None}
  if logprobs is not None:
    choice["logprobs"] = _legacy(list(_lines(served, piece.scores, logprobs)), offset)
  return choice


class _Line(NamedTuple):
  """A token's text, how much of it is in the completion's (nothing of a control token's name), its log-prob, and those
  of the likeliest tokens and itself by their texts; None: not known.
  """

  text: str
  length: int
  logp: float | None
  likely: dict[str, float] | None


def _lines(served: Served, scores: Sequence[TokenScore], top: int) -> Iterator[_Line]:
  """Yields a line for each token.

  Several tokens may have one text, such as parts of a character; the likeliest of them counts.
  """
  for score in scores:
    likely: dict[str, float] = {}
    for token, logp in [*score.top[:top], (score.token, score.logp)]:
      likely.setdefault(served.token_text(token), logp)
    yield _Line(served.token_text(score.token), served.length(score.token), score.logp, likely)


def _legacy(lines: Sequence[_Line], offset: int) -> Json:
  """Makes the log-probs of a completion's tokens, in four lists."""
  offsets = []
  for line in lines:
    offsets.append(offset)
    offset += line.length
  return {
    "tokens": [line.text for line in lines],
    "token_logprobs": [line.logp for line in lines],
    "top_logprobs": [line.likely for line in lines],
    "text_offset": offsets,
  }
