"""Calls between the tests' process and the code's: each has objects of its own, and numbers of the other's.

While one side waits for an answer, it serves the other (a test may pass a function to the code). `test_side` decides
which requests of the code on the tests' objects are permitted; all requests of the tests are.
"""

import _thread
import builtins
import copy
import json
import operator
import os
from collections.abc import Callable
from typing import Any

import wire

LONGEST = 1 << 24  # bytes of a message
ADDRESSES = ("__array", "__cuda_array", "__dlpack")  # attributes by which libraries request addresses in memory
_NONE = object()


class EndedError(BaseException):
  """The other process has ended or sent something that is no message; there are no more answers."""


class Pipe:
  """Messages, one a line."""

  def __init__(self, read: int, write: int):
    self._read = read
    self._write = write
    self._left = bytearray()
    self.ended = False

  def send(self, message: Any) -> None:
    """Sends a message; raises EndedError if the other process does not read."""
    data = memoryview(json.dumps(message).encode() + b"\n")
    try:
      while data:
        data = data[os.write(self._write, data) :]
    except OSError:
      self._end()

  def receive(self) -> Any:
    """Returns the next message.

    Raises:
      EndedError: there is none.
    """
    if self.ended:
      raise EndedError("the code's process has ended")
    while (end := self._left.find(b"\n")) < 0:
      part = os.read(self._read, 1 << 16)
      if not part or len(self._left) > LONGEST:
        self._end()
      self._left += part
    line = bytes(self._left[:end])
    del self._left[: end + 1]
    try:
      return json.loads(line)
    except (ValueError, RecursionError, MemoryError):
      self._end()

  def close(self) -> None:
    """Closes this process's ends of the pipe; other processes keep theirs."""
    os.close(self._read)
    os.close(self._write)

  def _end(self) -> None:
    self.ended = True
    raise EndedError("the code's process has ended")


