"""The routes: requests become jobs of the device's thread, and its pieces become answers, whole or as a stream."""

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from alignjax.errors import InputError
from alignjax.serving import metrics, page, reply, votes, wire
from alignjax.serving.device import ClosedError, Device, FullError
from alignjax.serving.engine import Ask, Handed, Job, Piece
from alignjax.serving.fields import Fields, RefusedError, parse
from alignjax.serving.served import Served

LARGEST_BODY = 16 * 2**20  # bytes
OPEN = ("/", "/health")  # paths that need no key: the page asks for it
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_log = logging.getLogger(__name__)


class _Gone(Exception):
  """The client does not wait any more."""


class Pending:
  """The jobs of one request, and their pieces in the order of their coming."""

  def __init__(self, device: Device, name: str, asks: Sequence[Ask]):
    """Queues the jobs; raises as `Device.submit`."""
    self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
    self.jobs = [Job(ask, self._receiver(index)) for index, ask in enumerate(asks)]
    self._left = len(self.jobs)
    device.submit(name, self.jobs)

  def _receiver(self, index: int) -> Callable[[Piece], None]:
    def receive(piece: Piece) -> None:
      self._pieces.put_nowait((index, piece))

    return receive

  async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
    """Iterates (number of the job, piece) until every job has ended."""
    while self._left:
      index, piece = await self._pieces.get()
      if piece.last:
        self._left -= 1
      yield index, piece

  def cancel(self) -> None:
    """Frees the slots of jobs that have not ended."""
    for job in self.jobs:
      job.cancelled = True


