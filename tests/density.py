"""How dense the package's code is: conditional expressions, packed assignments and named lambdas per 1,000 lines.

  python -m tests.density [FOLDER ...]

A packed assignment is a tuple of targets
that takes a tuple of values; the unpacking of one value is none. A lambda in a table of functions has no name.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

from alignjax import __file__ as package


class Density(NamedTuple):
  """Counts of a text, or of several.

  Attributes:
    lines: all of them, as `wc -l` counts.
    conditionals: `x if condition else y`.
    packed: `a, b = x, y`.
    lambdas: `name = lambda ...`.
  """

  lines: int = 0
  conditionals: int = 0
  packed: int = 0
  lambdas: int = 0

  def __add__(self, other: "Density") -> "Density":
    return Density(*(mine + others for mine, others in zip(self, other, strict=True)))

  def rates(self) -> dict[str, float]:
    """Each count per 1,000 lines."""
    return {name: 1000 * getattr(self, name) / self.lines for name in ("conditionals", "packed", "lambdas")}


def density(source: str) -> Density:
  """The counts of one module."""
  nodes = list(ast.walk(ast.parse(source)))
  assignments = [node for node in nodes if isinstance(node, ast.Assign)]
  named = [node for node in nodes if isinstance(node, ast.AnnAssign)] + assignments
  return Density(
    lines=len(source.splitlines()),
    conditionals=sum(isinstance(node, ast.IfExp) for node in nodes),
    packed=sum(is_packed(node) for node in assignments),
    lambdas=sum(isinstance(node.value, ast.Lambda) for node in named),
  )


def is_packed(node: ast.Assign) -> bool:
  """Whether an assignment gives several values to several names."""
  return isinstance(node.value, ast.Tuple) and any(isinstance(target, ast.Tuple) for target in node.targets)


def of_folder(folder: Path) -> Density:
  """The counts of all modules in a folder."""
  return sum((density(path.read_text()) for path in sorted(folder.rglob("*.py"))), Density())


def main(folders: list[str]) -> None:
  """Prints a line for each folder: of the package and its rooms if none is given."""
  root = Path(package).parent
  rooms = [root, *sorted(path for path in root.iterdir() if (path / "__init__.py").exists())]
  for folder in [Path(name) for name in folders] or rooms:
    counts = of_folder(folder)
    rates = "  ".join(f"{name} {rate:5.1f}" for name, rate in counts.rates().items())
    print(f"{folder.name:14} {counts.lines:6} lines  {rates}")


if __name__ == "__main__":
  main(sys.argv[1:])
