"""A server of a tiny run, which all tests of the routes share."""

import asyncio
import contextlib
import threading

import jax
import pytest
import uvicorn

from alignjax.runs.run import load
from alignjax.serving.app import Server
from alignjax.serving.engine import Engine
from alignjax.serving.served import Served
from tests import smoke

SLOTS, CONTEXT = 8, 96


@pytest.fixture(scope="session")
def run():
  return load(smoke.finished("sft")[0])


@pytest.fixture(scope="session")
def engine(run):
  with jax.set_mesh(run.mesh):
    return Engine(run, SLOTS, CONTEXT)


@contextlib.contextmanager
def serving(server: Server):
  """The URL of a server that listens at a free port of this machine."""
  config = uvicorn.Config(server.application(), host="127.0.0.1", port=0, log_level="warning", access_log=False)
  socket = config.bind_socket()
  socket.listen(config.backlog)  # clients may come before the thread does
  uvicorn_server = uvicorn.Server(config)
  thread = threading.Thread(target=lambda: asyncio.run(uvicorn_server.serve([socket])), daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{socket.getsockname()[1]}"
  finally:
    uvicorn_server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def server(engine):
  return Server({"tiny": Served("tiny", "runs/tiny", engine)}, queue=40)


@pytest.fixture(scope="session")
def url(server):
  with serving(server) as address:
    yield address
