"""The sandbox that chat templates are rendered in: what a template may use, and how much of it.

A template is a program of somebody else's. Jinja's own sandbox keeps it from files and from Python's inside; this one
also keeps it from using up time and memory, and from anything that differs from call to call. Nothing is computed
when a template is compiled. When it is rendered every loop, call, filter and operator takes from one account of steps,
characters and seconds, and takes before it makes, so that no single operation is large.
"""

import contextvars
import itertools
import json
import re
import string
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

LONGEST = 250_000  # characters of a template; published ones take up to 30,000
STEPS = 1_000_000  # iterations, calls and entries of lists of one rendering, beside one for each character it is given
ROOM = 64_000_000  # characters that one rendering may make, and ...
ROOM_PER_CHARACTER = 64  # ... for each that the dialogue has
SECONDS = 10.0  # of this thread's processor time
BITS = 4096  # of a whole number
DIGITS = 1000  # width, precision, indent

# What templates of published models use, and what is as harmless. Left out are those that differ from call to call
# (random), or take long for what they give (wordwrap, urlize, striptags, xmlattr, pprint).
FILTERS = (
  *("abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first"),
  *("float", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max"),
  *("min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort"),
  *("string", "sum", "title", "trim", "truncate", "unique", "upper", "urlencode", "wordcount"),
)
METHODS = {
  str: (
    *("capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "index", "isalnum"),
    *("isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join"),
    *("ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust"),
    *("rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
    "zfill",
  ),
  dict: ("copy", "get", "items", "keys", "values"),
  list: ("copy", "count", "index"),
  tuple: ("count", "index"),
  range: ("count", "index", "start", "step", "stop"),
  int: ("bit_length",),
  float: ("is_integer",),
}
SHALLOW = frozenset(  # filters that look at no entry's inside
  [
    *("batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr"),
    *("reverse", "select", "selectattr", "slice"),
  ]
)
PLAIN_TESTS = frozenset(  # and tests
  [
    *("boolean", "callable", "defined", "divisibleby", "even", "false", "filter", "float", "integer", "iterable"),
    *("mapping", "none", "number", "odd", "sameas", "sequence", "string", "true", "undefined", "test"),
  ]
)
_SHORT = frozenset(("trim", "length", "count", "string", "lower", "upper", "capitalize", "first", "last", "int"))
_WIDTH = re.compile(r"\d{4,}|\*")
_PERCENT = re.compile(r"%(?:\([^)]*\))?([^a-zA-Z%]*)")


class Exhausted(jinja2.TemplateError):
  """A rendering that takes more than a dialogue of its size can need."""


class Account:
  """What one rendering has left."""

  def __init__(self, characters: int = 0):
    self.steps = STEPS + characters
    self.room = ROOM + ROOM_PER_CHARACTER * characters
    self._until = time.thread_time() + SECONDS
    self._ticks = 0

  def step(self, count: int = 1) -> None:
    """Takes steps."""
    self.steps -= count
    if self.steps < 0:
      raise Exhausted(f"it takes more than {STEPS} steps and one for each of the dialogue's characters")
    self._ticks += 1
    if not self._ticks % 64 and time.thread_time() > self._until:
      raise Exhausted(f"it takes more than {SECONDS:g} seconds")

  def make(self, characters: int) -> None:
    """Takes room for characters that are about to be made."""
    self.room -= characters
    if self.room < 0:
      raise Exhausted(f"it makes more than {ROOM} characters and {ROOM_PER_CHARACTER} for each of the dialogue's")


_ACCOUNT: contextvars.ContextVar[Account] = contextvars.ContextVar("account")


def _account() -> Account:
  return _ACCOUNT.get(None) or Account()


def compile_template(environment: "SafeEnvironment", source: str) -> tuple[jinja2.Template, frozenset[str]]:
  """A template, and the variables that it reads; what is computed meanwhile is limited too."""
  token = _ACCOUNT.set(Account())
  try:
    names = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), frozenset(names)
  finally:
    _ACCOUNT.reset(token)


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
  """What a template of `SafeEnvironment` makes of the variables.

  Raises:
    Exhausted: it takes too much.
  """
  token = _ACCOUNT.set(Account(_characters(list(variables.values()))))
  try:
    return template.render(variables)
  finally:
    _ACCOUNT.reset(token)


def _characters(value: Any) -> int:
  """Characters and entries of a JSON value."""
  if isinstance(value, str):
    return len(value)
  if isinstance(value, Mapping):
    return sum(len(key) + _characters(item) + 1 for key, item in value.items())
  if isinstance(value, list | tuple):
    return sum(_characters(item) + 1 for item in value)
  return 1


class _Generator(CodeGenerator):
  """Compiles nothing but text to a constant, and hands joins and comparisons to the environment."""

  def _output_child_to_const(self, node, frame, finalize):
    if not isinstance(node, nodes.TemplateData):
      raise nodes.Impossible
    return super()._output_child_to_const(node, frame, finalize)

  def visit_Concat(self, node, frame):
    self.write("environment.concatenate((")
    for part in node.nodes:
      self.visit(part, frame)
      self.write(", ")
    self.write("))")

  def visit_Compare(self, node, frame):
    self.write("(")
    self._weighed(node.expr, frame)
    for operand in node.ops:
      self.visit(operand, frame)
    self.write(")")

  def visit_Operand(self, node, frame):
    self.write(f" {_OPERATORS[node.op]} ")
    self._weighed(node.expr, frame, "container" if node.op in ("in", "notin") else "weighed")

  def visit_List(self, node, frame):
    self.write("environment.sized(")
    super().visit_List(node, frame)
    self.write(")")

  def visit_Tuple(self, node, frame):
    self.write("environment.sized(" if node.ctx == "load" else "(")
    super().visit_Tuple(node, frame)
    self.write(")")

  def visit_Dict(self, node, frame):
    self.write("environment.sized({")
    for item in node.items:
      self._weighed(item.key, frame)
      self.write(": ")
      self.visit(item.value, frame)
      self.write(", ")
    self.write("})")

  def visit_Getitem(self, node, frame):
    if not isinstance(node.arg, nodes.Slice):
      super().visit_Getitem(node, frame)
      return
    self.write("environment.sized(")
    self.visit(node.node, frame)
    self.write("[")
    self.visit(node.arg, frame)
    self.write("])")

  def _weighed(self, node, frame, how="weighed"):
    if isinstance(node, nodes.Const):
      self.visit(node, frame)
      return
    self.write(f"environment.{how}(")
    self.visit(node, frame)
    self.write(")")


_OPERATORS = {
  "eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in",
}  # fmt: skip


class SafeEnvironment(ImmutableSandboxedEnvironment):
  """Where chat templates are compiled and rendered."""

  code_generator_class = _Generator
  intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

  def __init__(self, extensions: Iterable[Any] = ()):
    super().__init__(
      trim_blocks=True,
      lstrip_blocks=True,
      optimized=False,
      finalize=self._finalize,
      extensions=[*extensions, loopcontrols],
    )
    self.filters = {name: _counted(name, self.filters[name]) for name in FILTERS}
    self.filters |= {"tojson": _counted("tojson", _tojson), "count loop": _tick}
    self.tests = {name: _counted_test(name, test) for name, test in self.tests.items()}
    kept = ("range", "dict", "namespace", "cycler", "joiner")
    self.globals = {name: self.globals[name] for name in kept}

  def _parse(self, source, name, filename):
    tree = super()._parse(source, name, filename)
    for loop in list(tree.find_all(nodes.For)):
      tick = nodes.Filter(nodes.Const(0), "count loop", [], [], None, None)
      loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))
    return tree

  # What is written, joined and compared.

  def _finalize(self, value: Any) -> str:
    return _text(value)

  def concatenate(self, parts: Iterable[Any]) -> str:
    """`a ~ b`."""
    return self.concat(map(_text, parts))

  @staticmethod
  def concat(parts: Iterable[str]) -> str:
    """The text of all parts: those of a macro or a block, or of the whole template."""
    account, kept = _account(), []
    for part in parts:
      account.make(len(part) + 1)
      kept.append(part)
    return "".join(kept)

  def weighed(self, value: Any) -> Any:
    """A value that is about to be compared or hashed."""
    if not isinstance(value, str | int | float | None):
      _weigh(value)
    return value

  def container(self, value: Any) -> Any:
    """What a value is about to be looked for in: of an object only the keys count."""
    return value if isinstance(value, dict) else self.weighed(value)

  def sized(self, value: Any) -> Any:
    """A list, an object or a slice that was just made."""
    _made(value)
    return value

  def getitem(self, obj, argument):
    return super().getitem(obj, self.weighed(argument))

  # What is called and computed.

  def is_safe_attribute(self, obj, attr, value):
    if not super().is_safe_attribute(obj, attr, value):
      return False
    if isinstance(obj, type | types.FunctionType | types.MethodType | types.BuiltinFunctionType | types.GeneratorType):
      return False
    for kind, names in METHODS.items():
      if isinstance(obj, kind):
        return attr in names
    return not isinstance(obj, bytes | bytearray | memoryview | complex)

  def wrap_str_format(self, value):
    method = super().wrap_str_format(value)
    if method is None:
      return None
    if value.__name__ != "format":
      return lambda *args, **kwargs: _refuse("format_map")
    pattern = value.__self__

    def wrapped(*args, **kwargs):
      _check_format(pattern, [*args, *kwargs.values()])
      return method(*args, **kwargs)

    return wrapped

  def call(self, context, obj, /, *args, **kwargs):
    _account().step()
    values = [*args, *kwargs.values()]
    if isinstance(obj, types.BuiltinMethodType) or isinstance(getattr(obj, "__self__", None), Markup):
      args, values = _check_method(obj, args, values)
    elif not isinstance(obj, Macro):
      for value in values:
        _took(value)
    found = super().call(context, obj, *args, **kwargs)
    _made(found)
    return found

  def call_binop(self, context, operator, left, right):
    account = _account()
    account.step()
    if operator == "+" and type(left) is str and type(right) is str:  # the usual case, soon
      account.make(len(left) + len(right))
      return left + right
    if operator == "*":
      _check_product(account, left, right)
    elif operator == "**":
      _check_power(left, right)
    elif operator == "%" and isinstance(left, str):
      _check_percent(left, right)
    elif operator == "+":
      for side in (left, right):
        if isinstance(side, str):
          account.make(len(side))
        elif isinstance(side, list | tuple):
          account.step(len(side))
    return super().call_binop(context, operator, left, right)


