"""Does a run that is killed again and again end exactly as one that never was?

  python -m benchmarks.kill_resume --kills 20

Starts a training over and over (`alignjax train` of SFT, a reward model, DPO and PPO; `alignjax iterate`; `alignjax
retrain`) and ends it with SIGKILL at random moments: at start-up, in a step, in a save, between two rounds. When it has
completed, the last checkpoints' fingerprints (parameters, optimizer state, counters, key), the metrics and the records
must be those of an uninterrupted run, bit for bit. A kill counts where the last checkpoint was not yet there. A run
that completes before the kills are used up is followed by another. Writes results/kill_resume.json after each kind;
exits with 1 if anything differs.

A life is a fork of this process, which has imported everything: so most of it is training.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from alignjax import cli
from alignjax.errors import exit_status
from alignjax.system import provenance
from benchmarks import result

ROOT = pathlib.Path(__file__).parents[1]
OVERRIDES = ("run.steps=40", "run.save_every=3", "run.eval_every=20", "run.log_every=1")
FEW = {
  "sft": ("run.steps=24", "run.save_every=2", "run.eval_every=12"),
  "reward": ("run.steps=24", "run.save_every=2", "run.eval_every=12"),
  "dpo": ("run.steps=24", "run.save_every=2", "run.eval_every=12"),
  "ppo": ("run.steps=8", "run.save_every=1", "run.eval_every=4"),
}
KINDS = (*FEW, "iterate", "retrain")
# What rounds begin with: a policy whose completions end by themselves, as those that are cut off are in no record.
POLICY = ("run.steps=24", "optimizer.learning_rate=0.01", "optimizer.schedule=constant", "run.eval_every=0")
NEEDED = {"iterate": ("policy",), "retrain": ("policy", "reward")}
SAMPLES = ("--n", "3", "--max-new-tokens", "16", "--reward", "regex", "--reward-settings", '{"pattern": "in|on"}')
ROUNDS = ("--rounds", "2", *SAMPLES)
RECORDS = ("records.jsonl", "pairs.jsonl", "train.jsonl", "round.json", "labelled.json", "summary.json")


def command(config: str, workdir: pathlib.Path, overrides: Sequence[str]) -> list[str]:
  """The arguments that train `config` in `workdir`; later overrides win."""
  flags = [f"--config.{override}" for override in (*OVERRIDES, *overrides)]
  return ["train", "--config", config, "--workdir", str(workdir), *flags]


def commands(kind: str, workdir: pathlib.Path, folder: pathlib.Path, root: pathlib.Path = ROOT) -> list[str]:
  """The arguments of a kind of run, with the configs of a checkout; rounds begin with the undisturbed runs in `folder`
  (`NEEDED`).
  """
  config = lambda name: f"{root / 'configs' / name}.py:smoke"
  if kind == "policy":
    return command(config("sft"), workdir, POLICY)
  if kind in FEW:
    return command(config(kind), workdir, FEW[kind])
  overrides = {"run.init": folder / "policy", "run.steps": 6, "run.save_every": 1, "run.eval_every": 0}
  if kind == "iterate":
    extra = ["--prompts-per-round", "16"]
    overrides |= {"data.holdout": 0.0}
  else:
    extra = ["--pairs-per-round", "96", "--reward-steps", "6"]  # some of them held out
    overrides |= {"algorithm.reward_model": folder / "reward", "algorithm.rewards": "reward_model"}
    overrides |= {"algorithm.reward_settings": "{}", "run.steps": 3}
  name = {"iterate": "iterative_dpo", "retrain": "rloo"}[kind]
  flags = [f"--config.{key}={value}" for key, value in overrides.items()]
  prompts = ["--prompts", str(root / "configs" / "smoke" / "preference.jsonl")]
  return [kind, "--config", config(name), "--workdir", str(workdir), *ROUNDS, *prompts, *extra, *flags]


class Forked:
  """A fork of this process that does something and ends, as `subprocess.Popen` has it."""

  def __init__(self, work: Callable[[], int], output):
    sys.stdout.flush()
    self.pid = os.fork()
    if self.pid == 0:
      os.dup2(output.fileno(), 1)
      os.dup2(output.fileno(), 2)
      status = 1
      try:
        status = work()
      finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

  def wait(self, timeout: float | None = None) -> int:
    """Its status when it has ended."""
    until = None if timeout is None else time.monotonic() + timeout
    while True:
      pid, status = os.waitpid(self.pid, os.WNOHANG)
      if pid:
        return os.waitstatus_to_exitcode(status)
      if until is not None and time.monotonic() > until:
        raise subprocess.TimeoutExpired("a fork", timeout)
      time.sleep(0.01)

  def kill(self) -> None:
    """Ends it by SIGKILL."""
    os.kill(self.pid, 9)


def forked(arguments: Sequence[str], output) -> Forked:
  """A life of a command in a fork of this process, which must not have looked for devices."""
  return Forked(lambda: exit_status(cli.main, list(arguments)), output)


def spawned(arguments: Sequence[str], output) -> subprocess.Popen:
  """A life of a command in a process of its own."""
  return subprocess.Popen([sys.executable, "-m", "alignjax.cli", *arguments], stdout=output, stderr=subprocess.STDOUT)


class Kill(NamedTuple):
  """One kill: its second of a life, what was saved, and whether that was less than all."""

  after_s: float
  saved: dict[str, int]
  counts: bool


def complete(
  arguments: Sequence[str],
  workdir: pathlib.Path,
  kills: int,
  within_s: float,
  rng: random.Random,
  start: Callable = spawned,
  least: float = 1 / 3,
  last: dict[str, int] | None = None,
) -> list[Kill]:
  """Runs the command until it completes; returns its kills, of which at most `kills` count.

  Args:
    arguments: of `alignjax`.
    workdir: where it writes.
    kills: that count.
    within_s: the longest life that is ended.
    rng: of the moments.
    start: begins a life.
    least: the share of `within_s` that a life has: what it takes until something happens that a kill can disturb.
    last: what an undisturbed run saved last; a kill counts before that, or always if None.

  Raises:
    RuntimeError: the run failed by itself.
  """
  done: list[Kill] = []
  log = log_of(workdir)
  while True:
    life = rng.uniform(least * within_s, within_s) if sum(kill.counts for kill in done) < kills else None
    with log.open("a") as output:
      process = start(arguments, output)
      try:
        status = process.wait(timeout=life)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        saved = newest(workdir)
        done.append(Kill(round(life, 2), saved, saved != last))
        continue
    if status != 0:
      raise RuntimeError(f"the run failed with status {status}; see {log}:\n{log.read_text()[-2000:]}")
    return done


def log_of(workdir: pathlib.Path) -> pathlib.Path:
  """Where the output of every life of a run goes."""
  return workdir.with_suffix(".log")


def newest(workdir: pathlib.Path) -> dict[str, int]:
  """The newest step that is saved, by run in a directory."""
  found = {}
  for folder in sorted(workdir.rglob("checkpoints")):
    with contextlib.suppress(ValueError):
      found[str(folder.parent.relative_to(workdir))] = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  return found


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
  """What must be the same: every run's last step, table of fingerprints and metrics; every file of records."""
  found: dict[str, Any] = {}
  for run, step in newest(workdir).items():
    record = json.loads((workdir / run / "checkpoints" / str(step) / "record" / "data.json").read_text())
    found[f"{run}: step"] = step
    found |= {f"{run}: {name}": row for name, row in record["arrays"].items()}
    if (metrics := workdir / run / "metrics.jsonl").exists():  # a sweep has none beside those of its members
      found[f"{run}: metrics"] = metrics.read_text()
  for name in RECORDS:
    found |= {str(path.relative_to(workdir)): path.read_text() for path in sorted(workdir.rglob(name))}
  return found


