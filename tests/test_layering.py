"""The house rules: imports point downwards, a name says what a file holds, a function what it does."""

import ast
import functools
import gc
import graphlib
import importlib.util
from pathlib import Path

import pytest

from alignjax.algorithms import ALGORITHMS
from tests.density import of_folder

ROOT = Path(importlib.util.find_spec("alignjax").origin).parent

# From the roof down; a room, or a file of the root, imports only what stands below it.
ORDER = (
  "cli",
  "commands",
  "serving",
  "release",
  "report",
  "preflight",
  "train",
  "feedback",
  "evaluation",
  "runs",
  "training",
  "algorithms",
  "sampling",
  "rewards",
  "environments",  # below `rewards`, which name the testbed's gold
  "data",
  "model",
  "losses",
  "system",
  "types",
  "errors",
)
ROOT_MODULES = {"__init__", "cli", "train", "types", "errors"}
ROOMS = [part for part in ORDER if part not in ROOT_MODULES]
FREE_OF_JAX = ("data", "environments", "rewards")
JAX_FAMILY = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
VAGUE = {"utils", "util", "base", "common", "misc", "helpers", "manager"}

MODULES = {
  ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
  for path in sorted(ROOT.rglob("*.py"))
}


@functools.cache
def tree(name):
  """The syntax tree of a module, which is parsed when it is first asked for."""
  collects = gc.isenabled()
  gc.disable()  # a finalizer that prints a traceback parses too, and Python 3.11's parser may not be entered twice
  try:
    return ast.parse(MODULES[name].read_text())
  finally:
    if collects:
      gc.enable()


def imports(name):
  """(line, full name) of everything that a module imports, at any depth of its code."""
  for node in ast.walk(tree(name)):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name}:{node.lineno}: write imports in full"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield node.lineno, full if full in MODULES else node.module


def part(name):
  """The name in `ORDER` that a module of the package belongs to; "" for the package itself."""
  return f"{name}.".split(".")[1]


def test_the_package_has_its_rooms_and_five_files():
  assert {path.stem for path in ROOT.glob("*.py")} == ROOT_MODULES, "a module belongs to a room"
  assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= {*ROOMS}, "no room of this name"


@pytest.mark.parametrize("room", [room for room in ROOMS if f"alignjax.{room}" in MODULES])
def test_a_room_says_what_lives_there_what_may_come_in_and_what_it_may_import(room):
  said = ast.get_docstring(tree(f"alignjax.{room}"))
  assert len(said.splitlines()) >= 3
  assert "may import" in said


@pytest.mark.parametrize("room", [room for room in ROOMS if f"alignjax.{room}" in MODULES])
def test_the_files_of_a_room_have_no_circle(room):
  files = {name for name in MODULES if part(name) == room}
  edges = {name: {imported for _, imported in imports(name) if imported in files} for name in files}
  graphlib.TopologicalSorter(edges).prepare()  # CycleError names the circle


@pytest.mark.parametrize("name", [name for name in MODULES if part(name)])
def test_imports_point_downwards(name):
  for line, imported in imports(name):
    if imported.split(".")[0] != "alignjax":
      continue
    assert part(imported), f"{name}:{line}: import the module itself, not a public name of alignjax"
    if part(imported) != part(name):
      assert ORDER.index(part(imported)) > ORDER.index(part(name)), f"{name}:{line}: {imported}"


def test_rooms_without_jax_do_not_reach_it():
  todo = [name for name in MODULES if part(name) in FREE_OF_JAX]
  reached = set(todo)
  while todo:
    name = todo.pop()
    for line, imported in imports(name):
      assert imported.split(".")[0] not in JAX_FAMILY, f"{name}:{line}: {imported}"
      if imported in MODULES and imported not in reached:
        reached.add(imported)
        todo.append(imported)


def test_a_runs_directory_is_read_without_the_algorithms():
  """`ALGORITHMS` imports the one that is asked for."""
  todo, reached = ["alignjax.runs.workdir"], set()
  while todo:
    name = todo.pop()
    reached.add(name)
    found = {name.rpartition(".")[0], *(imported for _, imported in imports(name))}  # its package is run before it
    todo += [imported for imported in found if imported in MODULES and imported not in reached]
  assert not reached & {f"alignjax.algorithms.{name}" for name in ALGORITHMS}


def test_no_file_has_a_name_that_says_nothing():
  assert not [name for name in MODULES if VAGUE & set(name.split(".")[-1].split("_"))]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_class_says_what_it_does(name):
  definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  public = [node for node in tree(name).body if isinstance(node, definitions) and not node.name.startswith("_")]
  silent = [f"{node.name} (line {node.lineno})" for node in public if not ast.get_docstring(node)]
  assert not silent, f"{name}: no docstring on {', '.join(silent)}"


@pytest.mark.parametrize("name", [name for name in MODULES if part(name)])
def test_every_module_says_what_it_holds(name):
  assert ast.get_docstring(tree(name)), f"{name}: no docstring at the top"


def test_the_code_is_no_denser_than_half_of_what_it_was():
  """Conditional expressions, packed assignments and named lambdas for 1,000 lines; they were 20, 10.2 and 7.0."""
  rates = of_folder(ROOT).rates()
  assert rates["conditionals"] <= 10
  assert rates["packed"] <= 5.1
  assert rates["lambdas"] <= 3.5
