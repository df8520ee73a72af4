"""Saves a whole run as one atomic Orbax step, and verifies every array when it is read.

A step is a directory of items (`params`; `opt_state`; `run`: step, key, counters and hyper-parameters; `running` and
`synced` if the state has any) and a JSON record: the caller's metadata and the table of the arrays' shapes, dtypes and
fingerprints. It is written under a temporary name and then renamed, so a killed run leaves whole steps only, except for
an old step that was being deleted.
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

OPTIONAL = ("running", "synced")  # parts of the state that most runs lack


class Restored(NamedTuple):
  """A step that `Checkpointer.restore` read.

  Attributes:
    step: its number.
    state: as it was saved, or upgraded to today's form.
    hparams: the traced hyper-parameters.
    metadata: that `save` was given.
    notes: lines about values that an earlier version saved otherwise.
  """

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
    keep_latest: number of newest steps to keep; a restart continues from the newest.
    keep_every: multiples of this are kept too; None: no others.
    keep_best: (metric, "max" or "min", n): the n best of the steps saved with this metric are kept too; None: no
      others.

  Raises:
    InputError: the directory is a file, or cannot be made.
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
        cleanup_tmp_directories=True,  # a step that a killed run was writing
      )

  @property
  def steps(self) -> list[int]:
    """The saved steps, ascending; they are not read, so damaged ones are among them."""
    return [saved.step for saved in self._orbax.checkpoints]

  @property
  def latest_step(self) -> int | None:
    """The newest of `steps`; None if there are none."""
    return max(self.steps, default=None)

  def best_step(self, metric: str, mode: Literal["max", "min"] = "max") -> int | None:
    """Returns the step with the best `metric`, or the newest of several; None if no step was saved with it.

    Only steps that are kept count.
    """
    sign = {"max": 1, "min": -1}[mode]
    saved = [s for s in self._orbax.checkpoints if metric in (s.metrics or {})]
    return max(((sign * s.metrics[metric], s.step) for s in saved), default=(0, None))[1]

  def metrics(self, step: int) -> dict[str, float]:
    """Returns the metrics that a step was saved with; {} if it has none or does not exist."""
    for saved in self._orbax.checkpoints:
      if saved.step == step:
        return dict(saved.metrics or {})
    return {}

  def due(self, step: int) -> bool:
    """Returns True if `save` would write this step without force; write files that must be on disk before it now."""
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
    """Starts to write a step that is due or forced, and not yet saved; returns whether it did.

    The arrays are copied before it returns, so they may be donated; the rest happens in the background.

    Args:
      step: the number that the step is found under.
      state: `restore` returns it bit for bit.
      hparams: likewise.
      metadata: JSON: resolved config, versions, fingerprints of tokenizer and data, controllers.
      metrics: `keep_best` and `best_step` choose by these; a value that is not finite is left out.
      force: writes the step even if it is not due: the last one, or at a request to stop.

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
    """Reads the newest step that is as it was saved; None if nothing was ever saved.

    A damaged step is skipped with a warning. When an older one has been read, the damaged one is renamed to
    `<step>.unreadable`, so that the run can save that step again.

    Args:
      state: abstract, with shardings of any mesh; a leaf without one is replicated on that mesh.
      hparams: likewise.
      form: the arrays of a step -> how the state lies there; needed if an earlier version may have saved it.

    Raises:
      InputError: steps exist but none can be read, or the newest readable one holds other arrays than asked for.
    """
    self.wait()
    hosts.agree("checkpoints", {"steps": self.steps}, remedy=f"let every host see the same {self.directory}")
    damaged: dict[int, str] = {}
    for step in reversed(self.steps):
      path = self.directory / str(step)
      try:
        saved_form = Form(state)
        if form:
          saved_form = form(array_store.read_record(path)[1])
        items, metadata = array_store.read(path, _items(saved_form.state, hparams))
      except array_store.DamagedError as error:
        damaged[step] = str(error)
        warnings.warn(f"checkpoint {path} is skipped: {error}", stacklevel=2)
        continue
      self._set_aside(damaged)
      saved_state, hparams = _state(items)
      upgraded, notes = saved_form.upgrade(saved_state)
      return Restored(step, upgraded, hparams, metadata, notes)
    if damaged:
      causes = array_store.listed([f"{step}: {cause}" for step, cause in damaged.items()])
      remedy = "bring one back from a copy, or start in another workdir"
      raise InputError(f"{self.directory}: no checkpoint can be read ({causes}); {remedy}")
    return None

  def wait(self) -> None:
    """Waits until the step that `save` started is on disk.

    Raises:
      InputError: it could not be written.
    """
    try:
      self._orbax.wait()
    except Exception as error:  # from the writing threads: a full disk, a lost mount, anything
      raise InputError(f"{self.directory}: no checkpoint written: {array_store.cause(error)}") from error

  def close(self) -> None:
    """Waits as `wait` does, with its errors, and ends the writing threads."""
    self.wait()
    self._orbax.close()

  def _set_aside(self, steps: Mapping[int, str]) -> None:
    """Renames damaged steps: under their own names they would count among the latest, and block a save."""
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
  """Writes the only step of a run that is made without training, and waits until it is on disk.

  Args:
    directory: of the checkpoints.
    state: as for `Checkpointer.save`.
    hparams: likewise.
    metadata: JSON, with the "step".

  Raises:
    InputError: it cannot be written.
  """
  with contextlib.closing(Checkpointer(directory, save_every=1)) as checkpoints:
    checkpoints.save(metadata["step"], state, hparams, metadata=metadata, force=True)