class Stream(StreamingResponse):
  """Server-sent events; however the response ends, its jobs end too, even if it never began.

  Attributes:
    at_end: called at the end.
  """

  def __init__(self, events: AsyncIterator[str], pending: Pending):
    super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
    self.at_end: Callable[[], None] | None = None
    self._pending = pending

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the events."""
    try:
      await super().__call__(scope, receive, send)
    except ClientDisconnect:
      pass
    finally:
      self._pending.cancel()
      if self.at_end:
        self.at_end()


class Server:
  """The routes of an application, and what they share.

  Attributes:
    models: by name; the first one answers where a request may leave the name out.
    device: with an engine of each model's name.
    requests: counts of the responses.
  """

  def __init__(
    self,
    models: Mapping[str, Served],
    queue: int,
    api_key: str = "",
    hosts: Sequence[str] = (),
    kept: votes.Votes | None = None,
  ):
    """Makes the server; `application` starts its thread.

    Args:
      models: by name, at least one.
      queue: the most completions that wait for a slot.
      api_key: that requests must carry; "": none.
      hosts: the names by which clients may call the server; (): any.
      kept: where votes of the chat page go; None: nowhere.
    """
    self.models = models
    self.device = Device({name: served.engine for name, served in models.items()}, queue, self._hand_over)
    self.requests = metrics.Requests()
    self._api_key = api_key
    self._hosts = hosts
    self._kept = kept
    self._html = page.content()
    self._loop: asyncio.AbstractEventLoop | None = None

  def application(self) -> Starlette:
    """Makes the ASGI application; the device's thread runs from its start to its end."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
      self._loop = asyncio.get_running_loop()
      self.device.start()
      yield
      await asyncio.to_thread(self.device.close)

    get: dict[str, Callable[[Request], Awaitable[Response]]] = {
      "/": self._page,
      "/health": self._health,
      "/metrics": self._metrics,
      "/v1/models": self._models,
      "/v1/models/{name:path}": self._model,
      "/tokenizer_info": self._tokenizer_info,
      "/votes": self._keeps_votes,
    }
    post: dict[str, Callable[[Request, Fields], Awaitable[Response]]] = {
      "/v1/chat/completions": self._chat,
      "/v1/completions": self._completions,
      "/tokenize": self._tokenize,
      "/detokenize": self._detokenize,
      "/votes": self._vote,
    }
    routes = [Route(path, self._answered(path, route), methods=["GET"]) for path, route in get.items()]
    for path, with_body in post.items():
      routes.append(Route(path, self._answered(path, self._read(with_body)), methods=["POST"]))
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})

  def _hand_over(self, pieces: Sequence[Handed]) -> None:
    """Gives pieces to their jobs in the thread of the event loop, with one wake-up for all of them."""
    if not pieces or self._loop is None:
      return

    def give() -> None:
      for job, piece in pieces:
        job.receive(piece)

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
      self._loop.call_soon_threadsafe(give)

  def _answered(
    self, path: str, route: Callable[[Request], Awaitable[Response]]
  ) -> Callable[[Request], Awaitable[Response]]:
    """Returns a route that checks who asks, turns errors into answers, and counts the responses."""

    async def answer(request: Request) -> Response:
      began = time.monotonic()
      response = await self._guarded(path, route, request)

      def note() -> None:
        self.requests.note(path, response.status_code, time.monotonic() - began)

      if isinstance(response, Stream):
        response.at_end = note
      else:
        note()
      return response

    return answer

  async def _guarded(self, path, route, request: Request) -> Response:
    try:
      self._check(path, request)
      return await route(request)
    except RefusedError as refused:
      kind = "invalid_request_error"
      if refused.status == 401:
        kind = "authentication_error"
      return _error(refused.status, str(refused), kind, refused.param, refused.code)
    except InputError as refused:
      return _error(400, str(refused), "invalid_request_error", code="invalid_request")
    except FullError as full:
      response = _error(429, str(full), "rate_limit_error", code="queue_full")
      response.headers["retry-after"] = str(full.seconds)
      return response
    except ClosedError as closed:
      return _error(503, str(closed), "server_error", code="unavailable")
    except (_Gone, ClientDisconnect):
      return Response(status_code=499)  # nobody reads it
    except Exception:
      _log.exception("%s failed", path)
      return _error(500, "the server failed; its log says why", "server_error", code="internal_error")

  def _check(self, path: str, request: Request) -> None:
    """Raises RefusedError unless the request comes to a name of this server, with its key if it has one.

    A page of another site can make a browser send requests here: to a name of its own that leads to this address, or as
    a form. Neither has the right host and a JSON body.
    """
    host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
    if self._hosts and host not in self._hosts:
      raise RefusedError(f"the host {host[:80]!r} is not served here", status=421, code="unknown_host")
    if not self._api_key or path in OPEN:
      return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), self._api_key.encode()):
      raise RefusedError("give the key of this server: Authorization: Bearer KEY", status=401, code="invalid_api_key")

  def _read(self, route: Callable[[Request, Fields], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Returns a route that reads the body as a JSON object."""

    async def read(request: Request) -> Response:
      kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
      if kind != "application/json":
        raise RefusedError("send the header Content-Type: application/json", status=415, code="unsupported_media_type")
      body = bytearray()
      async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
          raise RefusedError(f"the body has more than {LARGEST_BODY} bytes; send less", status=413, code="too_large")
      return await route(request, parse(bytes(body)))

    return read

  def _find(self, name: str) -> Served:
    """Returns the model of that name, the first one for ""."""
    if not name:
      return next(iter(self.models.values()))
    if name not in self.models:
      raise RefusedError(
        f"model {name[:80]!r} is not served here; use one of {', '.join(self.models)}",
        "model",
        status=404,
        code="model_not_found",
      )
    return self.models[name]

  async def _page(self, request: Request) -> Response:
    return HTMLResponse(self._html, headers=page.headers(self._html))

  async def _keeps_votes(self, request: Request) -> Response:
    return JSONResponse({"kept": self._kept is not None})

  async def _vote(self, request: Request, fields: Fields) -> Response:
    if self._kept is None:
      raise RefusedError("votes are not kept here; start the server with --votes FILE", status=404, code="not_found")
    await asyncio.to_thread(self._kept.add, votes.read(fields, self.models))
    return JSONResponse({"kept": True})

  async def _health(self, request: Request) -> Response:
    if self.device.broken:
      return JSONResponse({"status": self.device.broken}, 503)
    return JSONResponse({"status": "ok"})

  async def _metrics(self, request: Request) -> Response:
    return PlainTextResponse(
      metrics.text(self.device, self.requests), media_type="text/plain; version=0.0.4; charset=utf-8"
    )

  async def _models(self, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [served.record() for served in self.models.values()]})

  async def _model(self, request: Request) -> Response:
    return JSONResponse(self._find(request.path_params["name"]).record())

  async def _tokenizer_info(self, request: Request) -> Response:
    served = self._find(request.query_params.get("model", ""))
    tokenizer = served.tokenizer
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "stop": tokenizer.stop_id}
    info: dict[str, Any] = {"tokenizer_class": type(tokenizer).__name__, "model_max_length": served.engine.context}
    for name, number in ids.items():
      info[f"{name}_token"] = tokenizer.piece(number) if number >= 0 else None
      info[f"{name}_token_id"] = number if number >= 0 else None
    return JSONResponse(info | {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint})

  async def _tokenize(self, request: Request, fields: Fields) -> Response:
    asked = wire.tokenize(fields)
    served = self._find(asked.model)
    if asked.prompt is not None:
      ids = await asyncio.to_thread(served.encode, asked.prompt, asked.special)
    else:
      ids = await asyncio.to_thread(served.render, asked.messages, asked.tools, asked.generation)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": served.engine.context, "tokens": ids}
    if asked.texts:
      answer["token_strs"] = [served.token_text(number) for number in ids]
    return JSONResponse(answer)

  async def _detokenize(self, request: Request, fields: Fields) -> Response:
    asked = wire.detokenize(fields)
    return JSONResponse({"prompt": self._find(asked.model).tokenizer.decode(asked.tokens)})

  async def _chat(self, request: Request, fields: Fields) -> Response:
    asked = wire.chat(fields)
    served = self._find(asked.model)
    prompt = await asyncio.to_thread(served.render, asked.messages, asked.tools)  # a long text takes seconds
    if asked.schema:
      await asyncio.to_thread(served.check_schema, asked.schema)
    seed = _seed(asked.sampling)
    more = {"reported": asked.logprobs, "schema": asked.schema}
    if asked.tools:
      more["streamed"] = False  # where a call begins is known at its end
    asks = [served.ask(prompt, asked.sampling, seed, sample_id=k, **more) for k in range(asked.sampling.n)]
    pending = Pending(self.device, served.name, asks)
    usage = reply.Usage(len(prompt))
    if not asked.sampling.stream:
      answers = await _collect(request, pending)
      usage.completion = sum(len(answer.tokens) for answer in answers)
      choices = [
        reply.chat_choice(served, answer, asked.logprobs, asked.top_logprobs, asked.tools) for answer in answers
      ]
      form = reply.Form("chat.completion", "chatcmpl", served)
      return JSONResponse(form.record(choices, usage=usage.record()))
    begun: set[int] = set()

    def delta(index: int, piece: Piece) -> reply.Json:
      first = index not in begun
      begun.add(index)
      return reply.chat_delta(served, index, piece, first, asked.logprobs, asked.top_logprobs, asked.tools)

    form = reply.Form("chat.completion.chunk", "chatcmpl", served)
    return Stream(_events(form, pending, delta, usage, asked.sampling.usage), pending)

  async def _completions(self, request: Request, fields: Fields) -> Response:
    asked = wire.completion(fields)
    served = self._find(asked.model)
    prompts = await asyncio.to_thread(served.encode_all, asked.prompts)
    seed = _seed(asked.sampling)
    reported = asked.logprobs is not None
    top = max(1, asked.logprobs or 0) if asked.echo and reported else 0
    asks = [
      served.ask(prompt, asked.sampling, seed, prompt_id=place, sample_id=number, reported=reported, top_of_prompt=top)
      for place, prompt in enumerate(prompts)
      for number in range(asked.sampling.n)
    ]
    pending = Pending(self.device, served.name, asks)
    usage = reply.Usage(sum(map(len, prompts)))
    form = reply.Form("text_completion", "cmpl", served)
    if not asked.sampling.stream:
      answers = await _collect(request, pending)
      usage.completion = sum(len(answer.tokens) for answer in answers)
      choices = [
        reply.completion_choice(
          served, answer, asked.logprobs, prompts[answer.index // asked.sampling.n] if asked.echo else None
        )
        for answer in answers
      ]
      return JSONResponse(form.record(choices, usage=usage.record()))
    offsets = [0] * len(asks)

    def delta(index: int, piece: Piece) -> reply.Json:
      choice = reply.completion_delta(served, index, piece, offsets[index], asked.logprobs)
      offsets[index] += len(piece.text)
      return choice

    return Stream(_events(form, pending, delta, usage, asked.sampling.usage), pending)


def loopback_names() -> tuple[str, ...]:
  """Returns the names by which a program on this machine calls a server on it."""
  return _LOOPBACK


def _seed(sampling: wire.Sampling) -> int:
  """Returns the seed of a request, a new one if it names none."""
  if sampling.seed is None:
    return secrets.randbits(32)
  return sampling.seed


async def _collect(request: Request, pending: Pending) -> list[reply.Answer]:
  """Waits for all jobs of a request; raises _Gone, and cancels them, if the client goes away before."""
  answers = [reply.Answer(index) for index in range(len(pending.jobs))]

  async def collect() -> None:
    async for index, piece in pending.pieces():
      if piece.failure:
        raise ClosedError(piece.failure)
      answers[index].add(piece)

  async def watch() -> None:
    while (await request.receive())["type"] != "http.disconnect":
      pass

  tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(watch())]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if not tasks[0].done():
      raise _Gone
    tasks[0].result()
    return answers
  finally:
    pending.cancel()
    for task in tasks:
      task.cancel()


async def _events(
  form: reply.Form,
  pending: Pending,
  delta: Callable[[int, Piece], reply.Json],
  usage: reply.Usage,
  with_usage: bool,
) -> AsyncIterator[str]:
  """Yields the chunks of a stream as server-sent events; an error of the device ends it with a record of it."""
  async for index, piece in pending.pieces():
    if piece.failure:
      yield _event(reply.error(piece.failure, "server_error", code="internal_error"))
      return
    usage.completion += len(piece.tokens)
    more = {"usage": None} if with_usage else {}
    yield _event(form.record([delta(index, piece)], **more))
  if with_usage:
    yield _event(form.record([], usage=usage.record()))
  yield "data: [DONE]\n\n"


def _event(record: reply.Json) -> str:
  return f"data: {json.dumps(record, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _error(status: int, message: str, kind: str, param: str = "", code: str = "") -> Response:
  return JSONResponse(reply.error(message, kind, param, code), status)


async def _http_error(request: Request, error: Exception) -> Response:
  """Answers a path or a method that there is not."""
  assert isinstance(error, HTTPException)
  message = f"{request.method} {request.url.path}: {error.detail}"
  return _error(error.status_code, message, "invalid_request_error", code="not_found")