class Peer:
  """One end of the pipe, with the objects whose numbers the other end has."""

  def __init__(self, pipe: Pipe, permitted: Callable[[str, list], bool], streams: Callable[[], dict] = dict):
    self.pipe = pipe
    self._permitted = permitted
    self._streams = streams
    self._objects: list[Any] = []
    self._numbers: dict[int, int] = {}
    self._remotes: dict[Any, Any] = {}
    self._turn = _thread.RLock()  # threads ask one after another

  def ask(self, verb: str, *args: Any, **kwargs: Any) -> Any:
    """Returns the result of a verb of `VERBS` on the other side; raises what it raises there.

    Lists, dicts and sets among the arguments are sent as copies; changes that the other side makes are copied back.
    """
    with self._turn:
      return self._ask(verb, args, kwargs)

  def _ask(self, verb: str, args: tuple, kwargs: dict) -> Any:
    sent = [[self.encode(value) for value in args], {name: self.encode(value) for name, value in kwargs.items()}]
    streams = self._streams()
    self.pipe.send(["?", verb, *sent, {name: self.encode(value) for name, value in streams.items()}])
    while True:
      kind, *parts = self._receive()
      if kind == "?":
        self._serve(*parts)
        continue
      value, changed, printed = parts
      _take_over([*args, *kwargs.values()], self.decode(changed))
      if printed:
        builtins.print(printed, end="")
      value = self.decode(value)
      if kind == "!" and isinstance(value, StopIteration | StopAsyncIteration) and verb != "next":
        raise RuntimeError(f"{type(value).__name__} in a call")  # it would end a loop of the tests
      if kind == "!":
        raise value
      return value

  def serve(self) -> None:
    """Answers until the other side ends."""
    while True:
      kind, *parts = self._receive()
      if kind == "?":
        self._serve(*parts)

  def encode(self, value: Any) -> Any:
    """Encodes a value for the other side; an object that is no plain value becomes a number, always the same."""
    try:
      return wire.encode(value, self._number_of)
    except RecursionError:
      return self._number_of(value)

  def decode(self, said: Any) -> Any:
    """Decodes a value of the other side."""
    try:
      return wire.decode(said, self._object_of)
    except (wire.BadValueError, RecursionError):
      self.pipe._end()

  def _receive(self) -> list:
    """Returns the next message, whose form is checked."""
    message = self.pipe.receive()
    if not _is_message(message):
      self.pipe._end()
    return message

  def _serve(self, verb: str, args: list, kwargs: dict, streams: dict) -> None:
    """Answers a request of the other side."""
    values = [self.decode(value) for value in args]
    named = {name: self.decode(value) for name, value in kwargs.items()}
    replaced = _Streams({name: self.decode(value) for name, value in streams.items()})
    try:
      if verb not in VERBS or not self._permitted(verb, values):
        raise PermissionError(f"{verb} of an object of the tests is not permitted")
      with replaced:
        answer = ["=", self.encode(VERBS[verb](*values, **named))]
    except EndedError:
      raise
    except BaseException as error:
      answer = ["!", self._encode_error(error)]
    changed = []
    if verb in ("call", "invoke"):
      for place, (value, before) in enumerate(zip([*values, *named.values()], [*args, *kwargs.values()], strict=True)):
        if type(value) in wire.MUTABLE and (now := self.encode(value)) != before:
          changed.append([place, now])
    self.pipe.send([*answer, ["l", *(["l", place, now] for place, now in changed)], replaced.printed()])

  def _number_of(self, value: Any) -> list:
    """Returns an object that is no plain value, as it is sent: see `_object_of`."""
    if isinstance(value, Remote):
      return ["u", value._Remote__number]
    if isinstance(value, type):
      if hasattr(value, "_remote_class"):
        return ["u", value._remote_class._Remote__number]
      if wire.is_builtin(value):
        return ["m", value.__qualname__]
    if isinstance(value, BaseException):
      return self._encode_error(value)
    if id(value) not in self._numbers:
      self._numbers[id(value)] = len(self._objects)
      self._objects.append(value)
    number = self._numbers[id(value)]
    if isinstance(value, type) and issubclass(value, BaseException):
      return ["k", number, value.__name__, _builtin_base(value).__name__]
    return ["o", number, "coroutine" if hasattr(value, "__await__") and not isinstance(value, type) else ""]

  def _encode_error(self, error: BaseException) -> list:
    """Returns an exception as it is sent: its class, its text and its arguments."""
    kind = type(error)
    try:
      text = str(error)
    except Exception:
      text = ""
    own_class = None
    own_error = None
    if not wire.is_builtin(kind) and not isinstance(error, Remote):
      own_class = self._number_of(kind)
      own_error = self._plain_number(error)
    return ["x", _builtin_base(kind).__name__, own_class, own_error, text, self.encode(tuple(error.args))]

  def _plain_number(self, value: Any) -> list:
    """Returns the number of an object, whatever its class."""
    if id(value) not in self._numbers:
      self._numbers[id(value)] = len(self._objects)
      self._objects.append(value)
    return ["o", self._numbers[id(value)], ""]

  def _object_of(self, said: list) -> Any:
    """The object that was sent: o of the other side, u of this side, m a built-in class, k and x an exception."""
    letter, *rest = said
    if letter == "o":
      number, kind = rest
      if number not in self._remotes:
        self._remotes[int(number)] = Remote(self, int(number))
      remote = self._remotes[int(number)]
      if kind == "coroutine":
        return _coroutine(remote)
      return remote
    if letter == "u":
      if not rest[0] >= 0:
        raise wire.BadValueError("a negative number")
      return self._objects[rest[0]]
    if letter == "m":
      kind = getattr(builtins, rest[0])
      if not isinstance(kind, type):
        raise wire.BadValueError(f"{rest[0]} is no class")
      return kind
    if letter == "k":
      return self._error_class(*rest)
    if letter == "x":
      return self._error(*rest)
    raise wire.BadValueError(f"a list that begins with {letter!r}")

  def _error_class(self, number: int, name: str, base: str) -> type:
    """Returns a class of this side that stands for an exception class of the other."""
    if ("class", number) not in self._remotes:
      remote_class = self._object_of(["o", number, ""])
      attributes = {"_remote_class": remote_class, **_FORWARDED}
      self._remotes["class", number] = type(str(name), (_error_base(base),), attributes)
    return self._remotes["class", number]

  def _error(self, base: str, own: list | None, remote: list | None, text: str, args: Any) -> BaseException:
    """Returns an exception of this side for one of the other; see `_encode_error`."""
    kind = None
    if own and own[0] in ("k", "u"):
      kind = self.decode(own)
    values = self.decode(args)
    if not isinstance(values, tuple):
      values = (str(text),)
    if not isinstance(kind, type) or not issubclass(kind, BaseException):
      kind = _error_base(base)
    try:
      error = kind(*values)
    except Exception:
      error = RuntimeError(f"{base}: {text}")
    if remote and hasattr(kind, "_remote_class"):
      error.__dict__["_remote_error"] = self.decode(remote)
      error.__dict__["_remote_text"] = str(text)
    return error


