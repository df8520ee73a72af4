"""Where a result comes from: versions, commit, device."""

import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess

PACKAGES = ("alignjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that a number may depend on."""
  found = {"python": platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "not installed"  # a source tree on the path
  return found


def source() -> str:
  """A digest of the package's code as it lies on this machine, in 12 hex digits: a copy need not know its commit."""
  root = pathlib.Path(__file__).parents[1]
  content = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    content.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
  return content.hexdigest()[:12]


def commit() -> str:
  """The git commit of the source tree, "+dirty" if files but results differ from it; "unknown" outside of one."""
  root = pathlib.Path(__file__).parents[2]

  def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()

  try:
    dirty = "+dirty" if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results") else ""
    return git("rev-parse", "--short=12", "HEAD") + dirty
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
