"""Nothing in the package writes but through output.py, and every command that writes says at once that it cannot."""

import ast
from pathlib import Path

import pytest

from tests.test_layering import MODULES, tree

# What writes by itself, and why it may.
ALLOWED = {
  "alignjax.system.output": "is what writes",
  "alignjax.system.disk": "makes folders for output.py, and tries to write in them",
  "alignjax.system.holding": "makes files that output.py writes",
  "alignjax.training.metrics": "appends lines, which are cut back to the checkpoint that a run continues from",
  "alignjax.data.source": "fills a folder of the cache, which data/cache.py puts in its place as a whole",
  "alignjax.data.census": "fills a folder of the cache",
  "alignjax.data.loader": "fills a folder of the cache",
  "alignjax.data.cache": "makes a folder of its own name, for several processes may fill it at once",
  "alignjax.model.flax": "replaces variables, no files",
  "alignjax.report.figure": "draws into memory",
  "alignjax.report.sweep": "draws into memory",
  "alignjax.serving.votes": "appends lines, each of which is on the disk before its vote is answered",
  "alignjax.data.score_store": "makes the folder of a SQLite file, which has a journal of its own",
}
SANDBOX = "alignjax.rewards."  # writes what the code that it runs is to find: nothing of a user's
WRITES = {
  "write_text", "write_bytes", "savefig", "touch", "rename", "renames", "symlink_to", "hardlink_to", "mkdtemp",
  "mkstemp", "copytree", "copyfile", "copy2", "copyfileobj", "rmtree", "savez", "tofile", "to_parquet",
  "mkdir", "makedirs",
}  # fmt: skip
OF_MODULES = {
  ("json", "dump"),
  ("pickle", "dump"),
  ("np", "save"),
  ("shutil", "copy"),
  ("shutil", "move"),
  ("os", "open"),
  ("os", "replace"),
}


def written(tree):
  """(line, what) of the calls of a module that write."""
  for node in ast.walk(tree):
    if not isinstance(node, ast.Call):
      continue
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    of = called.value.id if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) else ""
    if of == "output":
      continue
    if name in WRITES or (of, name) in OF_MODULES:
      yield node.lineno, name
    elif name == "open":
      given = [*node.args[: 2 if isinstance(called, ast.Name) else 1], *(k.value for k in node.keywords)]
      modes = [value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str)]
      if any(len(mode) < 4 and set(mode) & set("wax+") for mode in modes):
        yield node.lineno, name
    elif name == "replace" and isinstance(called, ast.Attribute) and _is_path(node):
      yield node.lineno, name


def _is_path(call):
  """Whether a call of `replace` is that of a path: a string's has two arguments, a dataclass's keywords, and a config's
  is a dict or what is called `overrides`."""
  if len(call.args) != 1 or call.keywords:
    return False
  argument = call.args[0]
  return not (isinstance(argument, ast.Dict) or (isinstance(argument, ast.Name) and argument.id == "overrides"))


def test_what_writes_is_found():
  source = """
path.write_text("x")
open("a", "wb")
path.open("a")
partial.replace(path)
json.dump(x, file)
"""
  assert len(list(written(ast.parse(source)))) == 5
  assert not list(
    written(ast.parse("""open(p); p.open("rb"); "a".replace("a", "b"); c.replace(x=1); output.write(p)"""))
  )


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ALLOWED and not name.startswith(SANDBOX)])
def test_everything_is_written_through_output(name):
  found = list(written(tree(name)))
  assert not found, (
    f"{Path(MODULES[name]).name}: {found}: use alignjax/system/output.py, which a kill cannot leave half done"
  )


def test_no_module_is_allowed_for_nothing():
  assert not [name for name in ALLOWED if not list(written(tree(name)))]
