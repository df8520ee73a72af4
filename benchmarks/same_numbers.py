"""Does this commit compute, bit for bit, what another one computes?

  python -m benchmarks.same_numbers --against 006a525

Checks the other commit out beside this one and runs the same commands with the code and the configs of each: every
`configs/NAME.py:smoke`, and one short `sweep`, `iterate`, `retrain` and `best-of`. Of each command it compares
metrics.jsonl, the records that were written, and the table of fingerprints of the last checkpoint (parameters,
optimizer state, counters, key). Prints what differs, writes results/same_numbers.json; exits with 1 if anything does.

Both share one compilation cache (run.compile_cache): where the programs are the same, they are compiled once. Each has
a cache of its own of what it has read of the data.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import result
from benchmarks.kill_resume import NEEDED, ROOT, SAMPLES, commands, differences, outcome

SIDES = ("other", "these")  # of one length: a path shows in some records, and its length in what is printed


def smokes(tree: pathlib.Path) -> list[str]:
  """Names of the configs of a tree that have a smoke run."""
  return sorted(path.stem for path in (tree / "configs").glob("*.py") if path.stem != "shared")


def command(job: str, tree: pathlib.Path, folder: pathlib.Path) -> list[str]:
  """The arguments of `alignjax` for one job: a config's name, or a verb; verbs begin with runs of `folder`."""
  if job in ("policy", *NEEDED):
    return commands(job, folder / job, folder, tree)
  config = lambda name: ["--config", f"{tree / 'configs' / name}.py:smoke"]
  workdir = ["--workdir", str(folder / job)]
  if job == "sweep":
    return ["sweep", *config("dpo_lora"), *workdir, "--sweep", "beta=0.05,0.2", "--config.run.steps=3"]
  if job == "best-of":
    prompts = ["--prompts", str(tree / "configs" / "smoke" / "preference.jsonl")]
    files = ["--workdir", str(folder / "policy"), *prompts, "--out", str(folder / job / "best.jsonl")]
    return ["best-of", *files, *SAMPLES]
  return ["train", *config(job), *workdir]


def run(arguments: Sequence[str], tree: pathlib.Path, log: pathlib.Path) -> str:
  """Runs `alignjax` of a tree; returns "" or why it failed, in a line."""
  environment = os.environ | {"PYTHONPATH": str(tree), "ALIGNJAX_CACHE": str(log.parent / "cache")}
  with log.open("w") as output:
    done = subprocess.run(
      [sys.executable, "-m", "alignjax.cli", *arguments], cwd=tree, env=environment, stdout=output, stderr=output
    )
  lines = log.read_text().strip().splitlines()
  return "" if done.returncode == 0 else f"status {done.returncode}: {lines[-1] if lines else 'it said nothing'}"


def metrics_that_differ(left: str, right: str) -> dict[str, Any]:
  """The names whose values differ, each with its first step and both values there; lines beyond the shorter count."""
  different: dict[str, Any] = {}
  rows = [[json.loads(line) for line in text.splitlines()] for text in (left, right)]
  for one, two in zip(*rows, strict=False):
    for name in sorted({*one, *two}):
      if json.dumps(one.get(name)) != json.dumps(two.get(name)):  # NaN is NaN
        different.setdefault(name, {"step": one.get("step"), "values": [one.get(name), two.get(name)]})
  if len(rows[0]) != len(rows[1]):
    different["lines"] = [len(part) for part in rows]
  return different


def compared(folders: Sequence[pathlib.Path], job: str) -> dict[str, Any]:
  """What one job left in both folders: how many things were compared, and those that differ."""
  outcomes = [outcome(folder / job) for folder in folders]
  for folder, found in zip(folders, outcomes, strict=True):
    if (best := folder / job / "best.jsonl").exists():
      found["best.jsonl"] = best.read_text()
  names = differences(*outcomes, (folders[0], folders[1]))
  texts = [name for name in names if ": metrics" in name]
  metrics = {name: metrics_that_differ(*(found.get(name, "") for found in outcomes)) for name in texts}
  return {
    "compared": len({*outcomes[0], *outcomes[1]}),
    "different": [name for name in names if name not in texts],
    "metrics": {name: values for name, values in metrics.items() if values},  # not where only the order of keys differs
  }


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[pathlib.Path]:
  """A folder with the files of a commit, removed afterwards."""
  git = ["git", "-C", str(ROOT)]
  with tempfile.TemporaryDirectory(prefix="same_numbers_tree_") as folder:
    tree = pathlib.Path(folder) / "tree"
    subprocess.run([*git, "worktree", "add", "--detach", str(tree), commit], check=True, capture_output=True)
    try:
      yield tree
    finally:
      subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True, capture_output=True)


def main() -> int:
  """Runs every job on both sides, compares, writes the result."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--against", required=True, help="the other commit")
  parser.add_argument("--jobs", default="", help="names of configs and verbs, comma-separated; all if empty")
  parser.add_argument(
    "--keep", default="", help="a new folder for the runs and their logs; one that is removed if empty"
  )
  arguments = parser.parse_args()
  verbs = ("sweep", "iterate", "retrain", "best-of")
  jobs = arguments.jobs.split(",") if arguments.jobs else [*smokes(ROOT), *verbs]
  needed = NEEDED | {"best-of": ("policy",)}
  for name in reversed([name for job in jobs for name in needed.get(job, ())]):
    jobs = [name, *(job for job in jobs if job != name)]
  found: dict[str, Any] = {}
  with contextlib.ExitStack() as stack:
    tree = stack.enter_context(checked_out(arguments.against))
    if arguments.keep:
      scratch = pathlib.Path(arguments.keep).absolute()
    else:
      scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same_numbers_")))
    folders = [scratch / side for side in SIDES]
    if any(folder.exists() for folder in folders):
      parser.error(f"--keep {arguments.keep} holds an earlier comparison; name another folder")
    for folder in folders:
      (folder / "best-of").mkdir(parents=True, exist_ok=True)
    for job in jobs:
      sides = zip(SIDES, (tree, ROOT), folders, strict=True)
      failed = {side: run(command(job, at, to), at, to / f"{job}.log") for side, at, to in sides}
      failed = {side: why for side, why in failed.items() if why}
      found[job] = {"failed": failed} if failed else compared(folders, job)
      found[job]["same"] = not any(found[job].get(key) for key in ("failed", "different", "metrics"))
      told = {key: value for key, value in found[job].items() if key in ("failed", "different", "metrics") and value}
      print(f"{job}: {'the same' if found[job]['same'] else json.dumps(told)}", flush=True)
    commit = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
  print(result.write("same_numbers", {"against": commit.stdout.strip(), "jobs": found}))
  return 0 if all(job["same"] for job in found.values()) else 1


if __name__ == "__main__":
  sys.exit(main())
