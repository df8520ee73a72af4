"""Six-step runs of configs/NAME.py:smoke: made once a session, handed out as copies, and what tests ask of them."""

import contextlib
import functools
import importlib
import pkgutil
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax

import alignjax
from alignjax import algorithms, commands, evaluation, runs, sampling, system, training
from alignjax.commands import best_of
from alignjax.runs import array_store
from alignjax.runs.config import Config, load_config
from alignjax.runs.run import Run
from alignjax.system import sharding
from alignjax.system.preemption import Preemption
from alignjax.train import fit
from alignjax.training import metrics

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DATA = CONFIGS / "smoke"
NAMES = ("sft", "reward", "dpo")
STEPS = 6
_SESSION = tempfile.TemporaryDirectory(prefix="alignjax-smoke-")  # removed when the process ends
# A module that is first imported while a test has replaced a name would keep the replacement.
for _package in (alignjax, algorithms, commands, evaluation, runs, sampling, system, training):
  for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
    importlib.import_module(_module.name)
FLAGS = ("--config.run.compile_cache=", f"--config.data.cache={_SESSION.name}/cache")  # nothing in the user's home


class Killed(Exception):
  """Stands for the end of a process."""


@functools.cache
def _loaded(name: str) -> Config:
  loaded = load_config(f"{CONFIGS / name}.py:smoke")
  return loaded.replace({"run.compile_cache": "", "data.cache": f"{_SESSION.name}/cache"})


def config(name: str, **overrides: Any) -> Config:
  """configs/NAME.py:smoke with overrides as keywords, run__steps=3."""
  return _loaded(name).replace(dotted(overrides))


def dotted(overrides: Mapping[str, Any]) -> dict[str, Any]:
  """Keywords such as run__steps as the dotted keys that `Config.replace` takes."""
  return {name.replace("__", ".", 1): value for name, value in overrides.items()}


def arguments(name: str, workdir: Path, *overrides: str) -> list[str]:
  """The same run for the command line, overrides as "run.steps=3"."""
  flags = [*FLAGS, *(f"--config.{override}" for override in overrides)]
  return ["train", "--config", f"{CONFIGS / name}.py:smoke", "--workdir", str(workdir), *flags]


@functools.cache
def finished(name: str) -> tuple[Path, Run]:
  """A run that nothing disturbed; its directory is shared by all tests: `copy` it to change it."""
  workdir = Path(_SESSION.name) / name
  return workdir, fit(config(name), workdir)


@functools.cache
def interrupted(name: str, step: int) -> Path:
  """The directory of a run that died when it had taken `step`."""
  workdir = Path(_SESSION.name) / f"{name}-{step}"
  interrupt(config(name), workdir, step)
  return workdir


def interrupt(config: Config, workdir: Path, step: int) -> None:
  """Runs until `step` has been taken, and dies there: what was not yet saved is lost."""
  interrupted_by(lambda: fit(config, workdir), step)


def interrupted_by(training: Callable[[], Any], step: int) -> None:
  """Calls what trains, which dies when `step` has been taken."""

  def die(_, now):
    if now == step:
      raise Killed
    return False

  with mock.patch.object(Preemption, "requested", die), contextlib.suppress(Killed):
    training()
    raise AssertionError(f"the run did not come to step {step}")


@contextlib.contextmanager
def all_end() -> Iterator[None]:
  """Within, `best_of` takes every completion for one that ended by itself: those of six steps of training hardly do."""
  sample = best_of.sample_text
  ended = lambda *args, **kwargs: [completion._replace(finished=True) for completion in sample(*args, **kwargs)]
  with mock.patch.object(best_of, "sample_text", ended):
    yield


def copy(workdir: Path, to: Path) -> Path:
  """A run directory that a test may change."""
  return Path(shutil.copytree(workdir, to))


@contextlib.contextmanager
def devices(count: int, order: Sequence[int] | None = None):
  """Meshes within take the first `count` devices for all there are, or those of these numbers."""
  make = sharding.make_mesh
  chosen = [jax.devices()[number] for number in order or range(count)]
  some = lambda devices=None, **sizes: make(**sizes, devices=devices or chosen)
  with mock.patch.object(sharding, "make_mesh", some):
    yield


def arrays(workdir: Path, step: int = STEPS) -> dict[str, Any]:
  """Shape, dtype and fingerprint of every array of a checkpoint: parameters, optimizer state, key and counters."""
  return array_store.read_record(workdir / "checkpoints" / str(step))[1]


def lines(workdir: Path) -> str:
  """The text of metrics.jsonl."""
  return (workdir / "metrics.jsonl").read_text()


def losses(workdir: Path) -> list[float]:
  """The training loss of each step."""
  return [row["loss"] for row in metrics.read(workdir / "metrics.jsonl") if "loss" in row]


def files(folder: Path) -> dict[str, bytes]:
  """Every file below a folder, by path; {} where there is no folder."""
  return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