def differences(left: dict[str, Any], right: dict[str, Any], folders: Sequence[pathlib.Path] = ()) -> list[str]:
  """What is not the same in two outcomes; the names of their folders are no difference."""
  plain = lambda value: value.replace(str(folders[1]), str(folders[0])) if folders and isinstance(value, str) else value
  names = sorted({*left, *right})
  return [name for name in names if left.get(name) != plain(right.get(name))]


def tried(kind: str, folder: pathlib.Path, kills: int, rng: random.Random) -> dict[str, Any]:
  """The kills of one kind of run and what they changed; the undisturbed run is left in `folder`/`kind`."""
  for needed in NEEDED.get(kind, ()):
    if not (folder / needed).exists():
      complete(commands(needed, folder / needed, folder), folder / needed, 0, 0.0, rng, forked)
  arguments = lambda name: commands(kind, folder / name, folder)
  complete(arguments(f"{kind}-warm"), folder / f"{kind}-warm", 0, 0.0, rng, forked)  # fills the compilation cache
  began = time.monotonic()
  whole = folder / kind
  complete(arguments(kind), whole, 0, 0.0, rng, forked)
  whole_s = time.monotonic() - began
  expected, last = outcome(whole), newest(whole)
  runs: list[dict[str, Any]] = []
  used = 0
  while used < kills:
    name = f"{kind}-{len(runs)}"
    found = complete(arguments(name), folder / name, kills - used, whole_s, rng, forked, 0.1, last)
    used += sum(kill.counts for kill in found)
    different = differences(expected, outcome(folder / name), (whole, folder / name))
    skipped = log_of(folder / name).read_text().count("is skipped:")
    runs.append({"kills": [kill._asdict() for kill in found], "skipped_checkpoints": skipped, "different": different})
    print(f"{name}: {len(found)} kills, {different or 'identical'}", flush=True)
  return {
    "last": last,
    "compared": len(expected),
    "uninterrupted_s": round(whole_s, 1),
    "kills_before_the_last_checkpoint": used,
    "kills": sum(len(run["kills"]) for run in runs),
    "identical": not any(run["different"] for run in runs),
    "commit": provenance.commit(),
    "runs": runs,
  }


def main() -> int:
  """Kills, compares, writes the result."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--kinds", default=",".join(KINDS), help="what to run; of others the result stays, with its commit"
  )
  parser.add_argument("--kills", type=int, default=20, help="of each kind, before its last checkpoint")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  arguments = parser.parse_args()
  kinds = arguments.kinds.split(",")
  before = json.loads((result.RESULTS / "kill_resume.json").read_text())
  found = {kind: before[kind] for kind in KINDS if kind in before and "commit" in before[kind]}
  with tempfile.TemporaryDirectory(prefix="kill_resume_") as scratch:
    folder = pathlib.Path(scratch)
    os.environ.setdefault("ALIGNJAX_CACHE", str(folder / "cache"))
    for number, kind in enumerate(kinds):
      found[kind] = tried(kind, folder, arguments.kills, random.Random(1000 * arguments.seed + number))
      counted = found[kind]["kills_before_the_last_checkpoint"]
      print(f"{kind}: {counted} kills before the last checkpoint, identical: {found[kind]['identical']}", flush=True)
      Forked(lambda: bool(print(result.write("kill_resume", found))), sys.stdout).wait()  # it looks for devices
  return 0 if all(found[kind]["identical"] for kind in kinds) else 1


if __name__ == "__main__":
  sys.exit(main())
