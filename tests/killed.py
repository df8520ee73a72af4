"""What a kill at each write of some work would leave, and that the same work goes on from there to the same end."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from alignjax.system import output
from tests import smoke


def at_every_write(
  root: Path, work: Callable[[], object], expected: Callable[[Path], object] = smoke.files, most: int = 1000
) -> int:
  """Asserts that `work` ends the same after a kill at each of its writes, and returns how many of them differ.

  A kill leaves what is on disk at that moment: so the folder is copied there, in one undisturbed call. Two kills that
  leave the same are one.

  Args:
    root: a folder that is not there; `work` writes in it alone.
    work: what a command does; it is called again after each kill.
    expected: of the folder at the end: what must be the same.
    most: moments that are tried, evenly spread.
  """
  aside = root.with_name(f"{root.name}.moments")
  moments: dict[str, Path] = {}

  def copy(what: str, path: str) -> None:
    name = f"{len(moments):04}-{what}"
    if not root.exists():
      return
    found = smoke.files(root)
    found = {name: b"" if name.endswith(output.LOCK) else content for name, content in found.items()}
    folders = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir())
    key = hashlib.sha256(repr((found, folders)).encode()).hexdigest()
    if key not in moments:
      moments[key] = Path(shutil.copytree(root, aside / name, symlinks=True))

  no_sync = mock.patch("os.fsync")  # what is on disk at a kill is in the page cache; a power cut is another matter
  with mock.patch.object(output, "_point", copy), no_sync:
    work()
  whole = expected(root)
  assert moments, "nothing was written"
  chosen = list(moments.values())[:: -(-len(moments) // most)]
  for moment in chosen:
    shutil.rmtree(root)
    shutil.copytree(moment, root, symlinks=True)
    with no_sync:
      work()
    assert expected(root) == whole, f"killed at {moment.name}"
    left = [name for name in smoke.files(root) if name.endswith((output.PARTIAL, output.LOCK))]
    assert not left, f"killed at {moment.name}: {left}"
  shutil.rmtree(aside)
  return len(chosen)
