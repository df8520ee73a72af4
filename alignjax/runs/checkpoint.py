"""One atomic Orbax step holds the whole run, and every array in it is verified when it is read.

A step is a directory of items (`params`; `opt_state`; `run`: step, key, counters and hyper-parameters; `running` and
`synced` where the state has any) and a JSON record: the caller's metadata and the table of the arrays' shapes, dtypes
and fingerprints. It is written under a temporary name and then renamed, so what a killed run leaves is whole, save for
an old step that was just being deleted.
"""

import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from alignjax.errors import InputError
from alignjax.runs import array_store
from alignjax.system import hosts, output
from alignjax.system.fingerprint import Table, digest, table
from alignjax.training.earlier import Form
from alignjax.types import HParams, Params, TrainState

OPTIONAL = ("running", "synced")  # parts of the state that most runs have none of


class Restored(NamedTuple):
  """What `Checkpointer.restore` found."""

  step: int
  state: TrainState
  hparams: HParams
  metadata: dict[str, Any]
  notes: tuple[str, ...] = ()


class Checkpointer:
  """Saves and restores the steps of one run; every process calls every method.

  Args:
    directory: any path that `etils.epath` reads; made if missing.
    save_every: a step is due at multiples of this, and when the scheduler announces a preemption.
    keep_latest: the number of newest steps that are kept; a restart continues from the newest.
    keep_every: multiples of this are kept as well.
    keep_best: (metric, "max" or "min", n): as are the n best of the steps saved with this metric.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    save_every: int,
    keep_latest: int = 2,
    keep_every: int | None = None,
    keep_best: tuple[str, Literal["max", "min"], int] | None = None,
  ):
    policies = ocp.training.save_decision_policies
    self.directory = array_store.absolute(directory)
    if self.directory.exists() and not self.directory.is_dir():
      raise InputError(f"{self.directory}: is a file, where the checkpoints go; move it away")
    if jax.process_index() == 0:
      _mend(self.directory)
    hosts.meet()
    with output.failing(self.directory):
      self._orbax = ocp.training.Checkpointer(
        self.directory,
        context=array_store.context(),
        save_decision_policy=policies.AnySavePolicy(
          [policies.FixedIntervalPolicy(save_every), policies.PreemptionCheckpointingPolicy()]
        ),
        preservation_policy=_preservation(keep_latest, keep_every, keep_best),
        cleanup_tmp_directories=True,  # what a killed run was writing
      )

  @property
  def steps(self) -> list[int]:
    """The saved steps, ascending, unread: a damaged one is among them."""
    return [saved.step for saved in self._orbax.checkpoints]

  @property
  def latest_step(self) -> int | None:
    """The newest of `steps`, None before the first."""
    return max(self.steps, default=None)

  def best_step(self, metric: str, mode: Literal["max", "min"] = "max") -> int | None:
    """The step with the best `metric`, the newest of equals; None if none was saved with it."""
    sign = {"max": 1, "min": -1}[mode]
    saved = [s for s in self._orbax.checkpoints if metric in (s.metrics or {})]
    return max(((sign * s.metrics[metric], s.step) for s in saved), default=(0, None))[1]

  def metrics(self, step: int) -> dict[str, float]:
    """The metrics that a step was saved with; {} where it had none or is not there."""
    return next((dict(saved.metrics or {}) for saved in self._orbax.checkpoints if saved.step == step), {})

  def due(self, step: int) -> bool:
    """Whether `save` would write this step: time to write what must be on disk before it."""
    return self._orbax.should_save(step)

  def save(
    self,
    step: int,
    state: TrainState,
    hparams: HParams,
    *,
    metadata: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    force: bool = False,
  ) -> bool:
    """Starts to write a step that is due, or forced, and not yet there; returns whether it did.

    The arrays are copied before it returns, so they may be donated; the rest happens behind.

    Args:
      step: the number that the step is found under.
      state: what `restore` gives back bit for bit.
      hparams: likewise.
      metadata: JSON: resolved config, versions, fingerprints of tokenizer and data, controllers.
      metrics: what `keep_best` and `best_step` choose by; a value that is not finite is left out.
      force: for the last step, or at a request to stop.

    Raises:
      InputError: the previous step could not be written.
    """
    if step == self.latest_step or not (force or self.due(step)):
      return False
    self.wait()
    items = _items(state, hparams)
    finite = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
    record = array_store.make_record(metadata, table(items), finite)
    try:
      self._orbax.save_checkpointables_async(step, items | {"record": record}, force=force, metrics=finite or None)
    except OSError as error:
      raise InputError(f"{self.directory}: no checkpoint written: {array_store.cause(error)}") from error
    return True

  def restore(
    self, state: TrainState, hparams: HParams, form: Callable[[Table], Form] | None = None
  ) -> Restored | None:
    """The newest step that reads back as it was saved; None where nothing was ever saved.

    A damaged step is skipped with a warning; when an older one has been read it is renamed to `<step>.unreadable`, so
    that the run can save that step again.

    Args:
      state: abstract, with shardings of any mesh; a leaf without one is replicated on that mesh.
      hparams: likewise.
      form: the arrays of a step -> how the state lies there, where an earlier version may have saved it.

    Raises:
      InputError: no step can be read though there are some, or the newest that can holds other arrays than asked for.
    """
    self.wait()
    hosts.agree("checkpoints", {"steps": self.steps}, remedy=f"let every host see the same {self.directory}")
    damaged: dict[int, str] = {}
    for step in reversed(self.steps):
      path = self.directory / str(step)
      try:
        lies = form(array_store.read_record(path)[1]) if form else Form(state)
        items, metadata = array_store.read(path, _items(lies.state, hparams))
      except array_store.DamagedError as error:
        damaged[step] = str(error)
        warnings.warn(f"checkpoint {path} is skipped: {error}", stacklevel=2)
        continue
      self._set_aside(damaged)
      found, hparams = _state(items)
      found, notes = lies.upgrade(found)
      return Restored(step, found, hparams, metadata, notes)
    if damaged:
      causes = array_store.listed([f"{step}: {cause}" for step, cause in damaged.items()])
      remedy = "bring one back from a copy, or start in another workdir"
      raise InputError(f"{self.directory}: no checkpoint can be read ({causes}); {remedy}")
    return None

  def wait(self) -> None:
    """Returns when what was started is on disk.

    Raises:
      InputError: it could not be written.
    """
    try:
      self._orbax.wait()
    except Exception as error:  # from the writing threads: a full disk, a lost mount, anything
      raise InputError(f"{self.directory}: no checkpoint written: {array_store.cause(error)}") from error

  def close(self) -> None:
    """Waits, raising what `wait` does, and ends the writing threads."""
    self.wait()
    self._orbax.close()

  def _set_aside(self, steps: Mapping[int, str]) -> None:
    """Renames damaged steps: in place, they would be counted among the latest and block a save."""
    if not steps:
      return
    if jax.process_index() == 0:
      for step in steps:
        aside = self.directory / f"{step}.unreadable"
        output.remove(aside)
        output.rename(self.directory / str(step), aside)
    hosts.meet()
    self._orbax.reload()


def save_single(directory: epath.PathLike, state: TrainState, hparams: HParams, metadata: Mapping[str, Any]) -> None:
  """Writes the step that `metadata` names, the only one of a run that is made as a whole; errors as in `save`."""
  with contextlib.closing(Checkpointer(directory, save_every=1)) as checkpoints:
    checkpoints.save(metadata["step"], state, hparams, metadata=metadata, force=True)


def load_params(
  directory: epath.PathLike, params: Params, *, step: int | None = None, fresh: Sequence[str] = ()
) -> tuple[Params, dict[str, Any]]:
  """The verified params of one step of a run, and its metadata; nothing else is read.

  Args:
    directory: of a `Checkpointer`.
    params: abstract, as in `restore`, but any dtype: the saved one is verified, then cast.
    step: the one that the run gives if None: the newest, or what that names as the run's `result`.
    fresh: top-level names in `params` that the checkpoint may lack (a `score` head): left out of the result where it
      does, for the caller to make.

  Raises:
    InputError: no such step, it is damaged, or it holds other arrays than asked for.
  """
  return array_store.read_params(_step(directory, step), params, fresh)


def load_metadata(directory: epath.PathLike, step: int | None = None) -> dict[str, Any]:
  """The metadata of one step of a run (the newest if None); errors as in `load_params`."""
  return _record(directory, step)[0]


def params_digest(directory: epath.PathLike, step: int | None = None) -> str:
  """What names the params of one step of a run (the one it gives if None), as stored; errors as in `load_params`."""
  rows = _record(directory, step)[1]
  return digest({name: row for name, row in rows.items() if name.startswith("params/")})


def load_items(
  directory: epath.PathLike, items: dict[str, Any], *, step: int | None = None, fresh: Sequence[str] = ()
) -> dict[str, Any]:
  """The verified items ("running", "synced") of one step of a run; abstract trees and errors as in `load_params`.

  `fresh` are those arrays ("running/kl_factor") that the checkpoint may lack: they are left out where it does.
  """
  path = _step(directory, step)
  try:
    if fresh:
      missing = set(fresh) - array_store.read_record(path)[1].keys()
      items = {
        item: {name: tree for name, tree in trees.items() if f"{item}/{name}" not in missing}
        for item, trees in items.items()
      }
    return array_store.read(path, {item: trees for item, trees in items.items() if trees})[0]
  except array_store.DamagedError as error:
    raise InputError(f"{path}: cannot be read: {error}; take another one, or a copy") from error


def _record(directory: epath.PathLike, step: int | None) -> tuple[dict[str, Any], Table]:
  path = _step(directory, step)
  try:
    return array_store.read_record(path)
  except array_store.DamagedError as error:
    raise InputError(f"{path}: cannot be read: {error}; take another one, or a copy") from error


def _step(directory: epath.PathLike, step: int | None) -> epath.Path:
  """The directory of a step; of the one that the run gives if None."""
  directory = array_store.absolute(directory)
  try:
    found = ocp.path.step.standard_name_format().find_all(directory) if directory.exists() else ()
    steps = sorted(saved.step for saved in found)
  except Exception:  # Orbax reads when each was written: of a damaged one, anything; reading that one says why
    steps = sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
  if not steps:
    raise InputError(f"{directory}: has no checkpoint; is it the checkpoint folder of a run?")
  if step is not None and step not in steps:
    raise InputError(f"{directory}: has no checkpoint {step}; it has {steps}")
  if step is not None:
    return directory / str(step)
  try:
    result = array_store.read_record(directory / str(steps[-1]))[0].get("result", steps[-1])
  except array_store.DamagedError:  # reading it says why
    result = steps[-1]
  return directory / str(result)


def _mend(directory: epath.Path) -> None:
  """Sees to it that Orbax can read what it reads of every step, asked for or not: its metrics, and when it was written.

  Else a step that is damaged there would keep it from the others. Metrics are taken from the step's sealed record.
  """
  for path in sorted(directory.iterdir()) if directory.is_dir() else ():
    if not (path.name.isdigit() and path.is_dir()):
      continue
    described = path / "_CHECKPOINT_METADATA"
    if described.exists() and not _is_description(array_store.json_object(described)):
      output.remove(described)  # `restore` finds the step damaged
    folder, sealed = path / "metrics", array_store.metrics_of(path)
    there, found = (folder / "metrics").exists(), array_store.json_object(folder / "metrics")
    if not there and not sealed:
      continue
    if there and (_is_numbers(found) if sealed is None else found == sealed):
      continue
    remedy = "taken from its record" if sealed else "left out"
    warnings.warn(f"checkpoint {path}: its metrics are damaged; {remedy}", stacklevel=3)
    if sealed:
      output.write(folder / "metrics", json.dumps(sealed))
    else:
      output.remove(folder)


def _is_description(found: dict[str, Any] | None) -> bool:
  """Whether this is an object of Orbax's with times that a calendar has."""
  times = [value for name, value in (found or {}).items() if name.endswith("_nsecs")]
  return found is not None and all(value is None or (isinstance(value, int) and 0 <= value < 2**62) for value in times)