def load_params(
  directory: epath.PathLike, params: Params, *, step: int | None = None, fresh: Sequence[str] = ()
) -> tuple[Params, dict[str, Any]]:
  """Reads and verifies the params of one step of a run, and its metadata; nothing else is read.

  Args:
    directory: of a `Checkpointer`.
    params: abstract, as in `restore`, but of any dtype: the saved array is verified, then cast.
    step: if None, the result of the run: the newest step, or the one that its metadata names as `result`.
    fresh: top-level names in `params` that the checkpoint may lack (a `score` head). A missing one is left out of the
      result, for the caller to make.

  Raises:
    InputError: no such step, it is damaged, or it holds other arrays than asked for.
  """
  return array_store.read_params(_step(directory, step), params, fresh)


def load_metadata(directory: epath.PathLike, step: int | None = None) -> dict[str, Any]:
  """Reads the metadata of one step of a run, by default its result; arguments and errors as in `load_params`."""
  return _record(directory, step)[0]


def params_digest(directory: epath.PathLike, step: int | None = None) -> str:
  """Computes the digest of the params of one step of a run (its result if None), as stored; errors as in `load_params`.

  Nothing but the step's record is read.
  """
  rows = _record(directory, step)[1]
  return digest({name: row for name, row in rows.items() if name.startswith("params/")})


def load_items(
  directory: epath.PathLike, items: dict[str, Any], *, step: int | None = None, fresh: Sequence[str] = ()
) -> dict[str, Any]:
  """Reads and verifies items ("running", "synced") of one step of a run; errors as in `load_params`.

  Args:
    directory: of a `Checkpointer`.
    items: abstract trees by item and name.
    step: as in `load_params`.
    fresh: arrays ("running/kl_factor") that the checkpoint may lack; a missing one is left out of the result.
  """
  path = _step(directory, step)
  try:
    missing: set[str] = set()
    if fresh:
      missing = set(fresh) - array_store.read_record(path)[1].keys()
    wanted = {}
    for item, trees in items.items():
      present = {name: tree for name, tree in trees.items() if f"{item}/{name}" not in missing}
      if present:
        wanted[item] = present
    return array_store.read(path, wanted)[0]
  except array_store.DamagedError as error:
    raise InputError(f"{path}: cannot be read: {error}; take another one, or a copy") from error


