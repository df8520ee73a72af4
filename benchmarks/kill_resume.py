"""Does a run that is killed again and again end exactly as one that never was?

  python -m benchmarks.kill_resume --kills 20

Starts `alignjax train` over and over and ends it with SIGKILL at random moments: at start-up, in a step, in a save, in
the deletion of an old checkpoint. When it has completed, the last checkpoint's fingerprints (parameters, optimizer
state, counters, key) and metrics.jsonl must be those of an uninterrupted run, bit for bit. A run that completes before
the kills are used up is followed by another. Writes results/kill_resume.json; exits with 1 if anything differs.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import result

OVERRIDES = ("run.steps=40", "run.save_every=3", "run.eval_every=20", "run.log_every=1")


def command(config: str, workdir: pathlib.Path, overrides: list[str]) -> list[str]:
  """The run of `config` in `workdir`; later overrides win."""
  flags = [f"--config.{override}" for override in (*OVERRIDES, *overrides)]
  return [sys.executable, "-m", "alignjax.train", "--config", config, "--workdir", str(workdir), *flags]


def complete(
  arguments: list[str], workdir: pathlib.Path, kills: int, within_s: float, rng: random.Random
) -> list[dict[str, Any]]:
  """Runs the command until it completes; returns each kill, at most `kills`: its second, the newest step saved.

  Raises:
    RuntimeError: the run failed by itself.
  """
  done, log = [], log_of(workdir)  # the first third of a life is imports: a kill there tells nothing
  while True:
    life = rng.uniform(within_s / 3, within_s) if len(done) < kills else None
    with log.open("a") as output:
      process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
      try:
        status = process.wait(timeout=life)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        done.append({"after_s": round(life, 2), "saved_step": max(steps(workdir), default=None)})
        continue
    if status != 0:
      raise RuntimeError(f"the run failed with status {status}; see {log}:\n{log.read_text()[-2000:]}")
    return done


def log_of(workdir: pathlib.Path) -> pathlib.Path:
  """Where the output of every life of a run goes."""
  return workdir.with_suffix(".log")


def steps(workdir: pathlib.Path) -> list[int]:
  """The steps that a run has saved."""
  return [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
  """The last checkpoint's step, its table of fingerprints, and the text of metrics.jsonl."""
  step = max(steps(workdir))
  record = json.loads((workdir / "checkpoints" / str(step) / "record" / "data.json").read_text())
  return {"step": step, "arrays": record["arrays"], "metrics": (workdir / "metrics.jsonl").read_text()}


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
  """What is not the same in two outcomes."""
  names = sorted({*left["arrays"], *right["arrays"]})
  arrays = [name for name in names if left["arrays"].get(name) != right["arrays"].get(name)]
  return arrays + [name for name in ("step", "metrics") if left[name] != right[name]]


def main() -> int:
  """Kills, compares, writes the result."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default="configs/sft.py:smoke", help="what to run")
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of the config")
  arguments = parser.parse_args()

  rng = random.Random(arguments.seed)
  runs: list[dict[str, Any]] = []
  with tempfile.TemporaryDirectory(prefix="kill_resume_") as scratch:
    folder = pathlib.Path(scratch)

    def run(name: str, kills: int, within_s: float) -> list[dict[str, Any]]:
      return complete(command(arguments.config, folder / name, arguments.set), folder / name, kills, within_s, rng)

    run("warm", 0, 0.0)  # fills the compilation cache, so that kills find the run at work and not in the compiler
    began = time.monotonic()
    run("whole", 0, 0.0)
    whole_s = time.monotonic() - began
    expected = outcome(folder / "whole")
    print(f"uninterrupted: {expected['step']} steps in {whole_s:.1f} s", flush=True)
    used = 0
    while used < arguments.kills:
      name = f"killed_{len(runs)}"
      kills = run(name, arguments.kills - used, whole_s)
      used += len(kills)
      different = differences(expected, outcome(folder / name))
      skipped = log_of(folder / name).read_text().count("is skipped:")
      runs.append({"kills": kills, "skipped_checkpoints": skipped, "different": different})
      print(f"{name}: {len(kills)} kills, {different or 'identical'}", flush=True)

  identical = not any(run["different"] for run in runs)
  numbers = {
    "config": arguments.config,
    "steps": expected["step"],
    "arrays": len(expected["arrays"]),
    "uninterrupted_s": round(whole_s, 1),
    "kills": used,
    "identical": identical,
    "runs": runs,
  }
  print(result.write("kill_resume", numbers))
  return 0 if identical else 1


if __name__ == "__main__":
  sys.exit(main())
