"""Reads the files of a run."""

import json
import math
from typing import Any, NamedTuple

from etils import epath

from alignjax.errors import InputError
from alignjax.system import reading

ORDER = ("sft", "reward", "dpo", "ppo")  # stages are shown in this order, others after them by name


class Stage(NamedTuple):
  """One training run.

  Attributes:
    name: its folder.
    config: config.json, or {} if there is none.
    rows: the lines of metrics.jsonl.
  """

  name: str
  config: dict[str, Any]
  rows: list[dict[str, Any]]

  def series(self, key: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of a metric, from the rows that have it."""
    points = [(row["step"], row[key]) for row in self.rows if _is_number(row.get(key))]
    return [step for step, _ in points], [value for _, value in points]

  def metrics(self) -> list[str]:
    """Returns the names of the numeric metrics, in order of appearance."""
    return list(dict.fromkeys(key for row in self.rows for key in row if key != "step" and _is_number(row[key])))

  def last(self, key: str) -> float | None:
    """Returns the last value of a metric; None if it was never logged."""
    _, values = self.series(key)
    return next(reversed(values), None)


class Workdir(NamedTuple):
  """A run directory: the quickstart's, with a folder per stage, or one training run's own.

  Attributes:
    name: name of the directory.
    summary: summary.json, or {} if there is none.
    stages: one for each folder with a metrics.jsonl; without such folders, the directory itself.
  """

  name: str
  summary: dict[str, Any]
  stages: list[Stage]


def read(path: epath.PathLike) -> Workdir:
  """Reads a run directory.

  Raises:
    InputError: there is no run in it, or one of its files is malformed.
  """
  path = epath.Path(path).expanduser()
  if not path.is_dir():
    raise InputError(f"{path}: no such directory; name the --workdir of a run")
  folders = [child for child in sorted(path.iterdir()) if (child / "metrics.jsonl").exists()]
  rank = {name: place for place, name in enumerate(ORDER)}
  folders.sort(key=lambda folder: (rank.get(folder.name, len(ORDER)), folder.name))
  if not folders and (path / "metrics.jsonl").exists():
    folders = [path]
  summary = _json(path / "summary.json")
  if not folders and not summary:
    raise InputError(f"{path}: neither metrics.jsonl nor summary.json is in it; name the --workdir of a run")
  stages = [Stage(folder.name, _json(folder / "config.json"), _lines(folder / "metrics.jsonl")) for folder in folders]
  return Workdir(path.name, summary, stages)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _json(path: epath.Path) -> dict[str, Any]:
  """Reads the object in a JSON file; {} if there is no file."""
  if not path.exists():
    return {}
  return _record(reading.read_text(path), str(path))


def _lines(path: epath.Path) -> list[dict[str, Any]]:
  """Reads the rows of a metrics.jsonl."""
  lines = reading.read_text(path).split("\n")[:-1]  # the text after the last newline is incomplete
  rows = [_record(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
  for number, row in enumerate(rows, 1):
    if not isinstance(row.get("step"), int):
      raise InputError(f'{path}:{number}: no integer "step"; this is not the metrics.jsonl of a run')
  return rows


def _record(text: str, where: str) -> dict[str, Any]:
  try:
    record = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f"{where}: not JSON ({error}); remove it or run the stage again") from error
  if not isinstance(record, dict):
    raise InputError(f"{where}: expected a JSON object, found {type(record).__name__}")
  return record
