"""Rewards by name, as a configuration writes them: "gsm8k:1.0+length:0.1+testbed_gold:0"."""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from alignjax.errors import InputError
from alignjax.rewards.answer import boxed, gsm8k, last_number, symbolic
from alignjax.rewards.asked import judge, rubric
from alignjax.rewards.form import format, json_schema, regex
from alignjax.rewards.length import cosine, length, soft_overlong
from alignjax.rewards.protocol import Reward, told
from alignjax.rewards.repetition import distinct, repetition
from alignjax.rewards.sandbox.code import code_tests
from alignjax.rewards.testbed import testbed_answer, testbed_gold


def weights(spec: str) -> dict[str, float]:
  """Parses a spec of rewards into {name: weight}, in its order: "gsm8k:1.0+my.module:score:0.5+length".

  A name is one of `REWARDS`, or a user's "module:function", which is not imported here (see `make`). A weight left out
  is 1, and may be negative; a reward of weight 0 is logged but not trained on. A monitor (`MONITORS`) may only have
  weight 0. An empty spec gives {}.

  Raises:
    InputError: a name is unknown or comes twice, a weight is no finite number, or a monitor's weight is not 0.
  """
  found: dict[str, float] = {}
  for term in filter(None, spec.split("+")):
    name, weight = _split(spec, term)
    if ":" not in name and name not in REWARDS:
      near = difflib.get_close_matches(name, REWARDS, n=1)
      nearest = f"; the nearest is {near[0]}" if near else ""
      raise InputError(f"rewards {spec!r}: no reward {name!r}; use {', '.join(REWARDS)} or module:function{nearest}")
    if name in found:
      raise InputError(f"rewards {spec!r}: {name} comes twice; add up its weights")
    if name in MONITORS and weight:
      raise InputError(f"rewards {spec!r}: {name} is a monitor, not to be trained on; write {name}:0")
    found[name] = weight
  return found


def options(spec: str) -> dict[str, Any]:
  """Returns {name: default} of the settings that a spec's rewards take; rewards share those of one name.

  A user's function has none. Raises InputError as `weights`.
  """
  found: dict[str, Any] = {}
  for name in weights(spec):
    found |= {key: default for key, default in _keywords(name).items() if key not in found}
  return found


def make(spec: str, **settings: Any) -> dict[str, Reward]:
  """Makes the rewards of a spec by name, in its order, for `score`; a user's "module:function" is a reward itself.

  That module is imported.

  Args:
    spec: as in `weights`.
    settings: some of `options(spec)`; the others keep their defaults.

  Raises:
    InputError: as in `weights`; a setting that none of them takes or that does not fit, a library that is missing, or a
      function that can not be imported.
  """
  defaults = options(spec)
  unknown = sorted(settings.keys() - defaults)
  if unknown:
    raise InputError(f"rewards {spec!r}: no setting {unknown[0]!r}; they take {', '.join(options(spec)) or 'none'}")
  for key, value in settings.items():
    _check_kind(spec, key, value, defaults[key])
  return {
    name: _imported(name)
    if ":" in name
    else REWARDS[name](**{key: settings[key] for key in _keywords(name) if key in settings})
    for name in weights(spec)
  }


def _check_kind(spec: str, key: str, value: Any, default: Any) -> None:
  """Raises InputError where a setting is of another kind than its default."""
  if isinstance(default, float):
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
  else:
    fits = type(value) is type(default)
  kinds = {float: "a finite number", int: "a whole number", str: "a text", bool: "true or false"}
  if type(default) in kinds and not fits:
    raise InputError(f"rewards {spec!r}: {key} is {value!r}; give {kinds[type(default)]}, such as {default!r}")


def _split(spec: str, term: str) -> tuple[str, float]:
  """Name and weight of "gsm8k", "gsm8k:0.5", "module:function" or "module:function:0.5".

  What follows a colon is a weight if it is a number, and else a function, also where the module is called as a reward.
  """
  name, _, last = term.rpartition(":")
  if not name:
    return last, 1.0
  try:
    weight = float(last)
  except ValueError:
    if ":" in name or not last.isidentifier():
      raise InputError(f"rewards {spec!r}: {last!r} is no number; write {name}:0.5") from None
    return term, 1.0
  if not math.isfinite(weight):
    raise InputError(f"rewards {spec!r}: {last!r} is no weight; write {name}:0.5")
  return name, weight


def _keywords(name: str) -> dict[str, Any]:
  if ":" in name:
    return {}
  parameters = inspect.signature(REWARDS[name]).parameters.values()
  return {parameter.name: parameter.default for parameter in parameters}


def _imported(name: str) -> Reward:
  module, _, function = name.partition(":")
  try:
    found = getattr(importlib.import_module(module), function)
  except Exception as error:  # the module is the user's own code
    remedy = f"give module:function, with the module's folder in PYTHONPATH, or a number as the weight ({module}:0.5)"
    raise InputError(f"reward {name}: {told(error)}; {remedy}") from error
  if not callable(found) or inspect.isclass(found):
    raise InputError(
      f"reward {name} is a {type(found).__name__}; it must be (prompts, completions, token_ids, columns) -> list"
    )
  return found


REWARDS: Mapping[str, Callable[..., Reward]] = {
  factory.__name__: factory
  for factory in (
    gsm8k,
    boxed,
    last_number,
    symbolic,
    format,
    regex,
    json_schema,
    length,
    soft_overlong,
    cosine,
    repetition,
    distinct,
    code_tests,
    judge,
    rubric,
    testbed_answer,
    testbed_gold,
  )
}
MONITORS = ("distinct", "testbed_gold")