def _is_message(message: Any) -> bool:
  """Returns whether a message is a request (?), an answer (=) or an error (!) with parts of the right types."""
  shapes = {"?": (str, list, dict, dict), "=": (object, list, str), "!": (list, list, str)}
  if not isinstance(message, list) or not message or not isinstance(message[0], str):
    return False
  shape = shapes.get(message[0])
  return shape is not None and len(message) == 1 + len(shape) and all(map(isinstance, message[1:], shape))


class Remote:
  """An object of the other process, in which all operations on it take place.

  The other process never decides whether it is equal to a value of this side. For `x == 3`, and for arithmetic, it
  gives its own value (of a subclass of int, say), without receiving the value that it is compared with.
  """

  __slots__ = ("__number", "__peer", "__weakref__")
  __doc__ = None

  def __init__(self, peer: Peer, number: int):
    object.__setattr__(self, "_Remote__peer", peer)
    object.__setattr__(self, "_Remote__number", number)

  def __getattr__(self, name: str) -> Any:
    if name.startswith(ADDRESSES):
      raise AttributeError(name)
    return self.__peer.ask("getattr", self, name)

  def __setattr__(self, name: str, value: Any) -> None:
    self.__peer.ask("setattr", self, name, value)

  def __delattr__(self, name: str) -> None:
    self.__peer.ask("delattr", self, name)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self.__peer.ask("call", self, *args, **kwargs)

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> Any:
    return self.__peer.ask("exit", self, kind, error)

  def __instancecheck__(self, value: Any) -> bool:
    return bool(self.__peer.ask("isinstance", value, self))

  def __subclasscheck__(self, value: Any) -> bool:
    return bool(self.__peer.ask("issubclass", value, self))

  def __copy__(self) -> Any:
    return self.__peer.ask("copy", self)

  def __deepcopy__(self, memory: Any) -> Any:
    return self.__peer.ask("deepcopy", self)


class _Forwarded:
  """The attributes and the text of an exception of the other side."""

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_remote"):
      raise AttributeError(name)
    return getattr(self._remote_error, name)

  def __str__(self: Any) -> str:  # of an exception
    return self.__dict__.get("_remote_text", "") or BaseException.__str__(self)


_FORWARDED = {name: vars(_Forwarded)[name] for name in ("__getattr__", "__str__")}


class CodeExit(SystemExit):
  """A SystemExit that the code raised in a call; it does not end the tests."""


CodeExit.__name__ = CodeExit.__qualname__ = "SystemExit"


def plain(value: Any) -> Any:
  """Returns the plain value of an object whose class is a subclass of a plain one.

  Raises:
    TypeError: its class is no such subclass.
  """
  kinds: tuple[type, ...] = (int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)
  for kind in kinds:
    if isinstance(value, kind):
      return kind(value)
  raise TypeError(f"a {type(value).__name__} is no plain value")


def _plain_value(remote: Remote) -> Any:
  """Returns the plain value of an object of the other side; _NONE if it has none."""
  try:
    value = remote._Remote__peer.ask("plain", remote)
  except Exception:
    return _NONE
  if isinstance(value, Remote):
    return _NONE
  return value


def _comparison(name: str) -> Callable:
  """Returns the method of Remote for a comparison."""
  function = getattr(operator, name)

  def compare(self: Remote, other: Any) -> Any:
    if isinstance(other, Remote):
      if self is other and name in ("eq", "ne"):
        return name == "eq"
      return self._Remote__peer.ask(name, self, other)
    value = _plain_value(self)
    if value is _NONE:
      return NotImplemented
    return function(value, other)

  return compare


def _arithmetic(name: str, reflected: bool) -> Callable:
  """Returns the method of Remote for an arithmetic operation; if it is reflected, the other operand comes first."""
  function = getattr(operator, name, None) or divmod

  def in_order(own: Any, other: Any) -> tuple:
    return (other, own) if reflected else (own, other)

  def operate(self: Remote, other: Any) -> Any:
    if not isinstance(other, Remote):
      value = _plain_value(self)
      if value is not _NONE:
        return function(*in_order(value, other))
      if name in TELLING and isinstance(other, int | float | complex):
        raise TypeError(f"{name}: an object of the code is not asked how far it is from a number of the tests")
    return self._Remote__peer.ask(name, *in_order(self, other))

  return operate


