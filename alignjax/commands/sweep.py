"""Many runs that differ in a few keys, as few programs: `alignjax sweep`.

Runs of LoRA factors that differ in traced hyper-parameters and in the factors' seed alone are one program: members
along a `vmap` axis over one frozen base and one stream of batches, for which the reference's log-probabilities are
computed once. Each member is what the run alone would be, up to rounding. Whatever else differs (a loss, a rank, a
batch size, another seed of the data) makes another program, and a process of its own.
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from alignjax.algorithms import ALGORITHMS
from alignjax.commands.sweep_program import fit_members
from alignjax.errors import InputError, exit_status
from alignjax.model.config import HABITS
from alignjax.report import sweep as report
from alignjax.runs import defaults
from alignjax.runs.build import samples
from alignjax.runs.config import Config, load_config, nearest, resolve
from alignjax.runs.workdir import alone, differences, naming, read_config
from alignjax.system import malloc, output, reading
from alignjax.train import fit
from alignjax.training import metrics

SHORT = {"lr": "learning_rate"}
# What ranks the members where nobody said: a loss says nothing across values of beta, so accuracy first.
RANKINGS = ("eval/rewards/accuracies:max", "eval/loss:min", "rewards/accuracies:max", "loss:min")


class Member(NamedTuple):
  """One run of a sweep: the keys that are its own, as dotted keys and values, and its whole config."""

  overrides: dict[str, Any]
  config: Config

  @property
  def name(self) -> str:
    """ "algorithm.beta=0.1 optimizer.learning_rate=1e-05" """
    return " ".join(f"{key}={value}" for key, value in self.overrides.items()) or "as configured"


@alone("sweeps")
def sweep(members: Sequence[Member], workdir: epath.PathLike, best: str = "") -> dict[str, Any]:
  """Trains the members; writes sweep.json, sweep.png and the best one as a run in best/. It goes on where it was left.

  Args:
    members: see `expand`.
    workdir: made if missing.
    best: "METRIC:max" or "METRIC:min" by which members rank; "": the first of `RANKINGS` that they have.

  Returns:
    What sweep.json holds: a row per member, and which is the best.

  Raises:
    InputError: as `train.fit`; another sweep in `workdir`; no member that was trained to the end; an unknown metric.
  """
  workdir = epath.Path(workdir).expanduser()
  if best and best.rpartition(":")[2] not in ("max", "min"):
    raise InputError(f"--best={best}: write METRIC:max or METRIC:min, e.g. eval/loss:min")
  members = _claim(workdir, members)
  programs = group(members)
  print("\n".join(explain(members, programs)), flush=True)
  rows: list[dict[str, Any]] = [{}] * len(members)
  for number, indices in enumerate(programs):
    part = [members[i] for i in indices]
    single = len(programs) == 1
    found = run_program(part, workdir) if single else _in_process(part, workdir / f"program-{number:02}")
    if any(row.get("stopped") for row in found):
      return {"stopped": True, "members": found}
    for i, row in zip(indices, found, strict=True):
      if "directory" in row:
        row["directory"] = os.path.relpath(row["directory"], workdir)
      rows[i] = {"member": i, "overrides": members[i].overrides, "program": number} | row
  ranking = best or next(
    (r for r in RANKINGS if any(r.rpartition(":")[0] in row.get("metrics", {}) for row in rows)), ""
  )
  order = rank(rows, ranking)
  result = {"best": order[0], "order": order, "ranking": ranking, "programs": len(programs), "members": rows}
  runs = [workdir / rows[number]["directory"] for number in order if "directory" in rows[number]]
  _copy_best(runs, workdir / "best")
  output.write(workdir / "sweep.json", json.dumps(result, indent=2) + "\n")
  report.draw(result, workdir, workdir / "sweep.png")
  return result


def expand(path: str, axes: Sequence[str], overrides: Sequence[str] = ()) -> list[Member]:
  """The members of a grid over a config file.

  Args:
    path: as for `load_config`.
    axes: "algorithm.beta=0.1,0.3": a key, whole or its last part where that is not ambiguous, and its values.
    overrides: "run.steps=10", of all members.

  Raises:
    InputError: an unknown or ambiguous key, one that comes twice, a value of the wrong type.
  """
  config = load_config(path, overrides)
  grid: dict[str, list[str]] = {}
  for axis in axes:
    key, _, values = axis.partition("=")
    full = full_key(key, config)
    if full in grid or not values:
      raise InputError(f"--sweep {axis}: write each key once, with its values: {full}=VALUE,VALUE")
    section, _, name = full.partition(".")
    if section == "model" and name not in HABITS and config.run.init:
      raise InputError(f"--sweep {axis}: with run.init={config.run.init} the model is that one's; sweep another key")
    grid[full] = values.split(",")
    if len(set(grid[full])) < len(grid[full]):
      raise InputError(f"--sweep {axis}: a value comes twice; write each once")
  members = []
  for values in itertools.product(*grid.values()):
    own = [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
    resolved = load_config(path, [*overrides, *own])
    known = resolved.to_dict()
    members.append(Member({key: known[key.split(".")[0]][key.split(".")[1]] for key in grid}, resolved))
  return members


def commands(
  path: str, members: Sequence[Member], workdir: str, overrides: Sequence[str] = (), launcher: str = "alignjax"
) -> list[str]:
  """A line for a shell per member, which trains it alone, as an ordinary run in `workdir`/NN.

  Args:
    path: and `overrides`, as for `expand`.
    members: what it gave.
    workdir: a folder or a bucket's.
    overrides: of all members.
    launcher: what goes before the arguments of `alignjax`, as it stands, with the member's number for {}.
  """
  lines = []
  for number, member in enumerate(members):
    keys = [*overrides, *(f"{key}={value}" for key, value in member.overrides.items())]
    run = ["train", "--config", path, "--workdir", f"{workdir.rstrip('/')}/{number:02}"]
    start = launcher.replace("{}", f"{number:02}")
    lines.append(f"{start} {shlex.join([*run, *(f'--config.{key}' for key in keys)])}")
  return lines


def full_key(key: str, config: Config) -> str:
  """ "algorithm.beta" for "beta"; a key with a dot as it is."""
  if "." in key:
    return key
  known = [f"{section}.{name}" for section, values in config.to_dict().items() for name in values]
  found = [full for full in known if full.split(".")[1] == SHORT.get(key, key)]
  if not found:
    raise InputError(f"--sweep {key}: no such key{nearest(key, dict.fromkeys(name.split('.')[1] for name in known))}")
  if len(found) > 1:
    raise InputError(f"--sweep {key}: one of {', '.join(found)}; write SECTION.KEY")
  return found[0]


def group(members: Sequence[Member]) -> list[list[int]]:
  """The members of each program, by index: together where only what a program traces differs."""
  programs: dict[str, list[int]] = {}
  for index, member in enumerate(members):
    static = member.config.to_dict()
    if member.config.lora.rank and not other_models(member.config) and not samples(member.config):
      for key in traced(member.config):
        section, name = key.split(".")
        del static[section][name]
    else:
      static["alone"] = index
    programs.setdefault(json.dumps(static, sort_keys=True), []).append(index)
  return list(programs.values())


def other_models(config: Config) -> list[str]:
  """The runs beside its own whose models a run takes, such as a teacher's."""
  sources = [getattr(config.options, name) for name in ALGORITHMS[config.algorithm.name].models]
  return [source for source in sources if source]


