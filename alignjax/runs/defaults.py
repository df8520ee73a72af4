"""What a stored config means that an earlier version completed with its own defaults.

A run goes on with what it began with: where a default has changed, the same command still names the same run. So what
stores a config stores beside it which defaults completed it; `GENERATION` counts up where one changes, and `CHANGED`
says from what to what.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from alignjax.algorithms import policy_update
from alignjax.errors import InputError
from alignjax.losses.kl import CORRECTED, KL_ESTIMATORS
from alignjax.runs.config import Config
from alignjax.training.optim import DEFAULTS

GENERATION = 2  # of the defaults of this version; a stored config without a number has those of the first
KEY = "defaults"  # the entry beside a stored config that holds its number
Sections = Mapping[str, Mapping[str, Any]]


class Change(NamedTuple):
  """A default that is another one now.

  Attributes:
    last: the last generation that had the old one.
    section, key: of the config.
    name: for configs whose section has this name.
    old, new: the default.
  """

  last: int
  section: str
  key: str
  name: str
  old: Any
  new: Any


CHANGED = (
  Change(1, "optimizer", "b2", "lion", 0.999, DEFAULTS["lion"]["b2"]),
  Change(1, "algorithm", "kl_estimator", "grpo", "k3", ""),
  Change(1, "algorithm", "kl_estimator", "ppo", "k1", ""),
)


def generation(record: Mapping[str, Any]) -> int:
  """Which defaults completed the config in a record."""
  return record.get(KEY, 1)


def kept(stored: Sections, since: int, config: Config) -> tuple[Config, list[str]]:
  """The config with the defaults of a stored one, and a line about each that makes a difference.

  A key is one that nobody has set where it has the old default there, and today's here.

  Args:
    stored: what a run began with.
    since: the generation of its defaults.
    config: of the command that continues it.

  Raises:
    InputError: an old default is refused by now.
  """
  now, changes, notes = config.to_dict(), {}, []
  for change in CHANGED:
    there, here = stored.get(change.section, {}), now[change.section]
    if since > change.last or not there.get("name") == change.name == here["name"]:
      continue
    if there.get(change.key) != change.old or here[change.key] != change.new:
      continue
    changes[f"{change.section}__{change.key}"] = change.old
    means = _meaning(change.key, change.new, here)
    if means not in ("", change.old):
      notes.append(f"{change.section}.{change.key}={change.old}: the default when this run began; it is {means} now")
  return (config.replace(**changes) if changes else config), notes


def readable(stored: Sections) -> Sections:
  """A stored config to use the weights by, even if it can not be trained on (`refused`): that key has its default."""
  return {**stored, "algorithm": {**stored["algorithm"], "kl_estimator": ""}} if refused(stored) else stored


def replaced(stored: Sections) -> str:
  """A line about what `readable` has in place of what is refused; "" where there is nothing."""
  why = refused(stored)
  return f"{why}; here it is {_meaning('kl_estimator', '', stored['algorithm'])}" if why else ""


def refused(stored: Sections) -> str:
  """Why a stored config can not be trained on, which once could; "" where it can, or never could."""
  algorithm = stored.get("algorithm") if isinstance(stored, Mapping) else None
  if not isinstance(algorithm, Mapping):  # `resolve` says what is wrong
    return ""
  if algorithm.get("name") not in ("ppo", "grpo") or not {"kl_estimator", "kl_in"} <= algorithm.keys():
    return ""
  if algorithm["kl_estimator"] not in (*KL_ESTIMATORS, *CORRECTED):
    return ""
  try:
    policy_update.kl_estimator(algorithm["kl_estimator"], algorithm["kl_in"])
  except InputError as error:
    return str(error)
  return ""


def _meaning(key: str, value: Any, section: Mapping[str, Any]) -> Any:
  """What a value stands for in a section of a config; "" if for nothing."""
  if key != "kl_estimator":
    return value
  return "" if section["kl_in"] == "none" else policy_update.kl_estimator(value, section["kl_in"])