def _tick(value: Any) -> None:
  _account().step()


def _refuse(what: str) -> Any:
  raise Exhausted(f"{what} is not supported in a chat template")


def _text(value: Any) -> str:
  """The text of a value that is written; only of plain ones, as that of others holds an address."""
  if isinstance(value, str):
    return value
  if not isinstance(value, int | float | None):
    _weigh(value, written=True)
  return str(value)


def _weigh(value: Any, written: bool = False) -> int:
  """Takes a step for each entry of a value at any depth, where a list that stands in two places counts twice.

  Args:
    value: about to be gone through.
    written: as text: then functions and the like are refused.

  Returns:
    A bound on the characters of its text.
  """
  account, size, waiting = _account(), 0, [value]
  while waiting:
    one = waiting.pop()
    account.step()
    if isinstance(one, str):
      size += 2 * len(one) + 8
    elif isinstance(one, int | float | None | jinja2.Undefined):
      size += BITS // 3 if isinstance(one, int) and one.bit_length() > 64 else 32
    elif isinstance(one, dict):
      waiting += itertools.chain.from_iterable(one.items())
      account.step(len(one))
    elif isinstance(one, list | tuple | type({}.items()) | type({}.keys()) | type({}.values())):
      account.step(len(one))
      waiting += one
    elif isinstance(one, range):
      size += 64
    elif written:
      raise jinja2.TemplateError(f"it writes a {type(one).__name__}, which has no text")
  if written:
    account.make(size)
  return size


