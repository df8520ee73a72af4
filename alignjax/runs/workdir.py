"""The config of a run directory, and what must stay the same when the run continues."""

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

# Keys that may differ when a run is continued: its length, its habits, the machine, and the paths of its files. The
# content of the files is compared by fingerprint.
FILES = {"data.train", "data.eval", "data.tokenizer"}
MAY_CHANGE = (
  {"mesh", "data.workers", "data.cache", "optimizer.microbatches", "optimizer.offload"}
  | FILES
  | {f"run.{name}" for name in RunConfig.__dataclass_fields__.keys() - {"seed", "init", "reference"}}
)


PERMISSIONS = ("run_code", "code_isolation")  # keys of `reward_settings`: whether code is run, and how isolated


def without_permissions(config: Config) -> Config:
  """Removes the permissions of a stored config: the environment alone decides whether and how rewards may run code."""
  if not isinstance(config.options, SamplingOptions):
    return config
  settings = config.options.reward_settings
  kept = {name: value for name, value in settings.items() if name not in PERMISSIONS}
  return dataclasses.replace(config, options=dataclasses.replace(config.options, reward_settings=kept))


def read_config(workdir: epath.Path, given: Collection[str] = ()) -> Config:
  """Reads the config of a run directory.

  A loss of the user's own, module:function, is imported only with permission: `given` names it, or the environment
  trusts the records of runs. Without permission, the config serves for everything but training and evaluation.

  Args:
    workdir: of the run.
    given: names, module:function, that may be imported.

  Raises:
    InputError: there is none, or it cannot be read.
  """
  return _read(workdir, given)[0]


def _read(workdir: epath.Path, given: Collection[str] = ()) -> tuple[Config, dict[str, Any]]:
  """Reads the config of a run directory, and the whole record; arguments and errors as in `read_config`."""
  path = workdir / "config.json"
  if not path.exists():
    hint = hub.hint(str(workdir))
    raise InputError(f"{workdir}: not a run directory, it has no config.json; {hint}name a --workdir of alignjax train")
  with naming(path, "correct it there, or name another run"):
    record = output.read_json(path)
    return resolve(defaults.readable(record["config"]), stored=True, given=given), record


@contextlib.contextmanager
def naming(path: epath.Path, remedy: str) -> Iterator[None]:
  """Opens a context in which an error about a stored config becomes one line about its file.

  Args:
    path: of the file.
    remedy: the end of that line.

  Raises:
    InputError: instead of the error.
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
  """Returns lines about a stored setting that is refused by now, and the value it has in `read_config`; [] if none."""
  if hub.is_folder(str(workdir)):
    return []
  path = workdir / "config.json"
  line = defaults.replaced(output.read_json(path)["config"])
  if not line:
    return []
  return [f"{path}: {line}"]


def write_config(workdir: epath.Path, config: Config) -> None:
  """Writes the config of a run to its directory, in the first process; call it after all checks of the input.

  A run that has begun keeps the generation of the defaults that it began with.
  """
  if jax.process_index() != 0:
    return
  path = workdir / "config.json"
  since = defaults.GENERATION
  if path.exists():
    since = defaults.generation(output.read_json(path))
  record = {"config": config.to_dict(), defaults.KEY: since}
  record |= {"versions": provenance.versions(), "commit": provenance.commit()}
  output.write_json(path, record, "--workdir")


def alone(doing: str) -> Callable[[Callable], Callable]:
  """Returns a decorator that locks the folder in the argument `workdir`: no other process works there meanwhile.

  If a run has several hosts, the first takes the lock for all. Before anything else, the lock is taken and writing is
  tried.

  Args:
    doing: the verb in the error of a second process: "trains".
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
  """Returns the directory of the run that the config's `key` names.

  Args:
    key: such as "run.init", for error messages.
    directory: its value.

  Raises:
    InputError: it does not exist, or its checkpoints hold LoRA factors, which lack the base.
  """
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
  """Returns the config with the defaults that the run in `workdir` began with, and lines about those that have changed.

  Args:
    workdir: of the run; if it holds none, the config stays as it is.
    config: of the command that begins or continues the run.

  Raises:
    InputError: `workdir` is a file, or holds another run, or one that cannot be trained any more.
  """
  if workdir.exists() and not workdir.is_dir():
    raise InputError(f"{workdir}: is a file; choose another --workdir")
  if not (workdir / "config.json").exists():
    return config, []
  stored_config, record = _read(workdir)
  stored = stored_config.to_dict()
  notes: list[str] = []
  why = defaults.refused(record["config"])
  if not why:
    config, notes = defaults.kept(stored, defaults.generation(record), config)
  different = differences(stored, config.to_dict())
  if different:
    raise InputError(
      f"{workdir} holds another run: {'; '.join(different[:4])}; choose another --workdir, or that run's config"
    )
  if why:
    raise InputError(
      f"{workdir}: what this run began with is refused now: {why}; do so in another run, which begins with these "
      f"weights: another --workdir, with run.init={workdir}"
    )
  return config, notes


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """Returns lines about the keys whose values differ between two configs by section, without those that `MAY_CHANGE`.

  Args:
    old: of `Config.to_dict`; a missing key counts as None.
    new: likewise; its keys are compared.
  """
  may_change = MAY_CHANGE
  if new["lora"]["rank"]:
    may_change = MAY_CHANGE | {"run.init"}  # the base under LoRA factors is compared by digest
  lines = []
  for section, values in new.items():
    old_values = old.get(section, {})
    for key, value in values.items():
      if not {section, f"{section}.{key}"} & may_change and old_values.get(key) != value:
        lines.append(f"{section}.{key}={old_values.get(key)!r} there, {value!r} here")
  return lines


