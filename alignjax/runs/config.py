"""A run as data: config files, overrides, and the checked record that the code reads.

A config file `configs/NAME.py` defines `get_config(variant="")`, which returns a `ConfigDict` with the sections below.
Every section is a frozen dataclass, defined in the module that reads it. An unknown key is an error that names the
nearest known one.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import runpy
import sys
import types
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from alignjax.algorithms import ALGORITHMS
from alignjax.algorithms.algorithm import Options, option_names
from alignjax.data.loader import DataConfig
from alignjax.errors import InputError, check_path
from alignjax.losses import objective
from alignjax.model.config import ModelConfig
from alignjax.model.lora import LoraConfig
from alignjax.runs import trust
from alignjax.system import ranges
from alignjax.system.ranges import AxisSize, Count, Seed, Whole
from alignjax.training.metrics import LOGGERS
from alignjax.training.optim import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
  """The algorithm and its loss. Further keys of the section: the algorithm's options and traced hyper-parameters."""

  name: str = ""  # one of algorithms.ALGORITHMS
  loss: str = ""  # one of the algorithm's losses, a weighted sum where it allows one, or module:function; "": its first


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one may be -1, which takes the devices that remain."""

  data: AxisSize = 1  # replicas; a multiple of the number of TPU slices, because no other axis crosses them
  fsdp: AxisSize = -1  # shards of rows and of parameters
  tensor: AxisSize = 1  # shards of heads, feed-forward and vocabulary
  sequence: AxisSize = 1  # shards of the tokens of a row, and of parameters

  def __post_init__(self):
    ranges.check_record("mesh", self)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Length, seed, starting point, and when checkpoints, metrics and evaluations are written."""

  steps: Count = 0  # optimizer steps; must be set
  seed: Seed = 0  # of parameters, data order and sampling
  init: str = ""  # run directory whose parameters start this one (and are the frozen reference)
  reference: str = ""  # run directory whose parameters are the frozen reference instead
  log_every: Count = 10  # steps between lines of metrics.jsonl
  eval_every: Whole = 0  # steps between evaluations on the held-out records; 0: after the last step only
  save_every: Count = 100  # steps between checkpoints; the last step is always saved
  keep_latest: Count = 2  # how many of the newest checkpoints are kept
  keep_every: Whole = 0  # checkpoints at multiples of this many steps are always kept; 0: none
  keep_best: str = ""  # "eval/loss:min" also keeps the best checkpoint by that metric
  early_stop: str = ""  # "eval/loss:min" keeps the best by that metric as the result, and ends the run early: patience
  patience: Count = 3  # with early_stop: evaluations in a row without an improvement that end the run
  loggers: str = ""  # besides metrics.jsonl, separated by commas: tensorboard, wandb, trackio, mlflow
  profile: Whole = 0  # steps that are traced, after the first three, into the folder `profile` of the workdir
  max_skipped: Count = 5  # this many steps in a row that are not finite, or have nothing to learn from, end the run
  reference_cache: str = ""  # folder that keeps the reference's log-probabilities; "": computed in every step
  compile_cache: str = "~/.cache/alignjax/xla"  # compiled programs, which later runs reuse

  def __post_init__(self):
    ranges.check_record("run", self)


