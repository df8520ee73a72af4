"""What commands of several rounds share: a plan's folder and its rounds', steps that are taken once, seeds, a table."""

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
  """Makes a folder that of these rounds, by writing plan.json, or finds that it is.

  Args:
    workdir: made if missing.
    plan: a named tuple of all that decides the rounds: the `config` of a round's training, of which may change what may
      change of a run (`workdir.MAY_CHANGE`), the `request`, who scores (`rewards` or `labeller`), and JSON.

  Raises:
    InputError: it is that of other rounds.
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
  began, since = old.pop("config"), defaults.generation(old)
  old.pop(defaults.KEY, None)
  with naming(path, "choose another --workdir"):
    config, notes = defaults.kept(began, since, plan.config)
    found = differences(resolve(began).to_dict(), config.to_dict())
  record.pop("config")
  names = dict.fromkeys([*old, *record])
  found += [
    f"{name}={old.get(name)!r} there, {record.get(name)!r} here" for name in names if old.get(name) != record.get(name)
  ]
  if found:
    raise InputError(f"{workdir} holds other rounds: {'; '.join(found[:4])}; choose another --workdir")
  for line in notes:
    hosts.say(line)
  return plan._replace(config=config)


def folder_of(workdir: epath.Path, number: int) -> epath.Path:
  """Where a round lies."""
  return workdir / f"round-{number:02}"


def once(path: epath.Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """What a file holds, or what `make` returns, which the file then holds if it is not empty."""
  if hosts.there(path):
    try:
      return output.read_json(path)
    except output.DamagedError:  # the same file for every host
      hosts.say(f"{path}: is damaged; made again")
  found = make()
  if found:
    write_json(path, found)
  return found


def seed_of(seed: int, *place: int) -> int:
  """A seed that belongs to a plan's and to a place, such as a round's number."""
  return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0] >> 1)


def prompts_of(seed: int, count: int, size: int, number: int) -> list[int]:
  """The numbers of a round's prompts: the next of one shuffled order, which begins anew at its end.

  Args:
    seed: of the order.
    count: prompts of a round; 0: all.
    size: prompts in all.
    number: of the round, from 1.
  """
  count = min(count or size, size)
  order = np.random.default_rng(seed).permutation(size)
  return order.take(range((number - 1) * count, number * count), mode="wrap").tolist()


def newest(path: epath.Path) -> dict[str, Any]:
  """The last value of each metric that a run wrote: the same whether it was just trained or complete before."""
  rows = metrics.read(path)
  return {name: value for row in rows for name, value in row.items() if name != "step"}


def aligned(lines: Sequence[Sequence[str]]) -> str:
  """Lines of cells as a table for people."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)
