"""The code's process: runs the code as a module, then serves the tests' requests."""

import builtins
import functools
import os
import sys
import types

import kernel
import peer


def main(pipe: peer.Pipe, reached: list[str], guarded: bool) -> None:
  """Reports the parts of isolation that hold, receives the code, runs it and serves the tests."""
  pipe.send(reached)
  try:
    code = pipe.receive()
  except peer.EndedError:
    return
  if "async" in code.lower():
    pipes_for_event_loops()
  if guarded:
    kernel.guard(os.getcwd())
  module = sys.modules["generated"] = types.ModuleType("generated")
  error = ""
  try:
    exec(compile(code, "<code>", "exec"), module.__dict__)
  except BaseException as raised:
    error = worded(raised)
  del code
  served = peer.Peer(pipe, lambda verb, values: True)
  try:
    pipe.send([error, [name for name in module.__dict__ if isinstance(name, str)]])
    peer.VERBS["name"] = functools.partial(_named, module)
    served.serve()
  except peer.EndedError:
    return


def _named(module: types.ModuleType, name: str):
  """[kind, full name, value] of a name in the module; tests import their own module of the same full name."""
  value = vars(module)[name]
  if isinstance(value, types.ModuleType):
    return ["module", value.__name__, value]
  return ["value", "", value]


def worded(error: BaseException) -> str:
  """Returns an exception in at most 200 characters."""
  try:
    return f"{type(error).__name__}: {error}"[:200]
  except BaseException:
    return type(error).__name__[:200]


def pipes_for_event_loops() -> None:
  """Lets asyncio wake its loop through a pipe, since there are no sockets."""
  import socket

  class End:
    def __init__(self, number: int):
      self._number = number

    def fileno(self) -> int:
      return self._number

    def setblocking(self, blocking: bool) -> None:
      os.set_blocking(self._number, blocking)

    def recv(self, count: int) -> bytes:
      return os.read(self._number, count)

    def send(self, data: bytes) -> int:
      return os.write(self._number, data)

    def close(self) -> None:
      os.close(self._number)

  def socketpair(*args, **kwargs):
    return tuple(builtins.map(End, os.pipe()))

  socket.socketpair = socketpair