@dataclasses.dataclass(frozen=True)
class Config:
  """The checked config of a run: one record for each section, and the algorithm's own options and hyper-parameters.

  Made by `load_config` or `resolve`.
  """

  model: ModelConfig
  lora: LoraConfig
  data: DataConfig
  algorithm: AlgorithmConfig
  options: Options  # of the algorithm: its defaults, overridden by the config; static
  hparams: dict[str, float]  # of the loss: its defaults, overridden by the config; and the learning rate; traced
  optimizer: OptimizerConfig
  mesh: MeshConfig
  run: RunConfig

  def __post_init__(self):
    recipe = ALGORITHMS[self.algorithm.name]
    if not objective.missing(self.algorithm.loss, recipe.family):
      declared = list(recipe.ranges(self.algorithm.loss))
      others = self.hparams.keys() - {key for key, _ in declared}
      for key, kind in (*declared, *((key, ranges.Finite) for key in sorted(others))):
        ranges.check_all("algorithm", self.hparams, {key: kind})

  def to_dict(self) -> dict[str, Any]:
    """Returns the config as JSON types, by section; `resolve` reads it back."""
    sections = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
    hparams = {k: v for k, v in self.hparams.items() if k != "learning_rate"}
    sections["algorithm"] |= dataclasses.asdict(self.options) | hparams
    return json.loads(json.dumps(sections))

  def replace(self, changes: Mapping[str, Any] = types.MappingProxyType({}), /, **older: Any) -> "Config":
    """Returns a copy with some values changed: replace({"run.steps": 10}).

    A changed algorithm.loss brings its own hyper-parameters, as an override of `load_config` does.

    Args:
      changes: values by "section.key", as an override names it.
      older: deprecated: the same keys with `__` for the dot, as keywords.

    Raises:
      InputError: as `resolve`, or a key without section.
    """
    if not isinstance(changes, Mapping):
      raise InputError(f"config.replace: {_kind(changes)}; give a mapping of keys, such as {{'run.steps': 10}}")
    if older:
      warnings.warn(
        f"config.replace({next(iter(older))}=...) is deprecated; write config.replace({{'section.key': ...}})",
        DeprecationWarning,
        stacklevel=2,
      )
    changes = {**changes, **{name.replace("__", ".", 1): value for name, value in older.items()}}
    by_section: dict[tuple[str, str], Any] = {}
    for dotted, value in changes.items():
      section, dot, key = str(dotted).partition(".")
      if not dot:
        raise InputError(f"config: {dotted}: has no section; write section.key, as in run.steps")
      by_section[section, key] = value
    return resolve(_changed(self.to_dict(), by_section), stored="algorithm.loss" not in changes)


SECTIONS = {
  "model": ModelConfig,
  "lora": LoraConfig,
  "data": DataConfig,
  "algorithm": AlgorithmConfig,
  "optimizer": OptimizerConfig,
  "mesh": MeshConfig,
  "run": RunConfig,
}


def resolve(raw: Mapping[str, Mapping[str, Any]], *, stored: bool = False, given: Collection[str] = ()) -> Config:
  """Checks a nested mapping of sections and fills in defaults.

  Args:
    raw: sections of keys; those left out have their defaults, but algorithm.name must be there.
    stored: True for the record of a run, which gives no permission to import a loss of the user's own. Without
      permission, its hyper-parameters are taken as they are, and the algorithm cannot be made.
    given: user functions, module:function, that a stored record may name.

  Raises:
    InputError: an unknown section or key (with the nearest known one), a value of another type or out of range, an
      unknown algorithm or logger.
  """
  _check_shape(raw)
  name = raw.get("algorithm", {}).get("name", "")
  if not isinstance(name, str) or name not in ALGORITHMS:
    raise InputError(f"algorithm.name={name!r}: use one of {', '.join(ALGORITHMS)}")
  algorithm = dict(raw["algorithm"])
  loss = algorithm.get("loss", "")
  if isinstance(loss, str):
    trusted = not stored or trust.trusted()
    user_functions = objective.own_names(loss, ALGORITHMS[name].family)
    objective.load([function for function in user_functions if trusted or function in given], needed=not stored)
  options, hparams = _settings(algorithm)
  _check_known(algorithm, [*hparams, *_fields(type(options)), *_fields(AlgorithmConfig)], "algorithm.")
  for key in hparams:
    if key in algorithm:
      hparams[key] = _typed(algorithm[key], 0.0, f"algorithm.{key}")
  own_keys = {key: algorithm[key] for key in _fields(AlgorithmConfig) if key in algorithm}
  raw = dict(raw) | {"algorithm": own_keys}
  sections = {section: _section(cls, dict(raw.get(section, {})), section) for section, cls in SECTIONS.items()}
  hparams["learning_rate"] = sections["optimizer"].learning_rate
  config = Config(options=options, hparams=hparams, **sections)
  for logger in filter(None, config.run.loggers.split(",")):
    if logger not in LOGGERS:
      raise InputError(
        f"run.loggers={config.run.loggers!r}: {logger!r} is not known; use {', '.join(LOGGERS)}, with commas between"
      )
  return config


