"""Does the post-training of published models fit the chips that people have, and what would limit it?

  python -m benchmarks.preflight --workdir runs/preflight [--only '8b-dpo*' ...] [--matrix]

`alignjax compile` of the runs of benchmarks/preflight_runs.py, each in a process of its own, which takes minutes; a run
whose file is in the workdir is not compiled again, and all that are there are written. The matrix (a night) is every
model on every topology. All numbers are the compiler's (libtpu, no TPU): estimates, never measurements.
Writes benchmarks/results/preflight.json, from which benchmarks/preflight_table.py draws the tables of docs/tpu.md.
"""

import argparse
import fnmatch
import json
import os
import pathlib
import subprocess
import sys

import jax

from alignjax.system import provenance
from benchmarks import result
from benchmarks.preflight_runs import ALL, matrix

ATTENTION = "attention"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--workdir", required=True, help="keeps what was compiled")
  parser.add_argument("--only", nargs="*", default=["*"], help="compile these alone, as '8b-dpo*'; none: write alone")
  parser.add_argument("--matrix", action="store_true", help="and every model on every topology")
  arguments = parser.parse_args()
  folder = pathlib.Path(arguments.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_platforms", "cpu")  # what is written of the device is the host that compiled
  cells = matrix()
  for name in (*ALL, ATTENTION):
    wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.only)
    if wanted and (arguments.matrix or name not in cells) and not _path(folder, name).exists():
      print(name, flush=True)
      compile_(folder, name)
  found = {name: _path(folder, name) for name in (*ALL, ATTENTION)}
  numbers = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
  question = "does the post-training of published models fit the chips that people have, and what would limit it?"
  what = "compiler estimates (libtpu), nothing was measured"
  written = {ATTENTION: numbers.pop(ATTENTION, {}), "runs": numbers}
  print("wrote", result.write("preflight", {"question": question, "what": what, **written}))


def compile_(folder: pathlib.Path, name: str) -> None:
  """Writes a run's file, with what was compiled and by which commit."""
  path, commit = _path(folder, name), provenance.commit()
  part = path.with_suffix(".part")
  command = [sys.executable, "-m", "alignjax.cli", "compile", *ALL.get(name, ()), "--json", str(part)]
  if name == ATTENTION:
    command = [sys.executable, "-m", "benchmarks.preflight_attention", str(part)]
  done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
  if done.returncode not in (0, 1) or not part.exists():  # 1: it does not fit, which is a result
    print(f"{name}: exit status {done.returncode}", flush=True)
    return
  numbers = json.loads(part.read_text()) | {"arguments": ALL.get(name, []), "commit": commit}
  part.write_text(json.dumps(numbers))
  part.rename(path)


def _path(folder: pathlib.Path, name: str) -> pathlib.Path:
  return folder / f"{name}.json"


if __name__ == "__main__":
  main()
