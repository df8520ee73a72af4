"""Runs opened by name to be served in one process; LoRA runs of one base hold it once."""

import os
from collections.abc import Mapping

import jax
from etils import epath

from alignjax.errors import InputError
from alignjax.runs.run import Run, load
from alignjax.runs.workdir import read_config
from alignjax.serving.engine import Engine
from alignjax.serving.served import Served, name_of
from alignjax.system import hub

USUAL_CONTEXT = 2048  # tokens, of a model that does not say how many positions it has
LARGEST_CONTEXT = 8192  # that is taken without being asked for: the cache's memory grows with it


def named(workdirs: list[str]) -> dict[str, str]:
  """Returns the run directories of the flags --workdir by name.

  A flag is a directory, whose last part is the name, or NAME=DIRECTORY.

  Raises:
    InputError: two have one name.
  """
  sources: dict[str, str] = {}
  for text in workdirs:
    name, equals, path = text.partition("=")
    if not equals or os.path.exists(text):
      name = name_of(text)
      path = text
    if name in sources:
      raise InputError(f"--workdir={text}: another run has the name {name!r}; write --workdir NAME={path}")
    sources[name] = path
  return sources


def open_models(
  sources: Mapping[str, str], slots: int, context: int | None = None, step: int | None = None
) -> dict[str, Served]:
  """Loads runs, compiles what a short request needs, and returns the models by name.

  Args:
    sources: run directories or Hugging Face folders by name.
    slots: of each model.
    context: the most tokens of a prompt with its completion; None: the model's positions, within `LARGEST_CONTEXT`.
    step: of the checkpoint, if there is one run; the runs' results if None.

  Raises:
    InputError: as `load` and `Engine`.
  """
  if step is not None and len(sources) > 1:
    raise InputError(f"--step={step}: is of one run, and there are {len(sources)}; leave it out")
  for source in sources.values():  # before the first is loaded, which may take minutes
    if not hub.is_folder(source):
      read_config(epath.Path(source).expanduser())
  bases: dict[str, Engine] = {}
  models = {}
  for name, source in sources.items():
    run = load(source, step)
    base = bases.get(_base_of(run))
    with jax.set_mesh(run.mesh):
      engine = Engine(run, slots, context or _context_of(run), base)
      engine.warm()
    if base is None and _base_of(run):
      bases[_base_of(run)] = engine
    models[name] = Served(name, source, engine)
  return models


def _base_of(run: Run) -> str:
  """Returns the digest of the base under a run's LoRA factors; "" if it has none."""
  return run.metadata.get("base", {}).get("digest", "")


def _context_of(run: Run) -> int:
  """Returns the context of a run that was given none."""
  return min(run.model.config.max_positions or USUAL_CONTEXT, LARGEST_CONTEXT)
