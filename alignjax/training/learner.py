"""The optimizer step of a run as a program: its state, the state's shardings, and the compiled step.

It is built from abstract parameters: training fills the state with arrays, preflight compiles without any.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from alignjax.algorithms import Algorithm
from alignjax.model.decoder import Model
from alignjax.system import sharding
from alignjax.system.fingerprint import Table
from alignjax.training import earlier, offload
from alignjax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from alignjax.training.step import create_state, make_passes, make_train_step
from alignjax.types import Params, TrainState


class Learner(NamedTuple):
  """The trained state of a run, and the compiled functions that create and update it.

  Attributes:
    params: the trained parameters, abstract and placed.
    state: all that a step changes, abstract and placed.
    shardings: of the state.
    create: (params, key) -> the state before the first step; where it is compiled, the params are donated.
    step: (state, batch, hparams, held) -> (state, metrics); where it is compiled, the state is donated.
    form: the arrays of a checkpoint -> how the state lies there.
  """

  params: Params
  state: TrainState
  shardings: TrainState
  create: Callable[[Params, jax.Array], TrainState]
  step: Any  # a function, or jax.stages.Wrapped where it is compiled
  form: Callable[[Table], earlier.Form]


KEPT = 8  # learners, and algorithms, that a process keeps for the next equal run


@functools.lru_cache(maxsize=KEPT)
def make_learner(
  optimizer: OptimizerConfig, steps: int, model: Model, algorithm: Algorithm, mesh: jax.sharding.Mesh
) -> Learner:
  """Returns the learner of a run, its functions compiled; cached, so that equal runs trace their step once.

  Arguments and errors are those of `make_functions`.
  """
  learner = make_functions(optimizer, steps, model, algorithm, mesh)
  return learner._replace(
    create=jax.jit(learner.create, out_shardings=learner.shardings, donate_argnums=0),
    step=jax.jit(learner.step, donate_argnums=0, out_shardings=(learner.shardings, None)),
  )


def make_functions(
  optimizer: OptimizerConfig, steps: int, model: Model, algorithm: Algorithm, mesh: jax.sharding.Mesh
) -> Learner:
  """Returns the learner of a run of `steps` steps on a mesh, its functions not yet compiled.

  Args:
    optimizer: its settings.
    steps: the run's length, by which the learning rate decays.
    model: its trained entries are the params.
    algorithm: gives the loss, the running statistics and the synced trees.
    mesh: of the params.

  Raises:
    InputError: a weight that the mesh does not divide, an unknown optimizer or schedule, or nothing to offload.
  """
  schedule = make_schedule(optimizer, steps)
  params, _ = model.split(model.abstract(mesh))
  layout = jax.tree.map(lambda x: x.sharding, params)
  moments = layout
  if optimizer.offload:
    moments = offload.moment_shardings(layout)

  def creation(tx):
    """Returns the function that creates the state with this optimizer, and the state, abstract and placed."""

    def create(params, key):
      return create_state(params, tx, key, algorithm.running, algorithm.synced)

    state = jax.eval_shape(create, params, jax.eval_shape(lambda: jax.random.key(0)))
    shardings = sharding.state_shardings(state, tx, layout, mesh, moments)
    return create, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

  first_names: tuple[str, ...] = ()
  undivided = None
  if algorithm.first:
    first_names = algorithm.first.names
    _, undivided_state = creation(make_optimizer(optimizer))
    undivided = undivided_state.opt_state
  tx = make_optimizer(optimizer, first_names)
  create, state = creation(tx)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  once = make_train_step(algorithm.loss, tx, schedule, optimizer.microbatches, algorithm.synced, algorithm.first)
  return Learner(
    params,
    state,
    shardings,
    create,
    make_passes(once, algorithm.passes, algorithm.counts),
    functools.partial(earlier.form, state=state, algorithm=algorithm, undivided=undivided),
  )
