"""Serves runs to OpenAI's clients: `alignjax serve`."""

import os
from typing import NamedTuple

from alignjax.errors import InputError
from alignjax.serving import models
from alignjax.system import hosts, ranges
from alignjax.system.ranges import Count, Port

KEY = "ALIGNJAX_SERVE_KEY"  # environment variable: the key, which a command line would show to other users
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Options(NamedTuple):
  """How runs are served.

  Attributes:
    host: the address to listen at.
    port: 0 takes a free one.
    slots: completions of a model that are decoded together.
    queue: completions that may wait for a slot; a request beyond is answered with 429.
    context: the most tokens of a prompt with its completion; None: the model's.
    api_key: that requests must carry; "": none.
    votes: file that gets the votes of the chat page; "": none.
  """

  host: str = "127.0.0.1"
  port: Port = 8000
  slots: Count = 32
  queue: Count = 256
  context: int | None = None
  api_key: str = ""
  votes: str = ""


def serve(workdirs: list[str], options: Options, step: int | None = None) -> None:
  """Serves runs until it is interrupted.

  Args:
    workdirs: run directories or Hugging Face folders, each also as NAME=DIRECTORY.
    options: see there.
    step: of the checkpoint, if there is one run.

  Raises:
    InputError: an address that others reach without a key, or as `models.open_models`.
  """
  ranges.check_record("", options)
  key = options.api_key or os.environ.get(KEY, "")
  is_private = options.host in _LOOPBACK
  if not is_private and not key:
    raise InputError(
      f"--host={options.host}: whoever reaches this address could use the model; add --api-key KEY, or set {KEY}"
    )
  sources = models.named(workdirs)
  try:
    import uvicorn

    from alignjax.serving import app, votes
  except ImportError as error:
    raise InputError(f"serve needs the package {error.name}; pip install 'alignjax[serve]'") from error
  kept = None
  if options.votes:
    kept = votes.Votes(options.votes)  # before a model is loaded
  served = models.open_models(sources, options.slots, options.context, step)
  names: tuple[str, ...] = ()
  if is_private:
    names = app.loopback_names()
  server = app.Server(served, options.queue, key, names, kept)
  config = uvicorn.Config(
    server.application(),
    host=options.host,
    port=options.port,
    log_level="warning",
    access_log=False,
    timeout_graceful_shutdown=5,
  )
  sockets = [config.bind_socket()]
  sockets[0].listen(config.backlog)  # whoever reads the next line may connect
  port = sockets[0].getsockname()[1]
  hosts.say(f"serving {', '.join(served)} at http://{options.host}:{port}/v1, with a page to chat at")
  uvicorn.Server(config).run(sockets)