def _took(value: Any) -> None:
  """Takes steps for what goes through a value's entries, at one level."""
  if isinstance(value, list | tuple | dict | range):
    _account().step(len(value))


def _made(value: Any) -> None:
  """Takes what a value that was made is worth."""
  if isinstance(value, str):
    _account().make(len(value))
  else:
    _took(value)


def _bits(value: Any) -> int:
  return value.bit_length() if isinstance(value, int) else 0


def _check_product(account: Account, left: Any, right: Any) -> None:
  for one, other in ((left, right), (right, left)):
    if isinstance(other, int):
      if isinstance(one, str):
        account.make(len(one) * max(other, 0))
      elif isinstance(one, list | tuple):
        account.step(len(one) * max(other, 0))
  if _bits(left) + _bits(right) > BITS:
    raise Exhausted(f"a number of more than {BITS} bits")


def _check_power(left: Any, right: Any) -> None:
  if isinstance(left, int) and isinstance(right, int) and _bits(left) * abs(right) > BITS:
    raise Exhausted(f"a number of more than {BITS} bits")


def _check_percent(pattern: str, values: Any) -> None:
  """`pattern % values`: no wide field, and room for all values in each place."""
  if any(_WIDTH.search(flags) for flags in _PERCENT.findall(pattern)):
    raise Exhausted(f"a field of more than {DIGITS} characters")
  size = len(values) + 8 if isinstance(values, str) else _weigh(values, written=True)
  _account().make(len(pattern) + pattern.count("%") * (size + DIGITS))


