"""The sandbox in which chat templates are rendered: what a template may use, and how much of it.

A template is a program by somebody else. Jinja's own sandbox keeps it from files and from Python's internals; this one
also limits its time and memory, and refuses anything that differs from call to call. Nothing is computed
when a template is compiled. When it is rendered, every loop, call, filter and operator is charged to one account
before it runs (`jinja_account.py`).
"""

import json
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from alignjax.data import jinja_account, jinja_charges
from alignjax.data.jinja_charges import SHALLOW

LONGEST = 250_000  # characters of a template; published ones take up to 30,000

# What templates of published models use, and what is equally harmless. Left out are filters that differ from call to
# call (random), or are slow for their use (wordwrap, urlize, striptags, xmlattr, pprint).
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
PLAIN_TESTS = frozenset(  # tests that do not look inside an entry
  [
    *("boolean", "callable", "defined", "divisibleby", "even", "false", "filter", "float", "integer", "iterable"),
    *("mapping", "none", "number", "odd", "sameas", "sequence", "string", "true", "undefined", "test"),
  ]
)
_CHEAP = frozenset(("trim", "length", "count", "string", "lower", "upper", "capitalize", "first", "last", "int"))


def compile_template(environment: "SafeEnvironment", source: str) -> tuple[jinja2.Template, frozenset[str]]:
  """Compiles a template; the compilation is limited too.

  Returns:
    (template, names of the variables that it reads).
  """
  with jinja_account.opened():
    names = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), frozenset(names)


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
  """Renders a template of `SafeEnvironment` with these variables.

  Raises:
    Exhausted: it uses too much.
  """
  with jinja_account.opened(jinja_account.size_of(list(variables.values()))):
    return template.render(variables)


class _Generator(CodeGenerator):
  """Compiles only text to a constant, and passes concatenations and comparisons to the environment."""

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
    if node.op in ("in", "notin"):
      self._weighed(node.expr, frame, "container")
    else:
      self._weighed(node.expr, frame)

  def visit_List(self, node, frame):
    self.write("environment.sized(")
    super().visit_List(node, frame)
    self.write(")")

  def visit_Tuple(self, node, frame):
    if node.ctx == "load":
      self.write("environment.sized(")
    else:
      self.write("(")
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

  def _weighed(self, node, frame, method="weighed"):
    if isinstance(node, nodes.Const):
      self.visit(node, frame)
      return
    self.write(f"environment.{method}(")
    self.visit(node, frame)
    self.write(")")


_OPERATORS = {
  "eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in",
}  # fmt: skip


class SafeEnvironment(ImmutableSandboxedEnvironment):
  """The Jinja environment in which chat templates are compiled and rendered."""

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
    self.filters |= {"tojson": _counted("tojson", _tojson), "count loop": _count_loop}
    self.tests = {name: _counted_test(name, test) for name, test in self.tests.items()}  # type: ignore[arg-type]  # of Jinja's, which are callable
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
    return jinja_account.as_text(value)

  def concatenate(self, parts: Iterable[Any]) -> str:
    """Writes `a ~ b`."""
    return self.concat(map(jinja_account.as_text, parts))

  @staticmethod
  def concat(parts: Iterable[str]) -> str:
    """Joins the parts of a macro, a block or the whole template."""
    account = jinja_account.current()
    charged = []
    for part in parts:
      account.make(len(part) + 1)
      charged.append(part)
    return "".join(charged)

  def weighed(self, value: Any) -> Any:
    """Charges a value that is about to be compared or hashed, and returns it."""
    if not isinstance(value, str | int | float | None):
      jinja_account.charge_depth(value)
    return value

  def container(self, value: Any) -> Any:
    """Charges the container of an `in` test, and returns it; the lookup in an object is free."""
    if isinstance(value, dict):
      return value
    return self.weighed(value)

  def sized(self, value: Any) -> Any:
    """Charges a list, an object or a slice that was just made, and returns it."""
    jinja_account.charge_result(value)
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
      return _refuse_format_map
    pattern = value.__self__

    def wrapped(*args, **kwargs):
      jinja_charges.charge_format(pattern, [*args, *kwargs.values()])
      return method(*args, **kwargs)

    return wrapped

  def call(self, context, obj, /, *args, **kwargs):
    jinja_account.current().step()
    values = [*args, *kwargs.values()]
    if isinstance(obj, types.BuiltinMethodType) or isinstance(getattr(obj, "__self__", None), Markup):
      args = jinja_charges.charge_method(obj, args, values)
    elif not isinstance(obj, Macro):
      for value in values:
        jinja_account.charge_entries(value)
    result = super().call(context, obj, *args, **kwargs)
    jinja_account.charge_result(result)
    return result

  def call_binop(self, context, operator, left, right):
    account = jinja_account.current()
    account.step()
    if operator == "+" and type(left) is str and type(right) is str:  # the usual case, quickly
      account.make(len(left) + len(right))
      return left + right
    if operator == "*":
      jinja_charges.charge_product(left, right)
    elif operator == "**":
      jinja_charges.check_power(left, right)
    elif operator == "%" and isinstance(left, str):
      jinja_charges.charge_percent(left, right)
    elif operator == "+":
      jinja_charges.charge_sum(left, right)
    return super().call_binop(context, operator, left, right)


def _refuse_format_map(*args, **kwargs):
  jinja_charges.refuse("format_map")


def _count_loop(value: Any) -> None:
  """Charges one iteration of a loop; a filter, because `_parse` can insert nothing simpler."""
  jinja_account.current().step()


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a filter that charges the account."""
  passed = int(hasattr(function, "jinja_pass_arg"))  # the context or environment comes first

  def filtered(*args, **kwargs):
    account = jinja_account.current()
    account.step()
    is_plain = len(args) == passed + 1 and not kwargs and type(args[passed]) is str
    if is_plain and name in _CHEAP:  # the usual case, quickly
      account.make(2 * len(args[passed]))
      return function(*args)
    template_args = list(args[passed:])
    if template_args and isinstance(template_args[0], types.GeneratorType) and name not in SHALLOW:
      template_args[0] = jinja_account.collected(template_args[0])
    jinja_charges.charge_filter(name, template_args, kwargs)
    result = function(*args[:passed], *template_args, **kwargs)
    if isinstance(result, types.GeneratorType):
      return jinja_account.metered(result)
    jinja_account.charge_result(result)
    return result

  return _passing(function, filtered)


def _passing(function: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the wrapper, marked to get the same first argument from Jinja as the function: the context, say."""
  if hasattr(function, "jinja_pass_arg"):
    vars(wrapper)["jinja_pass_arg"] = function.jinja_pass_arg
  return wrapper


def _counted_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a test that charges the account."""

  def tested(*args, **kwargs):
    jinja_account.current().step()
    if name not in PLAIN_TESTS:
      for value in args:
        if not isinstance(value, str | int | float | None | jinja2.Environment):
          jinja_account.charge_depth(value)
    return function(*args, **kwargs)

  return _passing(function, tested)


def _tojson(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
  # Jinja's own filter escapes what HTML would read as a tag.
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
