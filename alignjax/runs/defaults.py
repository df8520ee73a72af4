"""Reads stored configs that an earlier version completed with other defaults.

A run continues with the defaults that it began with: after a default has changed, the same command still names the same
run. Therefore every stored config has the generation of its defaults next to it. `GENERATION` is raised whenever a
default changes, and `CHANGED` lists the old and the new value.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from alignjax.algorithms import policy_update
from alignjax.errors import InputError
from alignjax.losses.kl import CORRECTED, KL_ESTIMATORS
from alignjax.runs.config import Config
from alignjax.training.optim import DEFAULTS

GENERATION = 2  # of the defaults of this version; a stored config without a number has those of the first
KEY = "defaults"  # the entry next to a stored config that holds its generation
Sections = Mapping[str, Mapping[str, Any]]


class Change(NamedTuple):
  """A default that has changed.

  Attributes:
    last: the last generation with the old default.
    section, key: of the config.
    name: the change concerns configs whose section has this `name`.
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
  """Returns the generation of the defaults that completed the config in a record; 1 if it names none."""
  return record.get(KEY, 1)


def kept(stored: Sections, since: int, config: Config) -> tuple[Config, list[str]]:
  """Returns the config with the defaults of a stored one, and a line about each that makes a difference.

  A key is taken as not set by anybody if it has the old default in `stored` and today's default in `config`.

  Args:
    stored: the config that a run began with.
    since: the generation of its defaults.
    config: of the command that continues it.

  Raises:
    InputError: an old default is refused by now.
  """
  now = config.to_dict()
  overrides = {}
  notes = []
  for change in CHANGED:
    old_section = stored.get(change.section, {})
    new_section = now[change.section]
    if since > change.last or not old_section.get("name") == change.name == new_section["name"]:
      continue
    if old_section.get(change.key) != change.old or new_section[change.key] != change.new:
      continue
    overrides[f"{change.section}.{change.key}"] = change.old
    means = _meaning(change.key, change.new, new_section)
    if means not in ("", change.old):
      notes.append(f"{change.section}.{change.key}={change.old}: the default when this run began; it is {means} now")
  if overrides:
    config = config.replace(overrides)
  return config, notes


def readable(stored: Sections) -> Sections:
  """Returns a stored config for using the weights: if its kl_estimator is `refused`, that key has its default."""
  if not refused(stored):
    return stored
  return {**stored, "algorithm": {**stored["algorithm"], "kl_estimator": ""}}


def replaced(stored: Sections) -> str:
  """Says in one line which value `readable` replaces, and why; "" if it replaces none."""
  why = refused(stored)
  if not why:
    return ""
  return f"{why}; here it is {_meaning('kl_estimator', '', stored['algorithm'])}"


def refused(stored: Sections) -> str:
  """Says why a stored config cannot be trained any more; "" if it still can, or never could."""
  if not isinstance(stored, Mapping):  # `resolve` says what is wrong
    return ""
  algorithm = stored.get("algorithm")
  if not isinstance(algorithm, Mapping):
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
  """Returns the effective value of a key in a section of a config; "" if the key has no effect."""
  if key != "kl_estimator":
    return value
  if section["kl_in"] == "none":
    return ""
  return policy_update.kl_estimator(value, section["kl_in"])