def traced(config: Config) -> list[str]:
  """The keys in which members of one program may differ."""
  hparams = [f"algorithm.{name}" for name in config.hparams if name != "learning_rate"]
  return [*hparams, "optimizer.learning_rate", "lora.seed"]


def explain(members: Sequence[Member], programs: Sequence[Sequence[int]]) -> list[str]:
  """What runs together and what does not, in lines for people."""
  sizes = ", ".join(str(len(program)) for program in programs)
  lines = [f"sweep: {len(members)} members in {len(programs)} program(s) of {sizes}"]
  if len(programs) > 1:
    if not all(member.config.lora.rank for member in members):
      lines.append("  full weights are not vectorised, only LoRA factors (lora.rank): one process per member")
    if any(other_models(member.config) for member in members):
      lines.append("  runs with another run's model, such as a teacher, are not vectorised: one process per member")
    if any(samples(member.config) for member in members):
      lines.append("  online runs, each with its own completions, are not vectorised: one process per member")
    keys = {key for member in members for key in member.overrides} - set(traced(members[0].config))
    if keys:
      lines.append(f"  {', '.join(sorted(keys))}: not traced, so every value is a program and a process of its own")
  return lines


def run_program(members: Sequence[Member], directory: epath.Path) -> list[dict[str, Any]]:
  """Trains members that are one program; a row each: the metrics of their last step, and where their run is."""
  configs = [member.config for member in members]
  runs = [directory / "runs" / f"{k:02}" for k in range(len(members))]
  stopped = fit(configs[0], runs[0]).stopped if len(members) == 1 else fit_members(configs, runs, directory)
  return [{"metrics": last_metrics(run), "directory": str(run), "stopped": stopped} for run in runs]


def last_metrics(run: epath.Path) -> dict[str, float]:
  """What a run wrote of its last step, now or in an earlier process; a number that is not finite is left out."""
  rows = metrics.read(run / "metrics.jsonl")
  found = {name: value for row in rows if row["step"] == rows[-1]["step"] for name, value in row.items()}
  return {name: value for name, value in found.items() if name != "step" and not isinstance(value, str)}


def rank(rows: Sequence[dict[str, Any]], ranking: str) -> list[int]:
  """Indices of the members from best to worst; those that failed or have no number come last.

  Raises:
    InputError: no member has the metric.
  """
  metric, _, mode = ranking.rpartition(":")
  sign = {"max": -1, "min": 1}.get(mode, 1)
  numbers = {i: sign * row["metrics"][metric] for i, row in enumerate(rows) if metric in row.get("metrics", {})}
  if not numbers:
    if all(row.get("failed") for row in rows):
      raise InputError("sweep: no member was trained to the end; each process said why")
    known = sorted({name for row in rows for name in row.get("metrics", {})})
    raise InputError(f"--best={ranking}: no member ended with that metric; they have {', '.join(known) or 'none'}")
  return sorted(range(len(rows)), key=lambda i: (numbers.get(i, float("inf")), i))


