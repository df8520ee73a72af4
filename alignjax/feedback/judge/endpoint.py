"""A model behind an OpenAI-compatible endpoint as a judge.

A call that fails is repeated with growing pauses; there is a limit on the calls at one time, and on those of a minute.
An answer is kept in the cache of data, under the content of its request, so that no question is paid for twice.

A call that times out, after all repeats, is null: it is counted, and not cached. An endpoint that cannot be reached, is
overloaded throughout, or refuses the request ends the work; the same command continues.
"""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from alignjax.data import cache as cached
from alignjax.errors import InputError
from alignjax.feedback.judge.judge import DEFAULT, Settings
from alignjax.feedback.judge.rubric import MARK, Question, Rubric
from alignjax.feedback.judge.verdict import Answer
from alignjax.system import output

_LIKELIEST = 20  # tokens whose log-probabilities are asked for: the most that endpoints give
_VERSION = 1  # of the cached answers


class EndpointJudge:
  """A judge behind an endpoint; the environment variable OPENAI_API_KEY has the key, if one is needed.

  Args:
    url: such as http://localhost:8000/v1.
    model: its name there.
    settings: how it is asked.
    cache: folder of the cache; "": the default.

  Raises:
    InputError: the client's library is missing.
  """

  def __init__(self, url: str, model: str, settings: Settings = DEFAULT, cache: str = ""):
    try:
      import openai
    except ImportError as error:
      raise InputError("a judge behind an endpoint needs openai: pip install 'alignjax[judge]'") from error
    self.name = f"openai:{url}#{model}"
    self._openai = openai
    self._model = model
    self._url = url
    self._settings = settings
    self._folder = cached.directory(cache) / "judge"
    self._client = openai.OpenAI(
      base_url=url,
      api_key=os.environ.get("OPENAI_API_KEY") or "none",
      max_retries=settings.retries,
      timeout=settings.timeout,
    )
    self._pace = _Pace(settings.per_minute)

  @property
  def identity(self) -> dict[str, Any]:
    """What the answers depend on, as far as it is known here."""
    asked = ("temperature", "max_tokens", "seed", "logprobs")
    return {"url": self._url, "model": self._model} | {name: getattr(self._settings, name) for name in asked}

  def ask(self, questions: Sequence[Question]) -> list[Answer]:
    """Answers each question; equal ones are asked once.

    Raises:
      InputError: the endpoint cannot be reached, or refuses.
    """
    requests = [self._request(question) for question in questions]
    keys = [cached.digest("judge", _VERSION, self._url, request) for request in requests]
    distinct = {
      key: (request, question.rubric) for key, request, question in zip(keys, requests, questions, strict=True)
    }
    with ThreadPoolExecutor(max_workers=self._settings.concurrency) as threads:
      done = list(threads.map(lambda key: self._answer(key, *distinct[key]), distinct))
    answers = dict(zip(distinct, done, strict=True))
    return [answers[key] for key in keys]

  def _request(self, question: Question) -> dict[str, Any]:
    request: dict[str, Any] = {
      "model": self._model,
      "messages": question.rubric.messages(question),
      "temperature": self._settings.temperature,
      "seed": self._settings.seed + question.sample,
      "max_tokens": self._settings.max_tokens if question.rubric.reasoning else 8,
    }
    if self._settings.logprobs:
      request |= {"logprobs": True, "top_logprobs": _LIKELIEST}
    return request

  def _answer(self, key: str, request: dict[str, Any], rubric: Rubric) -> Answer:
    path = self._folder / key[:2] / f"{key}.json"
    said = _kept(path)
    if said is None:
      said = self._call(request)
      if said is None:
        return Answer(None)
      output.write_json(path, said)
    return Answer(said["text"], _label_logps(rubric, said["tokens"]))

  def _call(self, request: dict[str, Any]) -> dict[str, Any] | None:
    """Calls the endpoint; returns the text and the likeliest tokens at each place, or None after a time-out."""
    self._pace.wait()
    openai = self._openai
    try:
      choice = self._client.chat.completions.create(**request).choices[0]
    except openai.APITimeoutError:
      return None
    except openai.APIConnectionError as error:
      raise InputError(f"{self._url}: cannot be reached ({_line(error)}); run the same command again") from error
    except openai.APIStatusError as error:
      remedy = "run the same command again later"
      if error.status_code in (401, 403):
        remedy = "set OPENAI_API_KEY"
      elif error.status_code in (400, 404, 422):
        remedy = "check the URL, the model's name and its limits; --no-logprobs asks for text alone"
      raise InputError(f"{self.name}: status {error.status_code} ({_line(error)}); {remedy}") from error
    tokens = []
    if choice.logprobs and choice.logprobs.content:
      for place in choice.logprobs.content:
        likeliest = [[one.token, one.logprob] for one in place.top_logprobs]
        tokens.append([place.token, likeliest or [[place.token, place.logprob]]])
    return {"text": choice.message.content or "", "tokens": tokens}


