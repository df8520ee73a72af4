"""The origin of a result: versions and commit."""

import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess

PACKAGES = ("alignjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")


def versions() -> dict[str, str]:
  """Returns the versions of Python and of the packages on which a number may depend."""
  installed = {"python": platform.python_version()}
  for package in PACKAGES:
    try:
      installed[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      installed[package] = "not installed"  # a source tree on the path
  return installed


def source() -> str:
  """Returns a digest of the package's code on this machine, 12 hex digits, because a copy may not know its commit."""
  root = pathlib.Path(__file__).parents[1]
  content = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    content.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
  return content.hexdigest()[:12]


def commit() -> str:
  """Returns the git commit of the source tree, with "+dirty" if files other than results differ from it.

  Outside of a git repository it is "unknown".
  """
  root = pathlib.Path(__file__).parents[2]

  def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()

  try:
    head = git("rev-parse", "--short=12", "HEAD")
    if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"):
      return f"{head}+dirty"
    return head
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