def _check_format(pattern: str, values: list[Any]) -> None:
  """`pattern.format(*values)`, likewise."""
  for _, name, width, _ in string.Formatter().parse(pattern):
    if (width and (_WIDTH.search(width) or "{" in width)) or (name and _WIDTH.search(name)):
      raise Exhausted(f"a field of more than {DIGITS} characters")
  _account().make(len(pattern) + pattern.count("{") * (_weigh(values, written=True) + DIGITS))


def _check_method(method: Any, args: tuple, values: list[Any]) -> tuple[tuple, list[Any]]:
  """Takes what a method of a text, list or number may make, and returns its arguments, of which iterators are lists."""
  account, own, name = _account(), method.__self__, method.__name__
  if isinstance(own, str):
    if name == "join" and len(args) == 1:
      args = (_limited(args[0]),)
      account.make(sum(len(x) if isinstance(x, str) else 0 for x in args[0]) + len(own) * len(args[0]))
    elif name == "replace" and len(args) >= 2:
      _check_replace(own, args[0], args[1])
    elif name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
      widths = [x for x in values if isinstance(x, int)]
      account.make(len(own) + max([8, *widths]) * (own.count("\t") if name == "expandtabs" else 1))
    elif name in ("split", "rsplit", "splitlines"):
      separator = values[0] if values and isinstance(values[0], str) and values[0] else None
      account.step(own.count(separator) + 1 if separator else 1 + len(own) // 2 if len(own) > 1000 else 1)
      account.make(len(own))
    else:
      account.make(len(own))
  elif isinstance(own, list | tuple | dict | range):
    for value in values:
      _weigh(value)
    if name in ("count", "index"):
      _weigh(own)
    elif name == "copy":
      _took(own)
  else:
    for value in values:
      _took(value)
  return args, values


def _check_replace(text: str, old: Any, new: Any) -> None:
  if isinstance(old, str) and isinstance(new, str):
    _account().make(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _limited(values: Any) -> list:
  """A list of what an iterable holds, each a step."""
  account, kept = _account(), []
  for value in values:
    account.step()
    kept.append(value)
  return kept


def _flow(values: Iterator[Any]) -> Iterator[Any]:
  """What a lazy filter gives, each a step."""
  account = _account()
  for value in values:
    account.step()
    yield value


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """A filter that takes from the account."""
  passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment comes first

  def filtered(*args, **kwargs):
    account = _account()
    account.step()
    if len(args) == passed + 1 and not kwargs and type(args[passed]) is str and name in _SHORT:  # the usual case, soon
      account.make(2 * len(args[passed]))
      return function(*args)
    own, given = args[:passed], [*args[passed:]]
    if given and isinstance(given[0], types.GeneratorType) and name not in SHALLOW:
      given[0] = _limited(given[0])
    _check_filter(name, given, kwargs)
    found = function(*own, *given, **kwargs)
    if isinstance(found, types.GeneratorType):
      return _flow(found)
    _made(found)
    return found

  return _passing(function, filtered)


def _passing(function: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
  """The wrapper, which gets what the function asks of Jinja: the context, or the environment."""
  if hasattr(function, "jinja_pass_arg"):
    wrapper.jinja_pass_arg = function.jinja_pass_arg
  return wrapper


def _check_filter(name: str, given: list[Any], kwargs: dict[str, Any]) -> None:
  """Takes what a filter may make before it does."""
  account, value, more = _account(), given[0] if given else "", [*given[1:], *kwargs.values()]
  for other in more:
    if isinstance(other, int) and not isinstance(other, bool) and not -DIGITS <= other <= DIGITS:
      if name in ("indent", "batch", "slice", "center", "round", "tojson", "join", "replace", "format"):
        raise Exhausted(f"{name} with {other if _bits(other) < 64 else 'a number of many digits'}")
    elif not isinstance(other, str | int | float | None):
      _weigh(other)
  if isinstance(value, str):
    account.make(len(value))
    if name in ("list", "title", "wordcount"):  # which make a list of its parts
      account.step(len(value))
  elif name in SHALLOW or name == "tojson":
    _took(value)
  elif not isinstance(value, int | float | None):
    size = _weigh(value, written=name in ("string", "upper", "lower", "trim", "capitalize", "title"))
    account.make(size if name in ("join", "indent", "replace", "center", "format", "e", "escape") else 0)
  if name in ("join", "replace"):
    longest = max((len(x) for x in more if isinstance(x, str)), default=0)
  if name == "format":
    if isinstance(value, str):
      _check_percent(value, more)
  elif name == "join":
    account.make(longest * (len(value) if hasattr(value, "__len__") else 0))
  elif name == "replace":
    text = _text(value)
    old = [*given[1:2], kwargs.get("old", "")][0]
    account.make(len(text) + (text.count(old) if isinstance(old, str) and old else len(text) + 1) * longest)
  elif name == "indent":
    width = max([4, *(len(x) if isinstance(x, str) else x for x in more if isinstance(x, str | int))])
    account.make((_text(value).count("\n") + 1) * width)
  elif name == "tojson":
    account.make(_json_size(value, more))
  elif name == "sum" and any(isinstance(x, list | tuple) for x in more):
    _refuse("a sum of lists")


def _json_size(value: Any, more: list[Any]) -> int:
  """A bound on the characters of a value as JSON."""
  options = itertools.chain.from_iterable(x if isinstance(x, list | tuple) else [x] for x in more)
  widths = [len(x) if isinstance(x, str) else x for x in options if isinstance(x, str | int) and x is not True]
  if max(widths, default=0) > 16:
    raise Exhausted("tojson with a wide indent or separator")
  size = 3 * _weigh(value)
  entries, waiting = 0, [(value, 1)]
  while widths and waiting:
    one, depth = waiting.pop()
    entries += depth
    if isinstance(one, dict | list | tuple):
      waiting += ((item, depth + 1) for item in (one.values() if isinstance(one, dict) else one))
  return size + entries * max(widths, default=0)


def _counted_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """A test that takes from the account."""

  def tested(*args, **kwargs):
    _account().step()
    if name not in PLAIN_TESTS:
      for value in args:
        if not isinstance(value, str | int | float | None | jinja2.Environment):
          _weigh(value)
    return function(*args, **kwargs)

  return _passing(function, tested)


def _tojson(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
  # Jinja's own escapes what HTML would read as a tag.
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