def load_running(directory: epath.PathLike, to: jax.sharding.Sharding, *, step: int | None = None) -> HParams:
  """Reads and verifies the running statistics of one step of a run, those that it has; errors as in `load_params`.

  Args:
    directory: of a `Checkpointer`.
    to: sharding of the scalars.
    step: as in `load_params`.
  """
  scalars = {
    name.removeprefix("running/"): jax.ShapeDtypeStruct(tuple(row["shape"]), row["dtype"], sharding=to)
    for name, row in _record(directory, step)[1].items()
    if name.startswith("running/")
  }
  return load_items(directory, {"running": scalars}, step=step).get("running", {})


def _record(directory: epath.PathLike, step: int | None) -> tuple[dict[str, Any], Table]:
  path = _step(directory, step)
  try:
    return array_store.read_record(path)
  except array_store.DamagedError as error:
    raise InputError(f"{path}: cannot be read: {error}; take another one, or a copy") from error


def _step(directory: epath.PathLike, step: int | None) -> epath.Path:
  """Returns the directory of a step; of the run's result if None.

  Raises:
    InputError: there is no step, or not this one.
  """
  directory = array_store.absolute(directory)
  steps: list[int] = []
  try:
    if directory.exists():
      steps = sorted(saved.step for saved in ocp.path.step.standard_name_format().find_all(directory))
  except Exception:  # Orbax reads the time of each step, and fails on a damaged one; reading that step says why
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
  """Repairs the files that Orbax reads of every step when it opens the directory: its metrics, and when it was written.

  Otherwise one damaged step would make all others unreadable. Metrics are restored from the step's sealed record.
  """
  if not directory.is_dir():
    return
  for path in sorted(directory.iterdir()):
    if not (path.name.isdigit() and path.is_dir()):
      continue
    description = path / "_CHECKPOINT_METADATA"
    if description.exists() and not _is_description(array_store.json_object(description)):
      output.remove(description)  # `restore` finds the step damaged
    sealed = array_store.metrics_of(path)
    if _has_whole_metrics(path / "metrics" / "metrics", sealed):
      continue
    if sealed:
      warnings.warn(f"checkpoint {path}: its metrics are damaged; taken from its record", stacklevel=3)
      output.write(path / "metrics" / "metrics", json.dumps(sealed))
    else:
      warnings.warn(f"checkpoint {path}: its metrics are damaged; left out", stacklevel=3)
      output.remove(path / "metrics")


def _has_whole_metrics(file: epath.Path, sealed: dict[str, float] | None) -> bool:
  """Returns True if a step's file of metrics is as its record says.

  `sealed` is None for a record that has none or is damaged.
  """
  if not file.exists():
    return not sealed
  content = array_store.json_object(file)
  if sealed is None:
    return _is_numbers(content)
  return content == sealed


def _is_description(content: dict[str, Any] | None) -> bool:
  """Returns True if the content of a file is Orbax's description of a step, with times that a calendar has."""
  if content is None:
    return False
  times = [value for name, value in content.items() if name.endswith("_nsecs")]
  return all(value is None or (isinstance(value, int) and 0 <= value < 2**62) for value in times)


def _is_numbers(content: dict[str, Any] | None) -> bool:
  return content is not None and all(isinstance(value, int | float) for value in content.values())


def _items(state: TrainState, hparams: HParams) -> dict[str, Any]:
  """Returns the items that Orbax saves separately, so that params can be read alone."""
  run = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  items = {name: run.pop(name) for name in ("params", "opt_state", *OPTIONAL)}
  for name in OPTIONAL:
    if not items[name]:
      del items[name]
  return items | {"run": run | {"hparams": hparams}}


def _state(items: dict[str, Any]) -> tuple[TrainState, HParams]:
  """Inverts `_items`."""
  run = dict(items["run"])
  hparams = run.pop("hparams")
  optional = {name: items.get(name, {}) for name in OPTIONAL}
  return TrainState(params=items["params"], opt_state=items["opt_state"], **optional, **run), hparams


def _preservation(
  latest: int, every: int | None, best: tuple[str, str, int] | None
) -> ocp.training.preservation_policies.PreservationPolicy:
  """Orbax's policy for which steps to keep; arguments as `keep_latest`, `keep_every`, `keep_best` of `Checkpointer`."""
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
