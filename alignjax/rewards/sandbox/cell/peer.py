"""Calls between the tests' process and the code's: each holds objects of its own, and numbers of the other's.

While one side waits for an answer it serves the other (a test may pass a function to the code). What the code may ask
of the tests' objects is decided in `test_side`; the tests may ask all of the code.
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
ADDRESSES = ("__array", "__cuda_array", "__dlpack")  # names under which libraries ask for places in memory
_NONE = object()


class EndedError(BaseException):
  """The other process has ended or said what is no message; there are no more answers."""


class Pipe:
  """Messages, one a line."""

  def __init__(self, read: int, write: int):
    self._read, self._write = read, write
    self._left = bytearray()
    self.ended = False

  def send(self, message: Any) -> None:
    """Raises EndedError where nobody reads."""
    data = memoryview(json.dumps(message).encode() + b"\n")
    try:
      while data:
        data = data[os.write(self._write, data) :]
    except OSError:
      self._end()

  def receive(self) -> Any:
    """The next message.

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
    """Leaves it to the other processes that have it."""
    os.close(self._read)
    os.close(self._write)

  def _end(self) -> None:
    self.ended = True
    raise EndedError("the code's process has ended")


class Peer:
  """One end of the pipe, with the objects that the other end has numbers of."""

  def __init__(self, pipe: Pipe, permitted: Callable[[str, list], bool], streams: Callable[[], dict] = dict):
    self.pipe, self._permitted, self._streams = pipe, permitted, streams
    self._objects: list[Any] = []
    self._numbers: dict[int, int] = {}
    self._remotes: dict[Any, Any] = {}
    self._turn = _thread.RLock()  # threads ask one after another

  def ask(self, verb: str, *args: Any, **kwargs: Any) -> Any:
    """What a verb of `VERBS` comes to on the other side.

    Lists, dicts and sets among the arguments are sent as copies, and take over what the other side made of theirs.
    """
    with self._turn:
      return self._ask(verb, args, kwargs)

  def _ask(self, verb: str, args: tuple, kwargs: dict) -> Any:
    sent = [[self.encode(value) for value in args], {name: self.encode(value) for name, value in kwargs.items()}]
    streams = self._streams()
    self.pipe.send(["?", verb, *sent, {name: self.encode(value) for name, value in streams.items()}])
    while True:
      kind, *said = self._receive()
      if kind == "?":
        self._serve(*said)
        continue
      value, changed, printed = said
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
      kind, *said = self._receive()
      if kind == "?":
        self._serve(*said)

  def encode(self, value: Any) -> Any:
    """A value for the other side; an object that is no plain value becomes a number, the same every time."""
    try:
      return wire.encode(value, self._number_of)
    except RecursionError:
      return self._number_of(value)

  def decode(self, said: Any) -> Any:
    """A value of the other side."""
    try:
      return wire.decode(said, self._object_of)
    except (wire.BadValueError, RecursionError):
      self.pipe._end()

  def _receive(self) -> list:
    message = self.pipe.receive()
    shapes = {"?": (str, list, dict, dict), "=": (object, list, str), "!": (list, list, str)}
    wanted = shapes.get(message[0]) if isinstance(message, list) and message and isinstance(message[0], str) else None
    if wanted is None or len(message) != 1 + len(wanted) or not all(map(isinstance, message[1:], wanted)):
      self.pipe._end()
    return message

  def _serve(self, verb: str, args: list, kwargs: dict, streams: dict) -> None:
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
    kind = type(error)
    try:
      text = str(error)
    except Exception:
      text = ""
    own = None if wire.is_builtin(kind) or isinstance(error, Remote) else self._number_of(kind)
    remote = None if own is None else self._plain_number(error)
    return ["x", _builtin_base(kind).__name__, own, remote, text, self.encode(tuple(error.args))]

  def _plain_number(self, value: Any) -> list:
    if id(value) not in self._numbers:
      self._numbers[id(value)] = len(self._objects)
      self._objects.append(value)
    return ["o", self._numbers[id(value)], ""]

  def _object_of(self, said: list) -> Any:
    letter, *rest = said
    if letter == "o":
      number, kind = rest
      if number not in self._remotes:
        self._remotes[int(number)] = Remote(self, int(number))
      remote = self._remotes[int(number)]
      return _coroutine(remote) if kind == "coroutine" else remote
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
    """A class of this side that stands for an exception class of the other."""
    if ("class", number) not in self._remotes:
      own = self._object_of(["o", number, ""])
      self._remotes["class", number] = type(str(name), (_error_base(base),), {"_remote_class": own, **_FORWARDED})
    return self._remotes["class", number]

  def _error(self, base: str, own: list | None, remote: list | None, text: str, args: Any) -> BaseException:
    kind = self.decode(own) if own and own[0] in ("k", "u") else _error_base(base)
    values = self.decode(args)
    if not isinstance(kind, type) or not issubclass(kind, BaseException):
      kind = _error_base(base)
    try:
      error = kind(*values) if isinstance(values, tuple) else kind(str(text))
    except Exception:
      error = RuntimeError(f"{base}: {text}")
    if remote and hasattr(kind, "_remote_class"):
      error.__dict__["_remote_error"] = self.decode(remote)
      error.__dict__["_remote_text"] = str(text)
    return error