def _asked(verb: str, wanted: type | None = None) -> Callable:
  """Returns the method of Remote for a verb, whose result is made plain unless it is of the wanted type (None: any)."""

  def ask(self: Remote, *args: Any) -> Any:
    value = self._Remote__peer.ask(verb, self, *args)
    if wanted is None or isinstance(value, wanted):
      return value
    return wanted(plain(value))

  return ask


def _coroutine(remote: Remote) -> Any:
  """Returns a coroutine of this side that runs a coroutine of the other side to its end."""

  async def run() -> Any:
    return remote._Remote__peer.ask("await", remote)

  return run()


def _await(value: Any) -> Any:
  import asyncio

  async def run() -> Any:
    return await value

  return asyncio.run(run())


def _exit(value: Any, kind: Any, error: Any) -> Any:
  return type(value).__exit__(value, kind, error, None)


def _builtin_base(kind: type) -> type:
  """Returns the nearest built-in class among the bases of a class."""
  return next(base for base in kind.__mro__ if wire.is_builtin(base))


def _error_base(name: str) -> type:
  """The class of this side for a built-in exception of the other; one that would end this process is replaced."""
  kind = getattr(builtins, str(name), None)
  if kind is SystemExit:
    return CodeExit
  if isinstance(kind, type) and issubclass(kind, Exception):
    return kind
  return RuntimeError


def _take_over(values: list, changed: list) -> None:
  """Copies the other side's changes, [place, new value], into lists, dicts and sets of this side."""
  for place, now in changed:
    value = values[place]
    if type(value) is not type(now) or type(value) not in wire.MUTABLE:
      continue
    if isinstance(value, list | bytearray):
      value[:] = now
    else:
      value.clear()
      value.update(now)


class _Streams:
  """The standard streams that the other side has replaced, during a call."""

  def __init__(self, replaced: dict):
    self._replaced = replaced
    self._output: Any = None
    self._stack: Any = None

  def __enter__(self) -> None:
    if not self._replaced:
      return
    import contextlib
    import io
    import sys

    with contextlib.ExitStack() as stack:  # if one replacement fails, all are undone
      if self._replaced.get("capture"):
        self._output = io.StringIO()
        stack.enter_context(contextlib.redirect_stdout(self._output))
      if "stdin" in self._replaced:
        stack.callback(setattr, sys, "stdin", sys.stdin)
        sys.stdin = io.StringIO(self._replaced["stdin"])
      if "input" in self._replaced:
        stack.callback(setattr, builtins, "input", builtins.input)
        builtins.input = self._replaced["input"]
      self._stack = stack.pop_all()

  def __exit__(self, *raised: Any) -> None:
    if self._stack:
      self._stack.close()

  def printed(self) -> str:
    """Returns the text written to stdout."""
    if not self._output:
      return ""
    return self._output.getvalue()


TELLING = ("sub", "truediv", "floordiv", "mod", "xor", "divmod")  # whose results tell if two numbers are equal
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
ARITHMETIC = ("add", "mul", "matmul", "pow", "and_", "or_", "lshift", "rshift", *TELLING)
ASKED = {"len": int, "iter": None, "next": None, "contains": bool, "bool": bool, "str": str, "repr": str, "hash": int,
         "int": int, "float": float, "index": int, "complex": complex, "bytes": bytes, "round": None, "abs": None,
         "neg": None, "pos": None, "invert": None, "getitem": None, "setitem": None, "delitem": None, "reversed": None,
         "enter": None, "format": str}  # fmt: skip

VERBS: dict[str, Callable] = {
  "call": lambda function, /, *args, **kwargs: function(*args, **kwargs),
  "getattr": getattr,
  "setattr": setattr,
  "delattr": delattr,
  "isinstance": isinstance,
  "issubclass": issubclass,
  "plain": plain,
  "copy": copy.copy,
  "deepcopy": copy.deepcopy,
  "await": _await,
  "enter": lambda value: type(value).__enter__(value),
  "exit": _exit,
  **{name: getattr(builtins, name, None) or getattr(operator, name) for name in ASKED if name != "enter"},
  **{name: getattr(operator, name, None) or divmod for name in (*COMPARISONS, *ARITHMETIC)},
}
for _name in COMPARISONS:
  setattr(Remote, f"__{_name}__", _comparison(_name))
for _name in ARITHMETIC:
  setattr(Remote, f"__{_name.rstrip('_')}__", _arithmetic(_name, False))
  setattr(Remote, f"__r{_name.rstrip('_')}__", _arithmetic(_name, True))
for _name, _wanted in ASKED.items():
  setattr(Remote, f"__{_name}__", _asked(_name, _wanted))
