"""Trains many runs that differ in a few keys, in as few programs as possible: `alignjax sweep`.

Runs of LoRA factors that differ only in traced hyper-parameters and in the factors' seed are one program. They are
members along a `vmap` axis over one frozen base and one stream of batches, and the reference's log-probabilities are
computed once for all. Each member equals the run alone, up to rounding. Any other difference (a loss, a rank, a batch
size, the seed of the data) makes another program, which runs in a process of its own.
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
from alignjax.errors import InputError, exit_status
from alignjax.losses import objective
from alignjax.model.config import HABITS
from alignjax.report import sweep as report
from alignjax.runs import defaults
from alignjax.runs.build import own_losses, samples
from alignjax.runs.config import Config, load_config, nearest, resolve
from alignjax.runs.workdir import alone, differences, naming, read_config
from alignjax.system import malloc, output, reading
from alignjax.train import fit, fit_members
from alignjax.training import metrics

SHORT = {"lr": "learning_rate"}
# The default rankings. Accuracy comes first, because losses of different values of beta cannot be compared.
RANKINGS = ("eval/rewards/accuracies:max", "eval/loss:min", "rewards/accuracies:max", "loss:min")


class Member(NamedTuple):
  """One run of a sweep.

  Attributes:
    overrides: its own values, by dotted key.
    config: the whole.
  """

  overrides: dict[str, Any]
  config: Config

  @property
  def name(self) -> str:
    """The values of the member, "algorithm.beta=0.1 optimizer.learning_rate=1e-05"; "as configured" if it has none."""
    return " ".join(f"{key}={value}" for key, value in self.overrides.items()) or "as configured"


@alone("sweeps")
def sweep(members: Sequence[Member], workdir: epath.PathLike, best: str = "") -> dict[str, Any]:
  """Trains the members; writes sweep.json, sweep.png and a copy of the best run in best/.

  The same call continues a sweep that was interrupted.

  Args:
    members: see `expand`.
    workdir: made if missing.
    best: "METRIC:max" or "METRIC:min", by which members are ranked; "": the first of `RANKINGS` that they have.

  Returns:
    The content of sweep.json: a row per member, and which is the best. {"stopped": True, ...} after a signal.

  Raises:
    InputError: as `train.fit`; another sweep in `workdir`; no member was trained to the end; an unknown metric.
  """
  workdir = epath.Path(workdir).expanduser()
  if best and best.rpartition(":")[2] not in ("max", "min"):
    raise InputError(f"--best={best}: write METRIC:max or METRIC:min, e.g. eval/loss:min")
  members = _claim(workdir, members)
  programs = group(members)
  print("\n".join(explain(members, programs)), flush=True)
  rows: list[dict[str, Any]] = [{}] * len(members)
  for number, indices in enumerate(programs):
    program = [members[i] for i in indices]
    if len(programs) == 1:
      program_rows = run_program(program, workdir)
    else:
      program_rows = _in_process(program, workdir / f"program-{number:02}")
    if any(row.get("stopped") for row in program_rows):
      return {"stopped": True, "members": program_rows}
    for i, row in zip(indices, program_rows, strict=True):
      if "directory" in row:
        row["directory"] = os.path.relpath(row["directory"], workdir)
      rows[i] = {"member": i, "overrides": members[i].overrides, "program": number} | row
  ranking = best or _default_ranking(rows)
  order = rank(rows, ranking)
  result = {"best": order[0], "order": order, "ranking": ranking, "programs": len(programs), "members": rows}
  runs = [workdir / rows[number]["directory"] for number in order if "directory" in rows[number]]
  _copy_best(runs, workdir / "best")
  output.write(workdir / "sweep.json", json.dumps(result, indent=2) + "\n")
  report.draw(result, workdir, workdir / "sweep.png")
  return result


def _default_ranking(rows: Sequence[dict[str, Any]]) -> str:
  """Returns the first of `RANKINGS` whose metric some member has; "" if there is none."""
  known = {name for row in rows for name in row.get("metrics", {})}
  for ranking in RANKINGS:
    if ranking.rpartition(":")[0] in known:
      return ranking
  return ""


def expand(path: str, axes: Sequence[str], overrides: Sequence[str] = ()) -> list[Member]:
  """Makes the members of a grid over a config file.

  Args:
    path: as for `load_config`.
    axes: "algorithm.beta=0.1,0.3": a dotted key, or its last part if that is not ambiguous, and its values.
    overrides: "run.steps=10", of all members.

  Raises:
    InputError: an unknown or ambiguous key, a key or a value that comes twice, a value of the wrong type, or a key of
      the model that run.init decides.
  """
  config = load_config(path, overrides)
  grid: dict[str, list[str]] = {}
  for axis in axes:
    key, _, choices = axis.partition("=")
    full = full_key(key, config)
    if full in grid or not choices:
      raise InputError(f"--sweep {axis}: write each key once, with its values: {full}=VALUE,VALUE")
    section, _, name = full.partition(".")
    if section == "model" and name not in HABITS and config.run.init:
      raise InputError(f"--sweep {axis}: with run.init={config.run.init} the model is that one's; sweep another key")
    grid[full] = choices.split(",")
    if len(set(grid[full])) < len(grid[full]):
      raise InputError(f"--sweep {axis}: a value comes twice; write each once")
  members = []
  for values in itertools.product(*grid.values()):
    own_overrides = [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
    member_config = load_config(path, [*overrides, *own_overrides])
    sections = member_config.to_dict()
    own_values = {}
    for key in grid:
      section, _, name = key.partition(".")
      own_values[key] = sections[section][name]
    members.append(Member(own_values, member_config))
  return members


def commands(
  path: str, members: Sequence[Member], workdir: str, overrides: Sequence[str] = (), launcher: str = "alignjax"
) -> list[str]:
  """Makes a shell command per member, which trains it alone, as an ordinary run in `workdir`/NN.

  Args:
    path: as for `expand`.
    members: the result of `expand`.
    workdir: a folder, or a path in a bucket.
    overrides: of all members, as for `expand`.
    launcher: the start of the command, before the arguments of `alignjax`; the member's number replaces {}.
  """
  lines = []
  for number, member in enumerate(members):
    keys = [*overrides, *(f"{key}={value}" for key, value in member.overrides.items())]
    run = ["train", "--config", path, "--workdir", f"{workdir.rstrip('/')}/{number:02}"]
    start = launcher.replace("{}", f"{number:02}")
    lines.append(f"{start} {shlex.join([*run, *(f'--config.{key}' for key in keys)])}")
  return lines


def full_key(key: str, config: Config) -> str:
  """Returns "algorithm.beta" for "beta"; a key with a dot as it is, unchecked. "lr" is "learning_rate".

  Raises:
    InputError: no section has the key, or several do.
  """
  if "." in key:
    return key
  sections = config.to_dict()
  name = SHORT.get(key, key)
  matches = [f"{section}.{name}" for section, values in sections.items() if name in values]
  if not matches:
    known = dict.fromkeys(name for values in sections.values() for name in values)
    raise InputError(f"--sweep {key}: no such key{nearest(key, known)}")
  if len(matches) > 1:
    raise InputError(f"--sweep {key}: one of {', '.join(matches)}; write SECTION.KEY")
  return matches[0]


def group(members: Sequence[Member]) -> list[list[int]]:
  """Groups the indices of members into programs: members of one program differ only in traced keys."""
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
  """Returns the other runs whose models a run uses, such as a teacher's."""
  sources = [getattr(config.options, name) for name in ALGORITHMS[config.algorithm.name].models]
  return [source for source in sources if source]


