"""A run directory as one run's: its config, and what must stay the same where the run goes on."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
from etils import epath

from alignjax.algorithms.sampling_options import SamplingOptions
from alignjax.data.loader import Dataset
from alignjax.data.tokenizer import Tokenizer
from alignjax.errors import InputError, check_path
from alignjax.runs import defaults
from alignjax.runs.config import Config, RunConfig, resolve
from alignjax.system import hosts, hub, output, provenance
from alignjax.system.fingerprint import digest

# What may differ when a run is continued: its length, its habits, the machine it runs on, and where its files lie: what
# is in them is compared by fingerprint.
FILES = {"data.train", "data.eval", "data.tokenizer"}
MAY_CHANGE = (
  {"mesh", "data.workers", "data.cache", "optimizer.microbatches", "optimizer.offload"}
  | FILES
  | {f"run.{name}" for name in RunConfig.__dataclass_fields__.keys() - {"seed", "init", "reference"}}
)


PERMISSIONS = ("run_code", "code_isolation")  # of `reward_settings`: whether code is run, and with how little isolation


def without_permissions(config: Config) -> Config:
  """A stored config that permits nothing: the environment alone says whether rewards may run code, and how isolated."""
  if not isinstance(config.options, SamplingOptions):
    return config
  settings = config.options.reward_settings
  kept = {name: value for name, value in settings.items() if name not in PERMISSIONS}
  return dataclasses.replace(config, options=dataclasses.replace(config.options, reward_settings=kept))


def read_config(workdir: epath.Path, given: Collection[str] = ()) -> Config:
  """The config that a run directory records.

  A loss of the user's own, module:function, is imported only with permission: `given` names it, or the environment
  trusts what runs record. Otherwise the config serves for all but training and evaluation.

  Raises:
    InputError: there is none, or it can not be read.
  """
  return _read(workdir, given)[0]


def _read(workdir: epath.Path, given: Collection[str] = ()) -> tuple[Config, dict[str, Any]]:
  """The config that a run directory records, and the record itself; errors as in `read_config`."""
  path = workdir / "config.json"
  if not path.exists():
    hint = hub.hint(str(workdir))
    raise InputError(f"{workdir}: not a run directory, it has no config.json; {hint}name a --workdir of alignjax train")
  with naming(path, "correct it there, or name another run"):
    record = output.read_json(path)
    return resolve(defaults.readable(record["config"]), stored=True, given=given), record


@contextlib.contextmanager
def naming(path: epath.Path, remedy: str) -> Iterator[None]:
  """Makes an error about a stored config one line about its file.

  Raises:
    InputError: in its place.
  """
  try:
    yield
  except output.DamagedError:
    raise
  except InputError as error:  # of another version, or changed by hand
    raise InputError(f"{path}: {error}; {remedy}") from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:  # not a config
    raise InputError(f"{path}: not the config of a run ({error}); choose another --workdir") from error


def replaced(workdir: epath.Path) -> list[str]:
  """A line about a stored setting that is refused by now, and what `read_config` has in its place; [] where none is."""
  if hub.is_folder(str(workdir)):
    return []
  path = workdir / "config.json"
  found = defaults.replaced(output.read_json(path)["config"])
  return [f"{path}: {found}"] if found else []


def write_config(workdir: epath.Path, config: Config) -> None:
  """Makes the run directory this run's: only now, when nothing in the input is found wrong.

  Where it is one already, it stays one of the defaults that it began with.
  """
  if jax.process_index() != 0:
    return
  path = workdir / "config.json"
  since = defaults.generation(output.read_json(path)) if path.exists() else defaults.GENERATION
  record = {"config": config.to_dict(), defaults.KEY: since}
  record |= {"versions": provenance.versions(), "commit": provenance.commit()}
  output.write_json(path, record, "--workdir")


def alone(doing: str) -> Callable[[Callable], Callable]:
  """Decorates what works in the folder that is its argument `workdir`: no other run does so at the same time.

  Of several hosts of one run the first has the lock, for all. It is tried, as is writing, before anything else.

  Args:
    doing: what another is told: "trains".
  """

  def decorate(function):
    signature = inspect.signature(function)

    @functools.wraps(function)
    def decorated(*args, **kwargs):
      workdir = signature.bind(*args, **kwargs).arguments["workdir"]
      check_path("workdir", workdir)
      with hosts.held("workdir", lambda: output.lock(workdir, doing, "--workdir")):
        return function(*args, **kwargs)

    return decorated

  return decorate


def whole_run(key: str, directory: str) -> epath.Path:
  """The directory of the run that `key` names, unless its checkpoints are of LoRA factors: they lack the base."""
  path = epath.Path(directory).expanduser()
  if not path.exists() and (hint := hub.hint(directory)):
    raise InputError(f"{key}={directory}: no such run or folder; {hint}name one that is there")
  if (path / "config.json").exists() and read_config(path).lora.rank:
    raise InputError(
      f"{key}={directory}: holds LoRA factors without their base; make a run of both with "
      f"`alignjax adapter merge --workdir {directory} --out DIR` and name that"
    )
  return path


def as_begun(workdir: epath.Path, config: Config) -> tuple[Config, list[str]]:
  """The config with the defaults that the run in a directory began with, and lines about what differs from today's.

  Raises:
    InputError: the directory is none, or holds another run, or one that can not be trained on.
  """
  if workdir.exists() and not workdir.is_dir():
    raise InputError(f"{workdir}: is a file; choose another --workdir")
  if not (workdir / "config.json").exists():
    return config, []
  began, record = _read(workdir)
  there = began.to_dict()
  why = defaults.refused(record["config"])
  new, notes = (config, []) if why else defaults.kept(there, defaults.generation(record), config)
  found = differences(there, new.to_dict())
  if found:
    raise InputError(
      f"{workdir} holds another run: {'; '.join(found[:4])}; choose another --workdir, or that run's config"
    )
  if why:
    raise InputError(
      f"{workdir}: what this run began with is refused now: {why}; do so in another run, which begins with these "
      f"weights: another --workdir, with run.init={workdir}"
    )
  return new, notes


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """What differs beyond `MAY_CHANGE`, one line a key."""
  held = {"run.init"} if new["lora"]["rank"] else set()  # the base under LoRA factors is compared by digest
  return [
    f"{section}.{key}={old.get(section, {}).get(key)!r} there, {value!r} here"
    for section, values in new.items()
    for key, value in values.items()
    if not {section, f"{section}.{key}"} & (MAY_CHANGE | held) and old.get(section, {}).get(key) != value
  ]


def same_everywhere(config: Config) -> dict[str, Any]:
  """What every host of a run must have in common, before the first of them touches data or devices."""
  own = FILES | {"data.cache", "run.compile_cache"}  # each host's: what is in the files is compared when they are open
  sections = config.to_dict().items()
  kept = {s: {k: v for k, v in keys.items() if f"{s}.{k}" not in own} for s, keys in sections}
  code = {"commit": provenance.commit(), "source": provenance.source(), "versions": provenance.versions()}
  shape = [config.data.rows, config.data.row_length]
  return {"config_hash": digest(kept), "code": code, "batch_shape": shape, "config": kept}


def fingerprints(tokenizer: Tokenizer, train_data: Dataset, eval_data: Dataset | None) -> dict[str, str]:
  """Of the files behind a run, as its checkpoints record them."""
  evaluation = eval_data.fingerprint if eval_data else ""
  return {"tokenizer": tokenizer.fingerprint, "data": train_data.fingerprint, "eval": evaluation}


def check_identity(workdir: epath.Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
  """Raises InputError where the files behind a run are no longer those it began with."""
  for name, key in (("tokenizer", "tokenizer"), ("data", "train"), ("eval", "eval")):
    if name in saved and saved[name] != now[name]:  # the first runs did not record what is held out
      raise InputError(
        f"{workdir}: what is behind data.{key} has changed since this run began; bring the old file back, or choose "
        "another --workdir"
      )


def check_tokenizer(metadata: dict[str, Any], tokenizer: Tokenizer, config: Config) -> None:
  """Raises InputError where a checkpoint was trained with another tokenizer."""
  if metadata["tokenizer"] != tokenizer.fingerprint:
    raise InputError(
      f"data.tokenizer={config.data.tokenizer} is not the tokenizer that the checkpoint was trained with; "
      "name that file, or bring it back"
    )