def same_everywhere(config: Config) -> dict[str, Any]:
  """Returns the JSON that every host of a run must have in common; compared before a host opens data or devices."""
  # Each host has its own paths: the content of the files is compared when they are open.
  host_keys = FILES | {"data.cache", "run.compile_cache"}
  sections = {}
  for section, values in config.to_dict().items():
    sections[section] = {key: value for key, value in values.items() if f"{section}.{key}" not in host_keys}
  code = {"commit": provenance.commit(), "source": provenance.source(), "versions": provenance.versions()}
  shape = [config.data.rows, config.data.row_length]
  return {"config_hash": digest(sections), "code": code, "batch_shape": shape, "config": sections}


def fingerprints(tokenizer: Tokenizer, train_data: Dataset, eval_data: Dataset | None) -> dict[str, str]:
  """Returns the fingerprints of a run's files, as its checkpoints record them: {"tokenizer", "data", "eval"}."""
  eval_fingerprint = ""
  if eval_data:
    eval_fingerprint = eval_data.fingerprint
  return {"tokenizer": tokenizer.fingerprint, "data": train_data.fingerprint, "eval": eval_fingerprint}


def check_identity(workdir: epath.Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
  """Raises InputError if the files of a run are not those that it began with.

  Args:
    workdir: of the run, for the message.
    saved: a checkpoint's metadata, with its `fingerprints`; one that it lacks is not compared.
    now: today's `fingerprints`.
  """
  for name, key in (("tokenizer", "tokenizer"), ("data", "train"), ("eval", "eval")):
    if name in saved and saved[name] != now[name]:  # early versions did not record the held-out data
      raise InputError(
        f"{workdir}: what is behind data.{key} has changed since this run began; bring the old file back, or choose "
        "another --workdir"
      )


def check_tokenizer(metadata: dict[str, Any], tokenizer: Tokenizer, config: Config) -> None:
  """Raises InputError if `tokenizer` is not the one that a checkpoint was trained with.

  Its ids would mean other text.

  Args:
    metadata: of the checkpoint; its "tokenizer" is the fingerprint compared.
    tokenizer: to use with the checkpoint.
    config: for the message only, which names config.data.tokenizer.
  """
  if metadata["tokenizer"] != tokenizer.fingerprint:
    raise InputError(
      f"data.tokenizer={config.data.tokenizer} is not the tokenizer that the checkpoint was trained with; "
      "name that file, or bring it back"
    )
