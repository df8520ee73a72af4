"""The one optimizer step, whatever the algorithm."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from alignjax.algorithms.algorithm import First, Passes, Sync
from alignjax.system import sharding
from alignjax.system.microbatch import sum_over_microbatches
from alignjax.training.optim import widened
from alignjax.training.rounding import stored
from alignjax.types import Batch, HParams, Metrics, Params, Scalars, TrainState

ROUNDING_NOISE = 0x526F756E  # folded into the run's key: the noise of rounding is no other noise of the step

LossFn = Callable[[Params, Batch, HParams], tuple[jax.Array, Metrics]]


def create_state(
  params: Params,
  tx: optax.GradientTransformation,
  key: jax.Array,
  running: Mapping[str, ArrayLike] | None = None,
  synced: Mapping[str, Sync] | None = None,
) -> TrainState:
  """Creates the state before the first step.

  Args:
    params: to train; the state holds them, not a copy.
    tx: its `init` makes the optimizer's state.
    key: the run's key.
    running: the first values of the running statistics by name; None: there are none.
    synced: the names of the trees that follow the params; each begins as a copy of them. None: there are none.
  """

  def zero():
    return jnp.zeros((), jnp.int32)

  return TrainState(
    step=zero(),
    params=params,
    opt_state=tx.init(params),
    key=key,
    skipped=zero(),
    skipped_in_a_row=zero(),
    running={name: jnp.float32(value) for name, value in (running or {}).items()},
    synced={name: jax.tree.map(jnp.copy, params) for name in synced or {}},
  )


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  schedule: Callable[[jax.Array], jax.Array],
  microbatches: int = 1,
  synced: Mapping[str, Sync] | None = None,
  first: First | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns train_step(state, batch, hparams, held=None) -> (state, metrics), to be jitted with the state donated.

  The loss sees `held` beside the params, as entries of the same dict: what it reads and no step changes, such as the
  base under LoRA factors. There is no gradient for it, and it is never donated.

  Loss and metrics must be sums over rows divided by counts that the batch carries for the whole step (its totals):
  then the parts of a microbatched step add up to the step, exactly but for the rounding of sums. A step whose loss or
  gradient is not finite changes nothing but the counters. The running statistics become those of the batch.

  Weights in bfloat16 are rounded stochastically (`stored`): to the nearest, updates below 1/256 of a weight are lost.

  Args:
    loss_fn: (params, batch, hparams) -> (scalar, metrics).
    tx: of `make_optimizer`, with the names of `first`.
    schedule: step -> factor of hparams["learning_rate"].
    microbatches: the rows are taken in so many parts, one after the other, to save memory.
    synced: how each tree of `state.synced` follows the params.
    first: which params are trained before the others, if any.
  """

  def train_step(state, batch, hparams, held=None):
    def whole(params):
      return {**held, **params} if held else params

    value_and_grad = jax.value_and_grad(lambda p, b: loss_fn(whole(p), b, hparams), has_aux=True)

    def parts(part):
      found, grads = value_and_grad(state.params, part)
      return found, widened(grads)  # so that many parts add up

    (loss, metrics), grads = sum_over_microbatches(parts, batch, microbatches)
    trained = {}
    if first:
      trained["rest"] = first.over(batch.running)
      # Before the norm: what is clipped is what is trained.
      grads = {
        n: g if n in first.names else where(trained["rest"], g, optax.tree.zeros_like(g)) for n, g in grads.items()
      }

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    old = widened(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, old, finite=finite, **trained)
    rate = hparams["learning_rate"] * schedule(state.step)
    noise, noise_of_synced = jax.random.split(
      jax.random.fold_in(jax.random.fold_in(state.key, ROUNDING_NOISE), state.step)
    )
    params = stored(jax.tree.map(lambda p, u: p - rate * u, old, updates), state.params, noise)

    def keep(new, old):
      return where(finite, new, old)

    if first:

      def moved(name):
        return finite if name in first.names else finite & trained["rest"]

      params = {name: where(moved(name), new, state.params[name]) for name, new in params.items()}
    else:
      params = keep(params, state.params)
    skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
    state = TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      key=state.key,
      skipped=state.skipped + skipped,
      skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
      running=keep(batch.running, state.running),
      synced={
        name: follow(tree, params, synced[name], state.step + 1, noise_of_synced) for name, tree in state.synced.items()
      },
    )
    metrics |= {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate}
    metrics |= {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
    return state, metrics

  return train_step


def make_passes(
  train_step: Callable[..., tuple[TrainState, Metrics]],
  passes: Passes,
  counts: Callable[[Any], Scalars],
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Takes `train_step` `passes.epochs` times over the rows of a batch, in parts, as one scan: the same signature.

  All of it is one step of the run: the schedule and the data position move on by one. The order of the rows belongs to
  the run's key and its step. Metrics are means over the optimizer steps that were taken; `passes/steps` counts these.
  With one epoch and one part, it is `train_step` itself, and there is no `passes/steps`.

  Args:
    train_step: of `make_train_step`.
    passes: how often, and in how many parts.
    counts: what the loss of some rows divides by.
  """

  def update(state, batch, hparams, held=None):
    step, key = state.step, state.key

    def part(order):
      return lambda x: sharding.constrain(x[order], "batch", *(None,) * (x.ndim - 1))

    def one(carry, taken):
      (state, stopped), (number, order) = carry, taken
      rows = jax.tree.map(part(order), batch.rows)
      picked = batch.replace(rows=rows).updated(totals=counts(rows))

      def learn(state):
        own = jax.random.fold_in(key, number)  # each rounds in its own way
        state, metrics = train_step(state.replace(step=step, key=own), picked, hparams, held)
        return state.replace(key=key), metrics

      def rest(state):
        return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(learn, state)[1])

      state, metrics = jax.lax.cond(stopped, rest, learn, state)
      taken = ~stopped
      if passes.stop:
        metric, limit = passes.stop
        stopped |= (hparams[limit] > 0) & (metrics[metric] > hparams[limit])
      return (state, stopped), (metrics, taken)

    if passes.epochs * passes.minibatches == 1:
      return train_step(state, batch.updated(totals=counts(batch.rows)), hparams, held)
    orders = row_orders(jax.random.fold_in(state.key, step), passes, batch.size)
    (state, _), (metrics_of_steps, taken) = jax.lax.scan(
      one, (state, jnp.zeros((), bool)), (jnp.arange(len(orders)), orders)
    )

    def mean(x):
      return jnp.sum(jnp.where(taken, x.astype(jnp.float32), 0)) / taken.sum()

    metrics = {name: x[0] if name in passes.first else jax.tree.map(mean, x) for name, x in metrics_of_steps.items()}
    metrics |= {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row, "passes/steps": taken.sum()}
    return state.replace(step=step + 1), metrics

  return update


def row_orders(key: jax.Array, passes: Passes, rows: int) -> jax.Array:
  """Draws the rows of each optimizer step, int32 [epochs * minibatches, rows / minibatches]; each row once an epoch.

  Args:
    key: of the step; every epoch has an order of its own.
    passes: their epochs and minibatches.
    rows: a multiple of the minibatches.
  """
  orders = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), rows))(
    jnp.arange(passes.epochs)
  )
  return orders.reshape(passes.epochs * passes.minibatches, -1)


def follow(tree: Params, params: Params, sync: Sync, step: jax.Array, noise: jax.Array | None = None) -> Params:
  """Returns `tree` after `step`: sync.mix * params + (1 - sync.mix) * tree at multiples of `sync.every`, else itself.

  Args:
    tree: as before the step.
    params: as after it.
    sync: how often the tree moves, and how far.
    step: int32 [], counted from 1.
    noise: the key by which weights in bfloat16 are rounded (`stored`); others need none.
  """

  def mixed(old, new):
    return sync.mix * new + (1 - sync.mix) * old

  def move():
    return stored(jax.tree.map(mixed, widened(tree), widened(params)), tree, noise)

  return jax.lax.cond(step % sync.every == 0, move, lambda: tree)


def where(condition: jax.Array, new: Params, old: Params) -> Params:
  """Returns `new` if the scalar condition holds, else `old`, for every array of two like trees."""
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
