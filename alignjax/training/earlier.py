"""A state that an earlier version saved, read as one of today's.

It is asked for in the form in which it lies there, and then brought on: what was trained stays bit for bit, what is new
gets the value that it would have had, or else its first one, and a line says so.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignjax.algorithms import Algorithm
from alignjax.system.fingerprint import Table, flatten, path_name
from alignjax.training.optim import Parts
from alignjax.types import HParams, TrainState


class Form(NamedTuple):
  """How a state lies in a checkpoint.

  Attributes:
    state: abstract and placed: what to ask for.
    upgrade: what was read -> today's state, and a line about each thing that is not as it was saved.
  """

  state: TrainState
  upgrade: Callable[[TrainState], tuple[TrainState, tuple[str, ...]]] = lambda state: (state, ())


def form(saved: Table, *, state: TrainState, algorithm: Algorithm, undivided: optax.OptState | None = None) -> Form:
  """The form in which a state lies in a checkpoint with these arrays.

  It may differ from today's in three things: a running statistic is not there; the optimizer's state of what is trained
  first is not apart from the rest; what goes with bfloat16 parameters is in bfloat16 itself.

  Args:
    saved: the arrays of the checkpoint.
    state: today's, abstract and placed.
    algorithm: of the run.
    undivided: the optimizer's state without a part that is trained first, likewise; None where there is none.
  """
  running = {name: leaf for name, leaf in state.running.items() if f"running/{name}" in saved}
  names = {name for name in saved if name.startswith("opt_state/")}
  whole = undivided is not None and names == flatten({"opt_state": undivided}).keys()
  as_saved = lambda name, tree: jax.tree_util.tree_map_with_path(
    lambda path, leaf: _narrow(leaf, saved.get(f"{name}/{path_name(path)}")), tree
  )
  asked = dataclasses.replace(
    state,
    running=running,
    params=as_saved("params", state.params),
    opt_state=as_saved("opt_state", undivided if whole else state.opt_state),
  )

  def upgrade(found: TrainState) -> tuple[TrainState, tuple[str, ...]]:
    running, notes = fill(found.running, state.running, algorithm)
    opt_state = found.opt_state
    if whole:
      begun = bool(algorithm.first.over(running))
      opt_state = divide(opt_state, state.opt_state, begun)
      goes_on = "both go on as they were" if begun else "that of the rest begins anew when its training does"
      names = ", ".join(algorithm.first.names)
      notes.append(f"the optimizer's state of {names} is kept apart from that of the rest now; {goes_on}")
    trees = {"params": found.params, "opt_state": opt_state}
    wide = jax.tree.map(_wide, trees, {name: getattr(state, name) for name in trees})
    before, now = flatten(trees), flatten(wide)
    if narrow := [name for name in before if before[name].dtype != now[name].dtype]:
      notes.append(
        f"{len(narrow)} arrays, such as {narrow[0]}, were saved in {before[narrow[0]].dtype}, and go on in "
        f"{now[narrow[0]].dtype} with the same values"
      )
    return dataclasses.replace(found, running=running, **wide), tuple(notes)

  return Form(asked, upgrade)


def fill(running: HParams, wanted: HParams, algorithm: Algorithm) -> tuple[HParams, list[str]]:
  """Running statistics with those that the checkpoint lacks, and a line about each.

  Args:
    running: as they were read.
    wanted: abstract and placed.
    algorithm: whose they are.
  """
  filled, notes = dict(running), []
  for name, to in wanted.items():
    if name in running:
      continue
    origin = algorithm.since.get(name)
    if origin in running:
      filled[name] = jnp.copy(running[origin])  # the state is donated: no buffer twice
    else:
      filled[name] = jnp.full(to.shape, algorithm.running[name], to.dtype, device=to.sharding)
    value = f"what {origin} has" if origin in running else f"{algorithm.running[name]:g}"
    notes.append(f"the checkpoint lacks the running statistic {name}, which is new: it begins with {value}")
  return {name: filled[name] for name in wanted}, notes


def divide(state: optax.OptState, wanted: optax.OptState, begun: bool) -> optax.OptState:
  """An optimizer's state whose `Parts` are taken from one of the whole.

  What the rest has is kept where its training had `begun`; before, its moments were of gradients that are not its own
  or of none, and its count ran ahead of them, so it starts as every optimizer does, with zeros.

  Args:
    state: of the whole.
    wanted: abstract and placed.
    begun: whether the rest has been trained.
  """

  def taken(part: Any, source: Mapping[str, jax.Array], kept: bool) -> Any:
    fresh = lambda to: jnp.zeros(to.shape, to.dtype, device=to.sharding)
    # The count is in both parts, and the state is donated: no buffer twice.
    own = lambda x: x if x.ndim else jnp.copy(x)
    found = lambda path, to: own(source[path_name(path)]) if kept else fresh(to)
    return part._replace(inner_state=jax.tree_util.tree_map_with_path(found, part.inner_state))

  def divided(own: Any, to: Any) -> Any:
    if not isinstance(to, Parts):
      return own
    source = flatten(own)
    return Parts(taken(to.first, source, True), taken(to.rest, source, begun))

  return tuple(divided(own, to) for own, to in zip(state, wanted, strict=True))


def _narrow(leaf: jax.ShapeDtypeStruct, row: Mapping[str, Any] | None) -> jax.ShapeDtypeStruct:
  """The abstract array in the narrower float that it was saved in, if it was."""
  if row is None or row["dtype"] == str(leaf.dtype) or not jnp.issubdtype(leaf.dtype, jnp.floating):
    return leaf
  saved = jnp.dtype(row["dtype"])
  if not jnp.issubdtype(saved, jnp.floating) or jnp.promote_types(saved, leaf.dtype) != leaf.dtype:
    return leaf
  return jax.ShapeDtypeStruct(leaf.shape, saved, sharding=leaf.sharding)


def _wide(x: jax.Array, to: jax.ShapeDtypeStruct) -> jax.Array:
  """The array in today's dtype, which loses nothing; moments in the host's memory come to the device for that."""
  if x.dtype == to.dtype:
    return x
  on_device = jax.device_put(x, to.sharding.with_memory_kind("device"))
  return jax.device_put(on_device.astype(to.dtype), to.sharding)