def _is_numbers(found: dict[str, Any] | None) -> bool:
  return found is not None and all(isinstance(value, int | float) for value in found.values())


def _items(state: TrainState, hparams: HParams) -> dict[str, Any]:
  """What Orbax saves apart, so that params can be read alone."""
  run = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  apart = {name: run.pop(name) for name in ("params", "opt_state", *OPTIONAL)}
  return {name: tree for name, tree in apart.items() if tree or name not in OPTIONAL} | {
    "run": run | {"hparams": hparams}
  }


def _state(items: dict[str, Any]) -> tuple[TrainState, HParams]:
  """The inverse of `_items`."""
  run = dict(items["run"])
  hparams = run.pop("hparams")
  optional = {name: items.get(name, {}) for name in OPTIONAL}
  return TrainState(params=items["params"], opt_state=items["opt_state"], **optional, **run), hparams


def _preservation(
  latest: int, every: int | None, best: tuple[str, str, int] | None
) -> ocp.training.preservation_policies.PreservationPolicy:
  policies = ocp.training.preservation_policies
  keep = [policies.LatestN(latest)]
  if every is not None:
    keep.append(policies.EveryNSteps(every))
  if best is not None:
    metric, mode, n = best
    worst = {"max": -math.inf, "min": math.inf}[mode]
    keep.append(
      policies.BestN(
        get_metric_fn=lambda metrics: metrics.get(metric, worst),
        reverse=mode == "min",
        n=n,
        keep_checkpoints_without_metrics=False,
      )
    )
  return policies.AnyPreservationPolicy(keep)
