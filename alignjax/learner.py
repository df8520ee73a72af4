"""The optimizer step of a run as a program: its state, how that lies on the mesh, and the function that moves it on.

From abstract parameters alone: training fills the state with arrays, preflight compiles without any.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignjax import earlier, offload, sharding
from alignjax.algorithms import Algorithm
from alignjax.config import Config
from alignjax.errors import InputError
from alignjax.fingerprint import Table
from alignjax.model.decoder import Model
from alignjax.optim import make_optimizer, make_schedule
from alignjax.train_step import create_state, make_passes, make_train_step
from alignjax.types import Metrics, Params, TrainState

# Of what may change where a run goes on, what takes sums in another order, and moves later numbers by rounding alone.
REORDERING = ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "optimizer.microbatches", "optimizer.offload")


class Learner(NamedTuple):
  """What learns in a run.

  Attributes:
    params: abstract and placed, what is trained.
    state: abstract and placed, all that a step changes.
    shardings: of the state.
    create: (params, key) -> the state before the first step; compiled, the params are donated.
    step: (state, batch, hparams, held) -> (state, metrics); compiled, the state is donated.
    form: the arrays of a checkpoint -> how the state lies there.
  """

  params: Params
  state: TrainState
  shardings: TrainState
  create: Callable[[Params, jax.Array], TrainState]
  step: Callable[..., tuple[TrainState, Metrics]]
  form: Callable[[Table], earlier.Form]


def make_learner(config: Config, model: Model, algorithm: Algorithm, mesh: jax.sharding.Mesh) -> Learner:
  """The learner of a run on a mesh.

  Raises:
    InputError: a weight that the mesh does not divide, an unknown optimizer or schedule, or nothing to offload.
  """
  if config.optimizer.offload and config.model.module:
    raise InputError("optimizer.offload: a model of model.module need not stack its layers; leave it False")
  schedule = make_schedule(config.optimizer, config.run.steps)
  params, _ = model.split(model.abstract(mesh))
  layout = jax.tree.map(lambda x: x.sharding, params)
  moments = offload.moment_shardings(layout) if config.optimizer.offload else layout

  def created(tx):
    create = lambda params, key: create_state(params, tx, key, algorithm.running, algorithm.synced)
    state = jax.eval_shape(create, params, jax.eval_shape(lambda: jax.random.key(0)))
    shardings = sharding.state_shardings(state, tx, layout, mesh, moments)
    return create, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

  tx = make_optimizer(config.optimizer, algorithm.first.names if algorithm.first else ())
  create, state = created(tx)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  undivided = created(make_optimizer(config.optimizer))[1].opt_state if algorithm.first else None
  once = make_train_step(algorithm.loss, tx, schedule, config.optimizer.microbatches, algorithm.synced, algorithm.first)
  return Learner(
    params,
    state,
    shardings,
    jax.jit(create, out_shardings=shardings, donate_argnums=0),
    jax.jit(make_passes(once, algorithm.passes, algorithm.counts), donate_argnums=0, out_shardings=(shardings, None)),
    functools.partial(earlier.form, state=state, algorithm=algorithm, undivided=undivided),
  )


def continued(old: Mapping[str, Mapping[str, Any]], config: Config, step: int) -> Iterator[str]:
  """What people should know where a run goes on after `step` with another config than its checkpoint's, `old`."""
  new = config.to_dict()
  value = lambda sections, key: sections.get(key.split(".")[0], {}).get(key.split(".")[1])
  changed = [key for key in REORDERING if old and value(old, key) != value(new, key)]
  if changed:
    said = ", ".join(f"{key} {value(old, key)} -> {value(new, key)}" for key in changed)
    yield f"goes on from step {step} with {said}: sums are taken in another order, so later numbers differ by rounding"
  before, now = value(old, "run.steps"), config.run.steps
  c = config.optimizer
  if not before or before == now or step >= now or c.schedule == "constant" or c.final_scale == 1:
    return
  rate = lambda steps, number: c.learning_rate * float(make_schedule(c, steps)(jnp.float32(number - 1)))
  last = f"{rate(before, step):.3g} at step {step}"
  would = f", where it would have been {rate(before, step + 1):.3g}" if step < before else ""
  yield (
    f"run.steps {before} -> {now}: the {c.schedule} schedule now ends at step {now}; the learning rate was {last} and "
    f"is {rate(now, step + 1):.3g} at step {step + 1}{would}"
  )