class Remote:
  """An object of the other process: what is done to it is done there.

  It is never equal to a value of this side by its own account: for `x == 3`, and for arithmetic, the other side gives
  its value (of a subclass of int, say), without being told with what it is compared.
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
  """What an exception of the other side has beyond its arguments."""

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_remote"):
      raise AttributeError(name)
    return getattr(self._remote_error, name)

  def __str__(self) -> str:
    return self.__dict__.get("_remote_text", "") or BaseException.__str__(self)


_FORWARDED = {name: vars(_Forwarded)[name] for name in ("__getattr__", "__str__")}


class CodeExit(SystemExit):
  """SystemExit that the code raised in a call; the tests are not ended by it."""


CodeExit.__name__ = CodeExit.__qualname__ = "SystemExit"


def plain(value: Any) -> Any:
  """The plain value that an object of a subclass is.

  Raises:
    TypeError: it is of none.
  """
  kinds: tuple[type, ...] = (int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)
  for kind in kinds:
    if isinstance(value, kind):
      return kind(value)
  raise TypeError(f"a {type(value).__name__} is no plain value")


def _plain_or(remote: Remote, other: Any = _NONE) -> Any:
  try:
    return remote._Remote__peer.ask("plain", remote)
  except Exception:
    return other


def _comparison(name: str) -> Callable:
  function = getattr(operator, name)

  def compare(self: Remote, other: Any) -> Any:
    if isinstance(other, Remote):
      if self is other and name in ("eq", "ne"):
        return name == "eq"
      return self._Remote__peer.ask(name, self, other)
    mine = _plain_or(self)
    return NotImplemented if mine is _NONE or isinstance(mine, Remote) else function(mine, other)

  return compare


def _arithmetic(name: str, reflected: bool) -> Callable:
  function = getattr(operator, name, None) or divmod

  def operate(self: Remote, other: Any) -> Any:
    if not isinstance(other, Remote):
      mine = _plain_or(self)
      if mine is not _NONE and not isinstance(mine, Remote):
        return function(other, mine) if reflected else function(mine, other)
      if name in TELLING and isinstance(other, int | float | complex):
        raise TypeError(f"{name}: an object of the code is not asked how far it is from a number of the tests")
    return self._Remote__peer.ask(name, *((other, self) if reflected else (self, other)))

  return operate


def _asked(verb: str, wanted: type | None = None) -> Callable:
  def ask(self: Remote, *args: Any) -> Any:
    value = self._Remote__peer.ask(verb, self, *args)
    return value if wanted is None or isinstance(value, wanted) else wanted(plain(value))

  return ask


def _coroutine(remote: Remote) -> Any:
  """A coroutine of this side that lets the other side run its own to the end."""

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
  return next(base for base in kind.__mro__ if wire.is_builtin(base))


def _error_base(name: str) -> type:
  """The class of this side for a built-in exception of the other; what would end this process is made harmless."""
  kind = getattr(builtins, str(name), None)
  if kind is SystemExit:
    return CodeExit
  return kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError


def _take_over(values: list, changed: list) -> None:
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
  """Standard streams that the other side has replaced, for the time of a call."""

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

    with contextlib.ExitStack() as stack:  # of what fails in between, nothing stays replaced
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
    """What was written to stdout."""
    return self._output.getvalue() if self._output else ""


TELLING = ("sub", "truediv", "floordiv", "mod", "xor", "divmod")  # whose result says whether two numbers are equal
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