def _copy_best(runs: Sequence[epath.Path], best: epath.Path) -> None:
  """Copies the first of the runs, unless it is there, where somebody may have trained it on; another's copy goes.

  Raises:
    InputError: the folder holds more than a copy of any of the runs.
  """
  if best.exists() and any(best.iterdir()):
    begun = not (best / "config.json").exists() and not output.local(best)  # a copy that was killed, in a bucket
    if not begun and _same_run(best, runs[0]) and _newest(best) >= _newest(runs[0]):
      return
    if not begun and not any(_is_copy(best, run) for run in runs):
      raise InputError(
        f"{best}: holds what this sweep did not write, such as its best run trained on, which is not as far as, or "
        "another than, the best now; move it away, then run the same command again"
      )
    output.remove(best, at_once=True)
  output.copy_folder(runs[0], best)


def _same_run(one: epath.Path, other: epath.Path) -> bool:
  """Whether two folders hold runs of the same config, however far they are."""
  if _newest(one) < 0 or _newest(other) < 0:
    return False
  return not differences(read_config(one).to_dict(), read_config(other).to_dict())


def _is_copy(copy: epath.Path, run: epath.Path) -> bool:
  """Whether a folder holds a run as it is, or was once."""
  lines = [folder / "metrics.jsonl" for folder in (copy, run)]
  if not _same_run(copy, run) or _newest(copy) > _newest(run) or not all(path.exists() for path in lines):
    return False
  return reading.read_bytes(lines[1]).startswith(reading.read_bytes(lines[0]))


def _newest(run: epath.Path) -> int:
  """The newest step of a run; -1 of what is no whole one."""
  checkpoints = run / "checkpoints"
  if not (run / "config.json").exists() or not checkpoints.is_dir():
    return -1
  return max((int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()), default=-1)


def _claim(workdir: epath.Path, members: Sequence[Member]) -> list[Member]:
  """Writes members.json, or finds these members in it: with the defaults that the sweep began with."""
  path, since = workdir / "members.json", defaults.GENERATION
  if path.exists():
    record = _read(path)
    since = defaults.generation(record)
    with naming(path, "choose another --workdir"):
      old = [resolve(row["config"]).to_dict() for row in record["members"]]
    kept = [defaults.kept(began, since, member.config) for began, member in zip(old, members, strict=False)]
    if len(old) != len(members) or any(
      differences(began, config.to_dict()) for began, (config, _) in zip(old, kept, strict=True)
    ):
      raise InputError(f"{workdir}: holds another sweep; choose another --workdir, or that sweep's members")
    members = [member._replace(config=config) for member, (config, _) in zip(members, kept, strict=True)]
    for line in dict.fromkeys(line for _, notes in kept for line in notes):
      print(line, flush=True)
  elif workdir.exists() and {child.name for child in workdir.iterdir()} - {output.LOCK, output.beside(path).name}:
    raise InputError(f"{workdir}: is not empty and holds no sweep; choose another --workdir")
  rows = [{"overrides": member.overrides, "config": member.config.to_dict()} for member in members]
  output.write_json(path, {"members": rows, defaults.KEY: since})
  return list(members)


def _read(path: epath.Path) -> dict[str, Any]:
  """members.json; of earlier versions its rows alone."""
  return output.read_json(path, "bring it back from a copy, or choose another --workdir", alone="members")


def _in_process(members: Sequence[Member], directory: epath.Path) -> list[dict[str, Any]]:
  """`run_program` in a process of its own, whose rows it leaves in rows.json."""
  with output.lock(directory, "sweeps", "--workdir"):  # the process of a sweep that was killed may live on
    pass
  members = _claim(directory, members)
  result = directory / "rows.json"
  output.remove(result)
  print(f"sweep: {directory.name}: {'; '.join(member.name for member in members)}", flush=True)
  done = subprocess.run([sys.executable, "-m", "alignjax.commands.sweep", str(directory)], check=False)
  if done.returncode == 2:  # its input is at fault, as its one line said: the others have their own
    return [{"failed": "see its line above"} for _ in members]
  if done.returncode:
    raise RuntimeError(f"{directory}: its process ended with status {done.returncode}")
  return output.read_json(result, "run the same command again")["rows"]


def main(argv: Sequence[str] | None = None) -> int:
  """One program of a sweep: its members are in the folder that the argument names."""
  directory = epath.Path((sys.argv[1:] if argv is None else argv)[0])
  rows = _read(directory / "members.json")["members"]
  members = [Member(row["overrides"], resolve(row["config"])) for row in rows]
  output.write_json(directory / "rows.json", {"rows": run_program(members, directory)})
  return 0


if __name__ == "__main__":
  malloc.keep_freed()
  sys.exit(exit_status(main))