def traced(config: Config) -> list[str]:
  """Returns the keys in which members of one program may differ."""
  hparams = [f"algorithm.{name}" for name in config.hparams if name != "learning_rate"]
  return [*hparams, "optimizer.learning_rate", "lora.seed"]


def explain(members: Sequence[Member], programs: Sequence[Sequence[int]]) -> list[str]:
  """Says in lines for people which members share a program, and why the others do not.

  Args:
    members: of the sweep.
    programs: of `group`.
  """
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
  """Trains the members of one program.

  Args:
    members: of one group of `group`.
    directory: made if missing; the runs are in runs/00, runs/01, ...

  Returns:
    A row each: "metrics" of the last step, "directory", "stopped": True after a signal.

  Raises:
    InputError: as `train.fit`.
  """
  configs = [member.config for member in members]
  runs = [directory / "runs" / f"{k:02}" for k in range(len(members))]
  if len(members) == 1:
    trained = [fit(configs[0], runs[0])]
  else:
    trained = fit_members(configs, runs, directory)
  stopped = trained[0].stopped
  return [{"metrics": last_metrics(run), "directory": str(run), "stopped": stopped} for run in runs]


def last_metrics(run: epath.Path) -> dict[str, float]:
  """Reads the metrics of a run's last step from its file; a number that is not finite is left out."""
  rows = metrics.read(run / "metrics.jsonl")
  last: dict[str, Any] = {}
  for row in rows:
    if row["step"] == rows[-1]["step"]:
      last |= row
  return {name: value for name, value in last.items() if name != "step" and not isinstance(value, str)}


