"""A run of a few steps on random data, wired as `train` wires it; what is compiled is shared by all tests."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from alignjax.algorithms import ALGORITHMS, Algorithm
from alignjax.model import Model, ModelConfig, decoder, lora
from alignjax.system import sharding
from alignjax.training import offload
from alignjax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from alignjax.training.step import create_state, make_train_step
from alignjax.types import TrainState
from tests import made

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
STEPS = 10


class Training(NamedTuple):
  """Everything that a step needs. Call its functions inside `jax.set_mesh(mesh)`.

  Attributes:
    fresh: () -> the state before the first step, to be donated.
    prepare: (frozen, batch, key) -> batch, jitted.
    step: (state, batch, hparams, held) -> (state, metrics), jitted, donates the state.
    hparams: the defaults of the algorithm, and the learning rate.
    held: () -> the base under LoRA factors, or {}.
  """

  mesh: Mesh
  model: Model
  algorithm: Algorithm
  tx: optax.GradientTransformation
  shardings: TrainState
  fresh: Callable
  prepare: Callable
  step: Callable
  hparams: dict
  held: Callable

  def losses(self, batch: dict, steps: int) -> np.ndarray:

    with jax.set_mesh(self.mesh):
      state, held, batch = self.fresh(), self.held(), sharding.to_mesh(batch, self.mesh)
      frozen = {name: held or jax.tree.map(jnp.copy, state.params) for name in self.algorithm.constant}
      if self.algorithm.loss_reads:
        teacher = jax.jit(self.model.init, out_shardings=self.shardings.params)(jax.random.key(9))
        frozen |= {name: held or teacher for name in self.algorithm.constant if name in self.algorithm.loss_reads}
      losses = []
      for _ in range(steps):
        beside = frozen | state.synced
        trees = self.algorithm.trees(beside, held | state.params)
        prepared = self.prepare(trees, batch.updated(running=state.running), state.key)
        state, metrics = self.step(state, prepared, self.hparams, held | self.algorithm.for_loss(beside))
        losses.append(float(metrics["loss"]))
    return np.array(losses)


@functools.cache
def make(
  algorithm: str,
  config: ModelConfig,
  mesh: Mesh,
  optimizer: OptimizerConfig = OPTIMIZER,
  microbatches: int = 1,
  loss: str = "",
  factors: lora.LoraConfig | None = None,
  **options,
) -> Training:
  """Wires a run; equal arguments share one, and with it what is compiled. The model gets the head that it needs."""
  module = ALGORITHMS[algorithm]
  with jax.set_mesh(mesh):
    model = decoder.make(dataclasses.replace(config, head=module.head))
    model = lora.adapt(model, factors) if factors else model
    recipe = made.make(module, model, loss, microbatches, **options)
    tx, schedule = make_optimizer(optimizer), make_schedule(optimizer, STEPS)
    split = lambda: model.split(model.init(jax.random.key(0)))
    create = lambda: create_state(split()[0], tx, jax.random.key(1), recipe.running, recipe.synced)
    params, held = model.split(jax.tree.map(lambda leaf: leaf.sharding, model.abstract(mesh)))
    moments = offload.moment_shardings(params) if optimizer.offload else params
    shardings = sharding.state_shardings(jax.eval_shape(create), tx, params, mesh, moments)
    step = make_train_step(recipe.loss, tx, schedule, microbatches, recipe.synced)
    hparams = made.hparams(module, loss, **options) | {"learning_rate": optimizer.learning_rate}
  return Training(
    mesh=mesh,
    model=model,
    algorithm=recipe,
    tx=tx,
    shardings=shardings,
    fresh=jax.jit(create, out_shardings=shardings),
    prepare=jax.jit(recipe.prepare),
    step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
    hparams={name: jnp.float32(value) for name, value in hparams.items()},
    held=jax.jit(lambda: split()[1], out_shardings=held),
  )


def data_kind(algorithm: str, loss: str = "") -> str:
  """The kind of batch that an algorithm takes."""
  return made.kind(ALGORITHMS[algorithm], loss)
