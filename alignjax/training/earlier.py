"""Reads a training state that an earlier version saved as one of today's.

The state is read in the form in which it was saved, and then upgraded. Trained values stay bit for bit the same. A new
value gets the one that it would have had, or else its initial one, and a line reports that.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignjax.algorithms import Algorithm
from alignjax.algorithms.algorithm import First
from alignjax.system.fingerprint import Table, flatten, path_name
from alignjax.training.optim import Parts
from alignjax.types import HParams, Params, TrainState


def unchanged(state: TrainState) -> tuple[TrainState, tuple[str, ...]]:
  """Returns the state of a checkpoint of this version as it is, with nothing to report: (state, ())."""
  return state, ()


class Form(NamedTuple):
  """The form in which a state lies in a checkpoint.

  Attributes:
    state: the state to ask the checkpoint for, abstract and placed.
    upgrade: the state that was read -> (today's state, a line about each value that differs from the saved one).
  """

  state: TrainState
  upgrade: Callable[[TrainState], tuple[TrainState, tuple[str, ...]]] = unchanged


def form(saved: Table, *, state: TrainState, algorithm: Algorithm, undivided: optax.OptState | None = None) -> Form:
  """Returns the form in which a state lies in a checkpoint with these arrays.

  It may differ from today's in three ways: a running statistic is missing; the optimizer's state of the parameters that
  are trained first is not separate from the rest; the arrays that belong to bfloat16 parameters are in bfloat16 too.
  Any other difference is left for the reading to find.

  Args:
    saved: the arrays of the checkpoint.
    state: today's, abstract and placed.
    algorithm: of the run.
    undivided: the optimizer's state without a separate part that is trained first, abstract and placed; None if the
      algorithm has no such part.
  """
  running = {name: leaf for name, leaf in state.running.items() if f"running/{name}" in saved}
  saved_opt_state = {name for name in saved if name.startswith("opt_state/")}
  opt_state = state.opt_state
  is_undivided = undivided is not None and saved_opt_state == flatten({"opt_state": undivided}).keys()
  if is_undivided:
    opt_state = undivided
  asked = dataclasses.replace(
    state,
    running=running,
    params=_as_saved(saved, "params", state.params),
    opt_state=_as_saved(saved, "opt_state", opt_state),
  )

  def upgrade(loaded: TrainState) -> tuple[TrainState, tuple[str, ...]]:
    running, notes = fill(loaded.running, state.running, algorithm)
    opt_state = loaded.opt_state
    if is_undivided:
      assert algorithm.first is not None
      begun = bool(algorithm.first.over(running))
      opt_state = divide(opt_state, state.opt_state, begun)
      notes.append(_divided_note(algorithm.first, begun))
    narrow = {"params": loaded.params, "opt_state": opt_state}
    wide = jax.tree.map(_wide, narrow, {name: getattr(state, name) for name in narrow})
    notes += _widened_notes(narrow, wide)
    return dataclasses.replace(loaded, running=running, **wide), tuple(notes)

  return Form(asked, upgrade)


def fill(running: HParams, wanted: HParams, algorithm: Algorithm) -> tuple[HParams, list[str]]:
  """Adds the running statistics that a checkpoint lacks; returns them all, and a line about each new one.

  Args:
    running: as they were read.
    wanted: all of today's, abstract and placed.
    algorithm: gives the initial value of each, or the name of the statistic that a new one was split from (`since`).
  """
  filled = dict(running)
  notes = []
  for name, to in wanted.items():
    if name in running:
      continue
    origin = algorithm.since.get(name)
    if origin in running:
      filled[name] = jnp.copy(running[origin])  # the state is donated: no buffer twice
      value = f"what {origin} has"
    else:
      filled[name] = jnp.full(to.shape, algorithm.running[name], to.dtype, device=to.sharding)
      value = f"{algorithm.running[name]:g}"
    notes.append(f"the checkpoint lacks the running statistic {name}, which is new: it begins with {value}")
  return {name: filled[name] for name in wanted}, notes


def divide(state: optax.OptState, wanted: optax.OptState, begun: bool) -> optax.OptState:
  """Splits an optimizer's state of all parameters into `Parts`, wherever `wanted` has them.

  The state of the rest is kept if its training had `begun`. Otherwise its moments are zero or of other gradients than
  its own, and its count ran ahead of them: it starts with zeros, as every optimizer does.

  Args:
    state: of all parameters.
    wanted: with `Parts`, abstract and placed.
    begun: whether the rest has been trained.
  """

  def split(saved: Any, to: Any) -> Any:
    if not isinstance(to, Parts):
      return saved
    source = flatten(saved)
    rest = _taken(to.rest, source) if begun else _zeros(to.rest)
    return Parts(_taken(to.first, source), rest)

  return tuple(split(saved, to) for saved, to in zip(state, wanted, strict=True))


def _taken(part: Any, source: Mapping[str, jax.Array]) -> Any:
  """Returns the state of a part, with the arrays that have the same paths in `source`."""

  def array_at(path, leaf):
    del leaf
    array = source[path_name(path)]
    # The count is in both parts, and the state is donated: no buffer twice.
    if array.ndim == 0:
      return jnp.copy(array)
    return array

  return part._replace(inner_state=jax.tree_util.tree_map_with_path(array_at, part.inner_state))


def _zeros(part: Any) -> Any:
  """Returns the state of a part as it is before the first step."""

  def zeros(to):
    return jnp.zeros(to.shape, to.dtype, device=to.sharding)

  return part._replace(inner_state=jax.tree.map(zeros, part.inner_state))


def _divided_note(first: First, begun: bool) -> str:
  continuation = "that of the rest begins anew when its training does"
  if begun:
    continuation = "both go on as they were"
  names = ", ".join(first.names)
  return f"the optimizer's state of {names} is kept apart from that of the rest now; {continuation}"


def _widened_notes(narrow: Params, wide: Params) -> list[str]:
  """Returns a line about the arrays that were saved in a narrower float, if there are any."""
  before = flatten(narrow)
  now = flatten(wide)
  widened = [name for name in before if before[name].dtype != now[name].dtype]
  if not widened:
    return []
  example = widened[0]
  return [
    f"{len(widened)} arrays, such as {example}, were saved in {before[example].dtype}, and go on in "
    f"{now[example].dtype} with the same values"
  ]


def _as_saved(saved: Table, item: str, tree: Any) -> Any:
  """Returns the abstract tree of one item of a checkpoint, in the dtypes that it was saved in."""

  def narrowed(path, leaf):
    return _narrow(leaf, saved.get(f"{item}/{path_name(path)}"))

  return jax.tree_util.tree_map_with_path(narrowed, tree)


def _narrow(leaf: jax.ShapeDtypeStruct, row: Mapping[str, Any] | None) -> jax.ShapeDtypeStruct:
  """Returns the abstract array in the narrower float that it was saved in; unchanged if it was not."""
  if row is None or row["dtype"] == str(leaf.dtype) or not jnp.issubdtype(leaf.dtype, jnp.floating):
    return leaf
  saved = jnp.dtype(row["dtype"])
  if not jnp.issubdtype(saved, jnp.floating) or jnp.promote_types(saved, leaf.dtype) != leaf.dtype:
    return leaf
  return jax.ShapeDtypeStruct(leaf.shape, saved, sharding=leaf.sharding)


def _wide(x: jax.Array, to: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns the array in today's dtype, which loses nothing; moments in the host's memory are cast on the device."""
  if x.dtype == to.dtype:
    return x
  on_device = jax.device_put(x, to.sharding.with_memory_kind("device"))
  return jax.device_put(on_device.astype(to.dtype), to.sharding)
