"""The optimizer step of a run as a program: its state, how that lies on the mesh, and the function that moves it on.

From abstract parameters alone: training fills the state with arrays, preflight compiles without any.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

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
  step: jax.stages.Wrapped
  form: Callable[[Table], earlier.Form]


KEPT = 8  # learners, and algorithms, that a process keeps for the next equal run


@functools.lru_cache(maxsize=KEPT)
def make_learner(
  optimizer: OptimizerConfig, steps: int, model: Model, algorithm: Algorithm, mesh: jax.sharding.Mesh
) -> Learner:
  """The learner of a run of so many steps on a mesh; the same for equal arguments, so its step is traced once.

  Raises:
    InputError: a weight that the mesh does not divide, an unknown optimizer or schedule, or nothing to offload.
  """
  schedule = make_schedule(optimizer, steps)
  params, _ = model.split(model.abstract(mesh))
  layout = jax.tree.map(lambda x: x.sharding, params)
  moments = offload.moment_shardings(layout) if optimizer.offload else layout

  def created(tx):
    create = lambda params, key: create_state(params, tx, key, algorithm.running, algorithm.synced)
    state = jax.eval_shape(create, params, jax.eval_shape(lambda: jax.random.key(0)))
    shardings = sharding.state_shardings(state, tx, layout, mesh, moments)
    return create, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

  tx = make_optimizer(optimizer, algorithm.first.names if algorithm.first else ())
  create, state = created(tx)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  undivided = created(make_optimizer(optimizer))[1].opt_state if algorithm.first else None
  once = make_train_step(algorithm.loss, tx, schedule, optimizer.microbatches, algorithm.synced, algorithm.first)
  return Learner(
    params,
    state,
    shardings,
    jax.jit(create, out_shardings=shardings, donate_argnums=0),
    jax.jit(make_passes(once, algorithm.passes, algorithm.counts), donate_argnums=0, out_shardings=(shardings, None)),
    functools.partial(earlier.form, state=state, algorithm=algorithm, undivided=undivided),
  )
