"""The house rules: imports point downwards, a name says what a file holds, a function what it does."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(importlib.util.find_spec("alignjax").origin).parent

# From the bottom up; a part imports only what stands before it. A new module takes its place here.
LAYERS = (
  ("errors", "reading", "trust", "output", "ranges", "types", "host_memory", "hosts", "sharding", "hub"),
  ("losses", "model"),
  ("data", "testbed"),
  ("rewards",),
  ("offload", "optim", "train_step", "generate", "generate_queue", "generate_stream", "algorithms", "evaluation"),
  ("fingerprint", "stored", "constant_tree", "earlier", "checkpoint"),
  ("metrics", "preemption", "early_stop", "profiling", "provenance"),
  ("prepare", "config", "defaults", "learner", "workdir", "assembly", "starting_point", "run", "new_run"),
  ("parts", "scoring", "best_of", "completions", "chat_session"),
  ("adapter", "export", "domain", "reference_cache", "train", "members", "preflight"),
  ("rounds", "report", "sweep", "quickstart", "iterate", "retrain", "arguments", "cli"),
)
ORDER = [part for layer in LAYERS for part in layer]
FREE_OF_JAX = ("data", "testbed", "rewards")
JAX_FAMILY = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
VAGUE = {"utils", "util", "base", "common", "misc", "helpers", "manager"}

MODULES = {
  ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
  for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(name):
  """(line, full name) of everything that a module imports, at any depth of its code."""
  for node in ast.walk(TREES[name]):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name}:{node.lineno}: write imports in full"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield node.lineno, full if full in MODULES else node.module


def part(name):
  """The name in `LAYERS` that a module of the package belongs to; "" for the package itself."""
  return f"{name}.".split(".")[1]


def test_every_part_has_a_place_in_the_order():
  unplaced = {part(name) for name in MODULES} - {*ORDER, ""}
  assert not unplaced, f"give {sorted(unplaced)} a place in LAYERS"


@pytest.mark.parametrize("name", [name for name in MODULES if part(name)])
def test_imports_point_downwards(name):
  for line, imported in imports(name):
    if imported.split(".")[0] != "alignjax":
      continue
    assert part(imported), f"{name}:{line}: import the module itself, not a public name of alignjax"
    if part(imported) != part(name):
      assert ORDER.index(part(imported)) < ORDER.index(part(name)), f"{name}:{line}: {imported}"


def test_data_testbed_and_rewards_do_not_reach_jax():
  todo = [name for name in MODULES if part(name) in FREE_OF_JAX]
  reached = set(todo)
  while todo:
    name = todo.pop()
    for line, imported in imports(name):
      assert imported.split(".")[0] not in JAX_FAMILY, f"{name}:{line}: {imported}"
      if imported in MODULES and imported not in reached:
        reached.add(imported)
        todo.append(imported)


def test_no_file_has_a_name_that_says_nothing():
  assert not [name for name in MODULES if VAGUE & set(name.split(".")[-1].split("_"))]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_class_says_what_it_does(name):
  definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  public = [node for node in TREES[name].body if isinstance(node, definitions) and not node.name.startswith("_")]
  silent = [f"{node.name} (line {node.lineno})" for node in public if not ast.get_docstring(node)]
  assert not silent, f"{name}: no docstring on {', '.join(silent)}"


@pytest.mark.parametrize("name", [name for name in MODULES if part(name)])
def test_every_module_says_what_it_holds(name):
  assert ast.get_docstring(TREES[name]), f"{name}: no docstring at the top"
