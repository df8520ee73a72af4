"""The tests' process: runs all tests in one namespace, in which the code's names are objects of the other process."""

import ast
import builtins
import importlib
import io
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import peer
import wire
from code_side import pipes_for_event_loops, worded

OWN = "__main__"  # the module of the tests
CODE = "generated"  # that of the code, which tests may import from
ALIASES = {"np": "numpy", "pd": "pandas", "dt": "datetime"}
OPEN_TYPES = ("_io", "unittest.mock")  # modules of the objects of tests whose public attributes the code may read
OF_MOCKS = ("configure_mock", "attach_mock", "mock_add_spec")  # they could make a mock equal to everything
_OUTPUT = sys.stdout
_INPUT_STREAM = sys.stdin
_INPUT = builtins.input


def main(pipe: peer.Pipe, tests: list[str], report: Callable[..., None]) -> bool:
  """Runs the tests and reports on each; returns whether the code's process still runs at the end."""
  try:
    error, names = _ready(pipe.receive())
  except peer.EndedError:
    return False
  report(test=0, error=error)
  if error:
    return True
  asked = peer.Peer(pipe, _permitted, _streams)
  module = sys.modules[OWN] = types.ModuleType(OWN)
  sys.modules[CODE] = _module_of_code(asked, names)
  sys.argv = ["tests"]
  if any("async" in text.lower() for text in tests):
    pipes_for_event_loops()
  bound: dict[str, Any] = {}
  for number, text in enumerate(tests, 1):
    try:
      tree = ast.parse(text)
      compiled = compile(tree, f"<test {number}>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as broken:
      report(broken=number, error=worded(broken))
      return True
    error = ""
    try:
      _bind(asked, module, set(names).intersection(re.findall(r"\w+", text)), bound)
      _run(compiled, tree, module, "unittest" in text)
      asked.ask("len", "")  # raises if the code's process has ended
    except peer.EndedError:
      return False
    except BaseException as raised:
      error = worded(raised)
      if pipe.ended:
        return False
    report(test=number, error=error)
  return True


def _ready(said: Any) -> tuple[str, list[str]]:
  """Error and names of the code."""
  if not (isinstance(said, list) and len(said) == 2 and isinstance(said[0], str) and isinstance(said[1], list)):
    raise peer.EndedError("no report of the code")
  return said[0][:200], [name for name in said[1] if isinstance(name, str)]


def _bind(asked: peer.Peer, module: types.ModuleType, names: set[str], bound: dict[str, Any]) -> None:
  """Gives the tests' namespace the code's names that they use; the tests' own definitions stay."""
  # A built-in that the code redefines (abs, say) is not taken from it, unless it is all that the test uses: the code
  # would learn the distance of its result from the expected one.
  own_names = names.difference(dir(builtins))
  for name in sorted(own_names or names):
    if name.startswith("__") or (name in vars(module) and vars(module)[name] is not bound.get(name)):
      continue
    kind, full_name, value = asked.ask("name", name)
    if kind == "module" and full_name in (name, ALIASES.get(name)):
      value = _own_module(full_name) or value
    bound[name] = value
    vars(module)[name] = value


def _module_of_code(asked: peer.Peer, names: list[str]) -> types.ModuleType:
  """Returns a module whose names are requested from the code's process when they are used."""

  def get(name: str) -> Any:
    if name not in names:
      raise AttributeError(f"the code defines no {name}")
    return asked.ask("name", name)[2]

  module = types.ModuleType(CODE)
  vars(module)["__getattr__"] = get
  vars(module)["__all__"] = [name for name in names if not name.startswith("_")]
  return module


def _own_module(name: str) -> types.ModuleType | None:
  """Returns a module imported in this process; None if that fails."""
  try:
    return importlib.import_module(name)
  except Exception:
    return None


def _run(compiled: types.CodeType, tree: ast.Module, module: types.ModuleType, with_unittest: bool) -> None:
  """Runs a text, and the tests that it defines without running them; raises if one fails."""
  before = {id(value) for value in vars(module).values()}
  results = _collect_results() if with_unittest else []
  exited = False
  try:
    exec(compiled, vars(module))
  except SystemExit as error:  # of unittest.main
    if isinstance(error, peer.CodeExit) or error.code or not any(result.testsRun for result in results):
      raise
    exited = True
  if with_unittest:
    _check_unittest(module, before, results)
  if not exited:
    for name in _uncalled(tree):
      vars(module)[name]()


def _collect_results() -> list:
  """Returns a list to which every result of unittest is added from now on."""
  import unittest

  results = []
  begin = vars(unittest.TestResult).get("_begin", unittest.TestResult.__init__)

  def begin_and_keep(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    results.append(self)

  for name, method in {"_begin": begin, "__init__": begin_and_keep}.items():
    setattr(unittest.TestResult, name, method)
  return results


def _check_unittest(module: types.ModuleType, before: set[int], results: list) -> None:
  """Raises if a test of unittest failed or none ran."""
  import unittest

  if not any(result.testsRun for result in results):
    cases = [
      value
      for value in vars(module).values()
      if isinstance(value, type) and issubclass(value, unittest.TestCase) and value.__module__ == OWN
      and id(value) not in before
    ]  # fmt: skip
    if not cases and not results:
      return
    loader = unittest.TestLoader()
    unittest.TestSuite(map(loader.loadTestsFromTestCase, cases)).run(unittest.TestResult())
  for result in results:
    for case, trace in [*result.failures, *result.errors]:
      raise AssertionError(f"{case}: {trace.strip().splitlines()[-1]}")
    if not result.wasSuccessful():
      raise AssertionError("unittest: a test passed that was expected to fail")
  if not sum(result.testsRun - len(result.skipped) for result in results):
    raise AssertionError("unittest ran no test")


def _uncalled(tree: ast.Module) -> list[str]:
  """Functions test_... that a text defines and never names, which pytest would run."""
  named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
  return [
    node.name
    for node in tree.body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test") and node.name not in named
  ]


def _streams() -> dict[str, Any]:
  """Returns the standard streams that a test has replaced."""
  replaced: dict[str, Any] = {}
  if sys.stdout is not _OUTPUT:
    replaced["capture"] = True
  if sys.stdin is not _INPUT_STREAM and isinstance(sys.stdin, io.StringIO):
    replaced["stdin"] = sys.stdin.getvalue()[sys.stdin.tell() :]
  if builtins.input is not _INPUT:
    replaced["input"] = builtins.input
  return replaced


def _permitted(verb: str, values: list) -> bool:
  """Returns whether the code may request this of an object of the tests; nothing that leads to a frame or a module."""
  target = next(iter(values), None)
  name = next(iter(values[1:]), None)
  module = type(target).__module__
  if verb == "call":  # no built-in class: with `type`, code could make one here that is equal to everything
    is_python_class = isinstance(target, type) and (wire.is_builtin(target) or issubclass(target, type))
    return callable(target) and not is_python_class
  if verb in ("getattr", "setattr"):
    if not isinstance(name, str) or name.startswith("_") or name in OF_MOCKS:
      return False
    return module == OWN or (verb == "getattr" and module in OPEN_TYPES)
  if verb in ("iter", "next", "len", "bool", "str", "repr", "hash", "eq", "ne", "plain"):
    return module == OWN or module in OPEN_TYPES or hasattr(target, "__next__") or isinstance(target, str)
  return module == OWN and verb in peer.ASKED