def rank(rows: Sequence[dict[str, Any]], ranking: str) -> list[int]:
  """Ranks the members: returns their indices from best to worst; those that failed or lack the metric come last.

  Args:
    rows: of the members, each with its "metrics", or "failed".
    ranking: "METRIC:max" or "METRIC:min".

  Raises:
    InputError: no member has the metric, or none was trained to the end.
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
  """Copies the first of the runs to `best`, and replaces a copy of another run there.

  A copy of the first run stays, because somebody may have continued its training.

  Raises:
    InputError: the folder holds something else than a copy of one of the runs.
  """
  if best.exists() and any(best.iterdir()):
    partial = not (best / "config.json").exists() and not output.local(best)  # an interrupted copy to a bucket
    if not partial and _same_run(best, runs[0]) and _newest(best) >= _newest(runs[0]):
      return
    if not partial and not any(_is_copy(best, run) for run in runs):
      raise InputError(
        f"{best}: holds what this sweep did not write, such as its best run trained on, which is not as far as, or "
        "another than, the best now; move it away, then run the same command again"
      )
    output.remove(best, at_once=True)
  output.copy_folder(runs[0], best)


def _same_run(one: epath.Path, other: epath.Path) -> bool:
  """Returns True if two folders hold runs of the same config, at any step."""
  if _newest(one) < 0 or _newest(other) < 0:
    return False
  return not differences(read_config(one).to_dict(), read_config(other).to_dict())


def _is_copy(copy: epath.Path, run: epath.Path) -> bool:
  """Returns True if a folder holds a copy of a run, at its newest step or an earlier one."""
  copied_metrics = copy / "metrics.jsonl"
  run_metrics = run / "metrics.jsonl"
  if not _same_run(copy, run) or _newest(copy) > _newest(run):
    return False
  if not copied_metrics.exists() or not run_metrics.exists():
    return False
  return reading.read_bytes(run_metrics).startswith(reading.read_bytes(copied_metrics))


def _newest(run: epath.Path) -> int:
  """Returns the newest step of a run; -1 if the folder holds no whole run."""
  checkpoints = run / "checkpoints"
  if not (run / "config.json").exists() or not checkpoints.is_dir():
    return -1
  return max((int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()), default=-1)


def _claim(workdir: epath.Path, members: Sequence[Member]) -> list[Member]:
  """Writes members.json, or checks that it holds these members; returns them with the defaults that it began with.

  Raises:
    InputError: the folder holds another sweep, or something else.
  """
  path = workdir / "members.json"
  generation = defaults.GENERATION
  if path.exists():
    record = _read(path)
    generation = defaults.generation(record)
    members = _as_begun(members, record, path)
  elif workdir.exists() and {child.name for child in workdir.iterdir()} - {output.LOCK, output.beside(path).name}:
    raise InputError(f"{workdir}: is not empty and holds no sweep; choose another --workdir")
  rows = [{"overrides": member.overrides, "config": member.config.to_dict()} for member in members]
  output.write_json(path, {"members": rows, defaults.KEY: generation})
  return list(members)


def _as_begun(members: Sequence[Member], record: dict[str, Any], path: epath.Path) -> list[Member]:
  """Returns the members with the defaults that the sweep in a record began with; prints which of them have changed.

  Args:
    members: of the command that continues the sweep.
    record: the content of members.json.
    path: of members.json.

  Raises:
    InputError: the record is another sweep's.
  """
  with naming(path, "choose another --workdir"):
    old_configs = [resolve(row["config"], stored=True).to_dict() for row in record["members"]]
  another = f"{path.parent}: holds another sweep; choose another --workdir, or that sweep's members"
  notes: list[str] = []
  continued = []
  for old_config, member in zip(old_configs, members, strict=False):
    config, member_notes = defaults.kept(old_config, defaults.generation(record), member.config)
    if differences(old_config, config.to_dict()):
      raise InputError(another)
    continued.append(member._replace(config=config))
    notes += member_notes
  if len(old_configs) != len(members):
    raise InputError(another)
  for line in dict.fromkeys(notes):
    print(line, flush=True)
  return continued


def _read(path: epath.Path) -> dict[str, Any]:
  """Reads members.json; in earlier versions it held the rows alone."""
  return output.read_json(path, "bring it back from a copy, or choose another --workdir", alone="members")


def _in_process(members: Sequence[Member], directory: epath.Path) -> list[dict[str, Any]]:
  """Calls `run_program` in a process of its own, which writes its rows to rows.json."""
  with output.lock(directory, "sweeps", "--workdir"):  # the process of a killed sweep may still be running
    pass
  members = _claim(directory, members)
  result = directory / "rows.json"
  output.remove(result)
  print(f"sweep: {directory.name}: {'; '.join(member.name for member in members)}", flush=True)
  losses = sorted({name for member in members for name in own_losses(member.config)})
  path = [*objective.folders(losses), *filter(None, [os.environ.get("PYTHONPATH")])]
  command = [sys.executable, "-m", "alignjax.commands.sweep", str(directory), *losses]
  done = subprocess.run(command, check=False, env=os.environ | ({"PYTHONPATH": os.pathsep.join(path)} if path else {}))
  if done.returncode == 2:  # an error in its input, which its line names: the other programs may still succeed
    return [{"failed": "see its line above"} for _ in members]
  if done.returncode:
    raise RuntimeError(f"{directory}: its process ended with status {done.returncode}")
  return output.read_json(result, "run the same command again")["rows"]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one program of a sweep, and writes its rows to rows.json; returns 0.

  Args:
    argv: the folder of the program, with its members.json, then users' losses that it may import; the process's own
      arguments if None.
  """
  if argv is None:
    argv = sys.argv[1:]
  directory = epath.Path(argv[0])
  rows = _read(directory / "members.json")["members"]
  members = [Member(row["overrides"], resolve(row["config"], stored=True, given=argv[1:])) for row in rows]
  output.write_json(directory / "rows.json", {"rows": run_program(members, directory)})
  return 0


if __name__ == "__main__":
  malloc.keep_freed()
  sys.exit(exit_status(main))
