"""The optimizer from its config. The learning rate is not in here: it is a traced hyper-parameter of the step."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from alignjax import offload, ranges
from alignjax.errors import InputError
from alignjax.ranges import Count, NonNegative, Positive, Share, ShareBelowOne, Whole
from alignjax.types import Params


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Which optimizer, how its learning rate runs, how the batch is split."""

  name: str = "adamw"  # adamw, adafactor, lion, sgd
  learning_rate: NonNegative = 1e-4  # the peak; traced
  schedule: str = "cosine"  # "cosine" or "linear" down to final_scale, or "constant"
  warmup_steps: Whole = 0  # linear, over so many steps
  final_scale: Share = 0.0  # share of the peak where the decay ends, just after the last step
  b1: ShareBelowOne = 0.9  # decay of the first moment
  b2: ShareBelowOne = 0.999  # decay of the second moment
  eps: Positive = 1e-8  # beside the root of the second moment
  weight_decay: NonNegative = 0.0  # decoupled; spares the norms
  clip_norm: Annotated[NonNegative, "0 does not clip"] = 1.0  # of the whole gradient
  microbatches: Count = 1  # the rows of a step are taken in so many parts; the result does not depend on it
  offload: bool = False  # moments of the layers' matrices in the host's memory, a layer's at a time on the device

  def __post_init__(self):
    ranges.check_record("optimizer", self)

  @property
  def keeps_moments(self) -> bool:
    """Whether its state is as large as the weights; adafactor's are sums over rows and columns."""
    return self.name in ("adamw", "lion") or (self.name == "sgd" and self.b1 != 0)


def make_optimizer(c: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
  """Clipping, moments and weight decay; `make_train_step` multiplies by -learning_rate * schedule.

  Its update takes `finite` (bool []): where that is False, the state stays.

  Raises:
    InputError: an unknown name, or nothing to offload.
  """
  moments = {
    "adamw": lambda: scale_by_adam(c.b1, c.b2, c.eps),
    "adafactor": lambda: optax.scale_by_factored_rms(),
    "lion": lambda: optax.scale_by_lion(c.b1, c.b2),
    "sgd": lambda: optax.trace(c.b1) if c.b1 else optax.identity(),
  }
  if c.name not in moments:
    raise InputError(f"optimizer.name={c.name!r}: use one of {', '.join(moments)}")
  if c.offload and not c.keeps_moments:
    raise InputError(f"optimizer.offload: {c.name} keeps no moments as large as the weights; leave it False")
  held = only_if_finite(moments[c.name]())
  clip = optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
  decay = optax.add_decayed_weights(c.weight_decay, decayed) if c.weight_decay else optax.identity()
  return optax.chain(clip, offload.streamed(held) if c.offload else held, decay)


def only_if_finite(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`tx`, whose state stays where an argument `finite` (bool []) of its update is False."""

  def update(grads, state, params=None, *, finite=True):
    updates, new = tx.update(grads, state, params)
    return updates, jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """`optax.scale_by_adam` with the same state, and bias corrections that are exact in float32.

  There 1 - b2^n loses up to 1e-5 of itself in the first steps: twenty steps then end visibly beside those in float64.

  Source: Kingma and Ba 2014, algorithm 1 (arXiv:1412.6980)
  """
  correction = lambda decay, count: -jnp.expm1(count * math.log(decay)) if decay else 1.0

  def update(grads, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.cast_like(optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2), state.nu)
    mean, square = correction(b1, count), correction(b2, count)
    updates = jax.tree.map(lambda m, v: m / mean / (jnp.sqrt(v / square) + eps), mu, nu)
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def decayed(params: Params) -> Params:
  """True for the weights that decay: all but biases and what belongs to a norm."""
  name = lambda path: jax.tree_util.keystr(path[-2:], simple=True, separator="/").lower()
  return jax.tree_util.tree_map_with_path(lambda path, _: not re.search("norm|bias", name(path)), params)


def make_schedule(c: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
  """step -> the share of the peak learning rate that step takes, float32 [].

  Raises:
    InputError: an unknown schedule, or a warm-up that leaves no step.
  """
  if c.schedule not in ("cosine", "linear", "constant"):
    raise InputError(f"optimizer.schedule={c.schedule!r}: use one of cosine, linear, constant")
  if not 0 <= c.warmup_steps < max(steps, 1):
    raise InputError(f"optimizer.warmup_steps={c.warmup_steps} must be at least 0 and less than run.steps={steps}")

  def schedule(step: jax.Array) -> jax.Array:
    warmup = jnp.minimum(1.0, (step + 1) / (c.warmup_steps + 1))
    progress = jnp.clip((step - c.warmup_steps) / max(steps - c.warmup_steps, 1), 0.0, 1.0)
    down = {
      "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
      "linear": 1 - progress,
      "constant": jnp.ones_like(progress),
    }[c.schedule]
    return warmup * (c.final_scale + (1 - c.final_scale) * down)

  return schedule
