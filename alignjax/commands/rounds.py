"""The parts that commands of several rounds share: the folders, steps that run once, seeds, prompts and a table."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from alignjax.commands.resumable import write_json
from alignjax.errors import InputError
from alignjax.runs import defaults, scorer
from alignjax.runs.config import resolve
from alignjax.runs.workdir import differences, naming
from alignjax.system import hosts, output
from alignjax.training import metrics


def claim(workdir: epath.Path, plan: Any) -> Any:
  """Writes the plan of the rounds to plan.json, or checks that plan.json holds this plan; returns the plan to follow.

  The returned plan has the defaults that the rounds began with.

  Args:
    workdir: made if missing.
    plan: a named tuple of everything that decides the rounds: the `config` of a round's training, whose keys in
      `workdir.MAY_CHANGE` may change, the `request`, who scores (`rewards` or `labeller`), and JSON.

  Raises:
    InputError: the folder holds other rounds.
  """
  path = workdir / "plan.json"
  fields = plan._asdict()
  described = fields | {"config": plan.config.to_dict(), "request": plan.request._asdict()}
  described |= {name: scorer.recorded(fields[name]) for name in ("rewards", "labeller") if name in fields}
  record = json.loads(json.dumps(described))
  if not hosts.there(path):
    write_json(path, record | {defaults.KEY: defaults.GENERATION})
    return plan
  old = output.read_json(path, "bring it back from a copy, or choose another --workdir")
  generation = defaults.generation(old)
  old.pop(defaults.KEY, None)
  old_config = old.pop("config")
  with naming(path, "choose another --workdir"):
    config, notes = defaults.kept(old_config, generation, plan.config)
    different = differences(resolve(old_config, stored=True).to_dict(), config.to_dict())
  record.pop("config")
  for name in dict.fromkeys([*old, *record]):
    if old.get(name) != record.get(name):
      different.append(f"{name}={old.get(name)!r} there, {record.get(name)!r} here")
  if different:
    raise InputError(f"{workdir} holds other rounds: {'; '.join(different[:4])}; choose another --workdir")
  for line in notes:
    hosts.say(line)
  return plan._replace(config=config)


def folder_of(workdir: epath.Path, number: int) -> epath.Path:
  """Returns the folder of a round; 0 is that of the first policy."""
  return workdir / f"round-{number:02}"


def once(path: epath.Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """Returns the JSON object in a file; if there is none, or a damaged one, calls `make` and writes its result.

  An empty result is returned, but not written.
  """
  if hosts.there(path):
    try:
      return output.read_json(path)
    except output.DamagedError:  # every host reads the same file
      hosts.say(f"{path}: is damaged; made again")
  result = make()
  if result:
    write_json(path, result)
  return result


def seed_of(seed: int, *place: int) -> int:
  """Derives a seed from a plan's seed and a place, such as a round's number."""
  return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0] >> 1)


def prompts_of(seed: int, count: int, size: int, number: int) -> list[int]:
  """Returns the indices of a round's prompts: the next `count` of one shuffled order, which starts again at its end.

  Args:
    seed: of the order.
    count: prompts of a round; 0: all.
    size: number of all prompts.
    number: of the round, from 1.
  """
  count = min(count or size, size)
  order = np.random.default_rng(seed).permutation(size)
  return order.take(range((number - 1) * count, number * count), mode="wrap").tolist()


def newest(path: epath.Path) -> dict[str, Any]:
  """Reads the last value of each metric in a run's file: the same for a run trained just now and one trained before."""
  rows = metrics.read(path)
  return {name: value for row in rows for name, value in row.items() if name != "step"}


def aligned(lines: Sequence[Sequence[str]]) -> str:
  """Formats lines of cells, all of one length, as a table for people, right-aligned."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)
