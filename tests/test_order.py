"""Hosts of one run do the same things in the same order: nothing takes its order from a set or from a folder's listing.

The order of a set of strings differs from process to process (PYTHONHASHSEED), that of a listing from disk to disk.
"""

import ast

import pytest

from alignjax.algorithms import online_preference
from alignjax.model import ModelConfig, decoder
from tests import made
from tests.test_layering import MODULES, tree

ORDERLESS = {"sorted", "set", "frozenset", "len", "min", "max", "any", "all", "sum", "bool", "dict.fromkeys"}
LISTINGS = {"iterdir", "glob", "rglob", "listdir", "scandir"}
MODEL = decoder.make(ModelConfig(vocab=8))
TAKERS = {"tuple", "list", "enumerate", "map", "zip", "iter", "next", "reversed", "filter"}


def is_keys(node):
  return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "keys"


def is_set(node, known):
  """Whether an expression is a set, as far as its own text and the names bound to sets around it say."""
  if isinstance(node, ast.Set | ast.SetComp):
    return True
  if isinstance(node, ast.Name):
    return node.id in known
  if isinstance(node, ast.NamedExpr):
    return is_set(node.value, known)
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.BitAnd | ast.Sub | ast.BitXor):
    sides = (node.left, node.right)
    if isinstance(node.op, ast.BitOr):
      return all(is_set(side, known) or is_keys(side) for side in sides)
    return any(is_set(side, known) or is_keys(side) for side in sides)
  if isinstance(node, ast.Call):
    name = ast.unparse(node.func)
    return name in ("set", "frozenset") or name.endswith((".union", ".intersection", ".difference"))
  return False


def is_listing(node):
  return isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in LISTINGS


def bound_to_sets(function):
  """Names that a function (or a module's top) binds to a set."""
  found = set()
  for node in ast.walk(function):
    pairs = []
    if isinstance(node, ast.Assign):
      pairs = [(target, node.value) for target in node.targets]
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value:
      pairs = [(node.target, node.value)]
    for target, value in pairs:
      if isinstance(target, ast.Name) and is_set(value, found):
        found.add(target.id)
  return found


def unordered(tree):
  """Lines where something is taken one by one from a set or a listing in whatever order it has."""
  functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
  top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])
  parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
  harmless = {  # a comprehension whose own order is lost again
    node
    for node in ast.walk(tree)
    if isinstance(node, ast.GeneratorExp | ast.ListComp)
    and isinstance(parents.get(node), ast.Call)
    and ast.unparse(parents[node].func) in ORDERLESS
  }
  for scope in (*functions, top):
    known = bound_to_sets(scope) | bound_to_sets(top)
    for node in ast.walk(scope):
      taken = []
      if isinstance(node, ast.For):
        taken = [node.iter]
      elif isinstance(node, ast.GeneratorExp | ast.ListComp | ast.DictComp) and node not in harmless:
        taken = [generator.iter for generator in node.generators]
      elif isinstance(node, ast.Starred) and not isinstance(parents.get(node), ast.Set):
        taken = [node.value]
      elif isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name in TAKERS or name.endswith(".join"):
          taken = node.args
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "pop" and not node.args:
          taken = [node.func.value]
      for expression in taken:
        if is_set(expression, known) or is_listing(expression):
          yield node.lineno


@pytest.mark.parametrize("name", MODULES)
def test_nothing_takes_its_order_from_a_set(name):
  lines = sorted({*unordered(tree(name))})
  assert not lines, f"{name}: lines {lines}: sort it, or use dict.fromkeys"


@pytest.mark.parametrize(
  ("text", "caught"),
  [
    ("x = tuple({*a, 'b'})", True),
    ("def f(a):\n  b = set(a)\n  for c in b:\n    pass", True),
    ("for key in a.keys() & b.keys():\n  pass", True),
    ("', '.join(a.keys() - {'b'})", True),
    ("[p for p in folder.iterdir()]", True),
    ("if unknown := a.keys() - b.keys():\n  unknown.pop()", True),
    ("x = sorted({*a})", False),
    ("any(p for p in folder.iterdir())", False),
    ("tuple(dict.fromkeys([*a, 'b']))", False),
    ("for key in a | b:\n  pass", False),
  ],
)
def test_the_check_sees_what_it_is_for(text, caught):
  assert bool([*unordered(ast.parse(text))]) == caught


def test_the_trees_of_an_online_pair_stand_in_one_order():
  found = made.make(online_preference.RECIPE, MODEL, rewards="length", second="reference").reads
  assert found == ("reference",)
  judged = made.make(online_preference.RECIPE, MODEL, reward_model=MODEL).reads
  assert judged == ("reference", "reward_model")
