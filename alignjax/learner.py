"""The optimizer step of a run as a program: its state, how that lies on the mesh, and the function that moves it on.

From abstract parameters alone: training fills the state with arrays, preflight compiles without any.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from alignjax import offload, sharding
from alignjax.algorithms import Algorithm
from alignjax.config import Config
from alignjax.errors import InputError
from alignjax.model.decoder import Model
from alignjax.optim import make_optimizer, make_schedule
from alignjax.train_step import create_state, make_passes, make_train_step
from alignjax.types import Metrics, Params, TrainState


class Learner(NamedTuple):
  """What learns in a run.

  Attributes:
    params: abstract and placed, what is trained.
    state: abstract and placed, all that a step changes.
    shardings: of the state.
    create: (params, key) -> the state before the first step; compiled, the params are donated.
    step: (state, batch, hparams, held) -> (state, metrics); compiled, the state is donated.
  """

  params: Params
  state: TrainState
  shardings: TrainState
  create: Callable[[Params, jax.Array], TrainState]
  step: Callable[..., tuple[TrainState, Metrics]]


def make_learner(config: Config, model: Model, algorithm: Algorithm, mesh: jax.sharding.Mesh) -> Learner:
  """The learner of a run on a mesh.

  Raises:
    InputError: a weight that the mesh does not divide, an unknown optimizer or schedule, or nothing to offload.
  """
  if config.optimizer.offload and config.model.module:
    raise InputError("optimizer.offload: a model of model.module need not stack its layers; leave it False")
  tx = make_optimizer(config.optimizer, algorithm.first.names if algorithm.first else ())
  schedule = make_schedule(config.optimizer, config.run.steps)
  params, _ = model.split(model.abstract(mesh))
  create = lambda params, key: create_state(params, tx, key, algorithm.running, algorithm.synced)
  state = jax.eval_shape(create, params, jax.eval_shape(lambda: jax.random.key(0)))
  layout = jax.tree.map(lambda x: x.sharding, params)
  moments = offload.moment_shardings(layout) if config.optimizer.offload else layout
  shardings = sharding.state_shardings(state, tx, layout, mesh, moments)
  once = make_train_step(algorithm.loss, tx, schedule, config.optimizer.microbatches, algorithm.synced, algorithm.first)
  return Learner(
    params,
    jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings),
    shardings,
    jax.jit(create, out_shardings=shardings, donate_argnums=0),
    jax.jit(make_passes(once, algorithm.passes, algorithm.counts), donate_argnums=0, out_shardings=(shardings, None)),
  )