def _settings(algorithm: Mapping[str, Any]) -> tuple[Options, dict[str, float]]:
  """Returns the static options of an algorithm section, and the defaults of the hyper-parameters that they require."""
  recipe = ALGORITHMS[algorithm["name"]]
  given = {key: algorithm[key] for key in option_names(recipe) if key in algorithm}
  options = _section(recipe.options, given, "algorithm")
  loss = _typed(algorithm.get("loss", ""), "", "algorithm.loss")
  if objective.missing(loss, recipe.family):
    others = algorithm.keys() - option_names(recipe) - set(_fields(AlgorithmConfig))
    return options, {key: _typed(algorithm[key], 0.0, f"algorithm.{key}") for key in sorted(others)}
  return options, recipe.hparams(loss, options)


def _changed(raw: dict[str, dict[str, Any]], changes: Mapping[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
  """Changes values of a checked mapping by (section, key); the result is still to be resolved.

  Another loss brings its own hyper-parameters, another optimizer its decays, and another algorithm all its keys. The
  values for the old one are dropped, except those that `changes` sets.
  """
  new = {section: dict(values) for section, values in raw.items()}
  for (section, key), value in changes.items():
    new.setdefault(section, {})[key] = value
  if new["optimizer"]["name"] != raw["optimizer"]["name"]:
    for key in sorted({"b1", "b2", "eps"} - {key for section, key in changes if section == "optimizer"}):
      del new["optimizer"][key]
  old = raw["algorithm"]
  algorithm = new["algorithm"]
  if not isinstance(algorithm["name"], str) or algorithm["name"] not in ALGORITHMS:
    return new
  if algorithm["name"] != old["name"]:
    stale = set(old)
  elif algorithm["loss"] != old["loss"]:
    stale = set(_settings(old)[1])
  else:
    stale = set(_settings(old)[1]) - set(_settings(algorithm)[1])  # keys that an option required
  stale -= {"name"}
  stale -= {key for section, key in changes if section == "algorithm"}
  return new | {"algorithm": {key: value for key, value in algorithm.items() if key not in stale}}


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
  """Loads the config of `FILE.py[:variant]` with overrides such as "algorithm.beta=0.05".

  An override of algorithm.loss brings the new loss's own hyper-parameters, instead of those that the file set for
  another loss.

  Args:
    path: of the file, which is run as Python, with its folder importable.
    overrides: "section.key=value" each; the value is read in the type of the key.

  Raises:
    InputError: no such file, an error in it, an unknown key, a value of the wrong type.
  """
  check_path("config", path)
  path = os.path.expanduser(os.fspath(path))
  if isinstance(overrides, str) or not isinstance(overrides, Sequence):
    raise InputError(f"overrides is a {type(overrides).__name__}; give a list such as ['algorithm.beta=0.05']")
  for override in overrides:
    if not isinstance(override, str):
      raise InputError(f"overrides: {override!r} is a {type(override).__name__}; write 'algorithm.beta=0.05'")
  file = path.partition(":")[0]
  if not os.path.isfile(file):
    raise InputError(f"--config={path}: no file {file}; name a file such as configs/dpo.py of the repository")
  with _importing_from(os.path.dirname(os.path.abspath(file))):
    return _overridden(resolve(_read(path)), overrides)


def _overridden(config: Config, overrides: Sequence[str]) -> Config:
  """Returns the config with the overrides; errors as in `load_config`.

  The keys that decide which other keys exist are set first: the algorithm, then its loss and options.
  """
  config = _with_overrides(config, _overrides_of(overrides, {"algorithm.name"}))
  deciding = {f"algorithm.{key}" for key in ("loss", *_fields(type(config.options)))}
  config = _with_overrides(config, _overrides_of(overrides, deciding))
  return _with_overrides(config, overrides)


def _overrides_of(overrides: Sequence[str], keys: Collection[str]) -> list[str]:
  """Returns the overrides of these keys."""
  return [override for override in overrides if override.partition("=")[0] in keys]


def _with_overrides(config: Config, overrides: Sequence[str]) -> Config:
  """Returns the config with overrides whose keys do not depend on each other."""
  if not overrides:
    return config
  known = config.to_dict()  # it has the keys that the file leaves at their defaults too
  known_keys = [f"{section}.{key}" for section in known for key in known[section]]
  changes = {}
  for override in overrides:
    dotted = override.partition("=")[0]
    if dotted not in known_keys:
      raise InputError(f"--config.{override}: no key {dotted}{nearest(dotted, known_keys)}")
  for override in overrides:
    section, key = override.partition("=")[0].split(".")
    changes[section, key] = _read_value(override, known[section][key])
  return resolve(_changed(known, changes))


def _read(path: str) -> dict[str, Any]:
  """Runs the config file and returns the result of its get_config as plain mappings."""
  file, _, variant = path.partition(":")
  try:
    get_config = runpy.run_path(file).get("get_config")
    if not callable(get_config):
      raise InputError(f"{path}: no get_config; a config file defines get_config(variant)")
    config = get_config(variant) if variant else get_config()
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
      raise InputError(f"{path}: get_config returns {type(config).__name__}; return a ConfigDict of sections")
    return ml_collections.ConfigDict(config).to_dict()
  except InputError:
    raise
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # the file is the user's own code: it may even exit
    text = " ".join(str(error).split())
    raise InputError(f"{path}: {type(error).__name__}: {text}; correct this file, or name another") from error


@contextlib.contextmanager
def _importing_from(folder: str) -> Iterator[None]:
  """Opens a context in which the modules of a folder can be imported: a config's neighbours, such as losses."""
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    if folder in sys.path:
      sys.path.remove(folder)


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a JSON object"}
BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def _read_value(override: str, old: Any) -> Any:
  """Reads the value of an override "section.key=text", in the type of the `old` value that it replaces.

  Raises:
    InputError: the text is no value of this type.
  """
  _, equals, text = override.partition("=")
  kind = type(old)
  try:
    if not equals:
      raise ValueError
    if kind is bool:
      return BOOLEANS[text.lower()]
    if kind is dict:
      return dict(json.loads(text))
    return kind(text)
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"--config.{override}: expected {KINDS[kind]}, as in {override.partition('=')[0]}={old}"
    ) from error


def _check_shape(raw) -> None:
  """Raises InputError unless `raw` is a mapping of known sections, each a mapping whose texts hold no null byte."""
  if not isinstance(raw, Mapping):
    raise InputError(f"config: {_kind(raw)}; give a mapping of sections, such as {{'run': {{'steps': 100}}}}")
  _check_known(raw, SECTIONS, "")
  for section, values in raw.items():
    if not isinstance(values, Mapping):
      raise InputError(f"config: {section} is {_kind(values)}; give a mapping of its keys")
    for key, value in values.items():
      if isinstance(value, str) and "\0" in value:
        raise InputError(f"{section}.{key}={value!r}: holds a null byte, which no path or name has")


def _kind(value) -> str:
  """Returns a value's type as an error names it."""
  if value is None:
    return "None"
  return f"a {type(value).__name__}"


def _section(cls, values, section):
  """Makes the dataclass `cls` of a section from its checked values."""
  _check_known(values, _fields(cls), f"{section}.")
  defaults = {field.name: _default(field) for field in dataclasses.fields(cls)}
  return cls(**{k: _typed(v, defaults[k], f"{section}.{k}") for k, v in values.items()})


def _default(field: dataclasses.Field) -> Any:
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


def _typed(value, default, name):
  """Returns `value` in the type of `default`; an int may stand for a float."""
  kind = type(default)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise InputError(f"{name}={value!r}: expected {kind.__name__}, as in {name}={default!r}")
  return value


def _fields(cls) -> list[str]:
  return [f.name for f in dataclasses.fields(cls)]


def _check_known(values, known, prefix):
  """Raises InputError if a key of `values` is not among the known ones; `prefix` is its section."""
  known_keys = [f"{prefix}{key}" for key in known]
  for name in values:
    key = f"{prefix}{name}"
    if key not in known_keys:
      raise InputError(f"config: unknown key {key}{nearest(key, known_keys)}")


def nearest(key: str, known: Iterable[str]) -> str:
  """Returns the end of an error's line, "; the nearest is NAME", with the known key most similar to this one.

  "" if there is no known key.
  """
  for name in difflib.get_close_matches(key, known, n=1, cutoff=0.0):
    return f"; the nearest is {name}"
  return ""