def parse_name(name: str) -> tuple[str, str]:
  """Returns (URL, model) of "openai:URL#MODEL".

  Raises:
    InputError: it is not of this form.
  """
  url, sharp, model = name.removeprefix("openai:").rpartition("#")
  if not sharp or not model or not url.startswith(("http://", "https://")):
    raise InputError(f"--judge={name}: write openai:URL#MODEL, as in openai:http://localhost:8000/v1#my-model")
  return url, model


class _Pace:
  """Spreads calls evenly over a minute; 0 a minute is no limit."""

  def __init__(self, per_minute: int):
    self._gap = 60 / per_minute if per_minute else 0.0
    self._next = 0.0
    self._lock = threading.Lock()

  def wait(self) -> None:
    """Returns when the next call may begin."""
    with self._lock:
      now = time.monotonic()
      begin = max(now, self._next)
      self._next = begin + self._gap
    time.sleep(begin - now)


def _kept(path: Path) -> dict[str, Any] | None:
  """Returns an answer of the cache; None if there is none, or it is damaged."""
  if not path.exists():
    return None
  try:
    return output.read_json(path)
  except output.DamagedError:
    return None


def _label_logps(rubric: Rubric, tokens: Sequence[Any]) -> dict[str, float] | None:
  """Returns the nats of each label at the verdict's token; None if that is not known.

  A label that is not among the likeliest tokens gets the least of these: it is at most as likely. Labels of which one
  begins another, such as 1 and 10, cannot be told apart by a token; their text is read.
  """
  if any(one != other and other.startswith(one) for one in rubric.labels for other in rubric.labels):
    return None
  place = _verdict_place(rubric, [token for token, _ in tokens])
  if place is None:
    return None
  likeliest = tokens[place][1]
  found: dict[str, list[float]] = {}
  for token, logp in likeliest:
    if token.strip() in rubric.labels:
      found.setdefault(token.strip(), []).append(max(logp, -1e4))  # some endpoints write -9999 or less for 0
  if not found:
    return None
  least = min(logp for _, logp in likeliest)
  logps = {}
  for label in rubric.labels:
    logps[label] = max(least, -1e4)
    if label in found:
      logps[label] = float(np.logaddexp.reduce(found[label]))
  return logps


def _verdict_place(rubric: Rubric, tokens: Sequence[str]) -> int | None:
  """Returns the number of the token that is the verdict: the first with a character, behind "Verdict:" if asked for."""
  begin = 0
  if rubric.reasoning:
    text = "".join(tokens)
    if text.count(MARK) != 1:
      return None
    begin = text.index(MARK) + len(MARK)
  end = 0
  for number, token in enumerate(tokens):
    start = end
    end += len(token)
    if start >= begin and token.strip():
      return number
  return None


def _line(error: BaseException) -> str:
  return " ".join(str(error).split())[:200]
