"""The optimizer from its config. The learning rate is not in here: it is a traced hyper-parameter of the step.

Weights in bfloat16 keep float32 moments: a second moment with b2=0.999 moves by less than bfloat16 can tell apart.
"""

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignjax.errors import InputError
from alignjax.system import ranges
from alignjax.system.ranges import Count, NonNegative, Range, Share, Whole
from alignjax.training import offload
from alignjax.types import Params

OWN = -1.0  # of b1, b2 and eps: the optimizer's own, as in its paper and in optax
DEFAULTS = {
  "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
  "adafactor": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},  # it reads none of them
  "lion": {"b1": 0.9, "b2": 0.99, "eps": 1e-8},
  "sgd": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
}
OWN_SAID = "-1 takes the optimizer's own"
Decay = Annotated[float, Range(0, 1, open_high=True, also=(OWN,)), OWN_SAID]
Small = Annotated[float, Range(0, open_low=True, also=(OWN,)), OWN_SAID]
LARGEST_RMS = 1.0  # of adafactor's update of one array


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer, its learning rate over the steps, and the parts that the batch is split into."""

  name: str = "adamw"  # adamw, adafactor, lion, sgd
  learning_rate: NonNegative = 1e-4  # the peak; traced
  schedule: str = "cosine"  # "cosine" or "linear" down to final_scale, or "constant"
  warmup_steps: Whole = 0  # linear, over so many steps
  final_scale: Share = 0.0  # share of the peak where the decay ends, just after the last step
  b1: Decay = OWN  # decay of the first moment: 0.9; of sgd, the momentum
  b2: Decay = OWN  # decay of the second moment: 0.999; of lion, that of its one moment: 0.99
  eps: Small = OWN  # beside the root of the second moment: 1e-8
  weight_decay: NonNegative = 0.0  # decoupled; spares the norms
  clip_norm: Annotated[NonNegative, "0 does not clip"] = 1.0  # of the whole gradient
  microbatches: Count = 1  # the rows of a step are taken in so many parts; the result does not depend on it
  offload: bool = False  # moments of the layers' matrices in the host's memory, a layer's at a time on the device

  def __post_init__(self):
    ranges.check_record("optimizer", self)
    # A record has the numbers themselves: what a run stores stays what it was trained with.
    for key, value in DEFAULTS.get(self.name, DEFAULTS["adamw"]).items():
      if getattr(self, key) == OWN:
        object.__setattr__(self, key, value)

  @property
  def keeps_moments(self) -> bool:
    """True if its state is as large as the weights, or larger; adafactor's are sums over rows and columns."""
    return self.name in ("adamw", "lion") or (self.name == "sgd" and self.b1 != 0)


def make_optimizer(c: OptimizerConfig, first: Sequence[str] = ()) -> optax.GradientTransformationExtraArgs:
  """Chains clipping, moments and weight decay; `make_train_step` multiplies by -learning_rate * schedule.

  Its update takes `finite` (bool []): if it is False, the state stays. If some parameters are trained before the
  others, it also takes `rest` (bool []): if that is False, the state of the others stays.

  adafactor is optax's without the scale of the parameters: the rate is the size of a step, as for the others. Weight
  decay is multiplied by the rate for every optimizer, as in AdamW.

  Args:
    c: the config; its learning_rate, schedule and microbatches are not read here.
    first: top-level names of the parameters that are trained alone at first: their state has a count of its own.

  Raises:
    InputError: an unknown name, or nothing to offload.
  """
  if c.name not in DEFAULTS:
    raise InputError(f"optimizer.name={c.name!r}: use one of {', '.join(DEFAULTS)}")
  if c.offload and not c.keeps_moments:
    raise InputError(f"optimizer.offload: {c.name} keeps no moments as large as the weights; leave it False")
  scale = only_if_finite(_scale(c))
  if c.offload:
    scale = offload.streamed(scale)
  if first:
    scale = in_parts(scale, first)
  clip = optax.identity()
  if c.clip_norm:
    clip = optax.clip_by_global_norm(c.clip_norm)
  decay = optax.identity()
  if c.weight_decay:
    decay = optax.add_decayed_weights(c.weight_decay, decayed)
  return in_float32(optax.chain(clip, scale, decay))


def _scale(c: OptimizerConfig) -> optax.GradientTransformation:
  """Returns the transformation that keeps the moments of the optimizer `c.name`, one of `DEFAULTS`."""
  match c.name:
    case "adamw":
      return scale_by_adam(c.b1, c.b2, c.eps)
    case "adafactor":
      return scale_by_adafactor()
    case "lion":
      return optax.scale_by_lion(c.b1, c.b2)
  return optax.trace(c.b1) if c.b1 else optax.identity()  # sgd


def widened(tree: Params | None) -> Params | None:
  """Casts the arrays of a tree to float32, wider ones excepted; None stays None."""
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def in_float32(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
  """Wraps `tx` to keep its state and arithmetic in float32 or wider, whatever the dtype of the parameters."""

  def update(grads, state, params=None, **extra):
    return tx.update(widened(grads), state, widened(params), **extra)

  return optax.GradientTransformationExtraArgs(lambda params: tx.init(widened(params)), update)


class Parts(NamedTuple):
  """The optimizer's states of parameters that are trained first and alone, and of the others."""

  first: optax.OptState
  rest: optax.OptState


def in_parts(tx: optax.GradientTransformationExtraArgs, first: Sequence[str]) -> optax.GradientTransformationExtraArgs:
  """Applies `tx` to the parameters named `first`, and separately to the others: each has a count of updates of its own.

  The state of the others stays if the argument `rest` (bool []) of the update is False.

  Args:
    tx: its update takes `finite`, as that of `only_if_finite` does.
    first: top-level names.
  """

  def is_first(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key in first, tree)

  own = optax.masked(tx, is_first)
  others = optax.masked(tx, lambda tree: jax.tree.map(operator.not_, is_first(tree)))

  def update(grads, state, params=None, *, finite=True, rest=True):
    grads, changed = own.update(grads, state.first, params, finite=finite)
    grads, unchanged = others.update(grads, state.rest, params, finite=finite & rest)
    return grads, Parts(changed, unchanged)

  return optax.GradientTransformationExtraArgs(lambda params: Parts(own.init(params), others.init(params)), update)


def only_if_finite(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Wraps `tx` so that its state stays if the argument `finite` (bool []) of its update is False."""

  def update(grads, state, params=None, *, finite=True):
    updates, new = tx.update(grads, state, params)
    return updates, jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """Scales gradients as `optax.scale_by_adam`, with the same state, and bias corrections that are accurate in float32.

  In float32, 1 - b2^n has a relative error of up to 1e-5 in the first steps: after twenty steps the weights visibly
  differ from those of float64.

  Source: Kingma and Ba 2014, algorithm 1 (arXiv:1412.6980)
  """

  def correction(decay, count):
    """1 - decay^count."""
    if not decay:
      return 1.0
    return -jnp.expm1(count * math.log(decay))

  def update(grads, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.cast_like(optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2), state.nu)
    mu_correction = correction(b1, count)
    nu_correction = correction(b2, count)
    updates = jax.tree.map(lambda m, v: m / mu_correction / (jnp.sqrt(v / nu_correction) + eps), mu, nu)
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def scale_by_adafactor() -> optax.GradientTransformation:
  """Scales gradients as `optax.scale_by_factored_rms`, with its state, and clips each array's update to an RMS of 1.

  Source: Shazeer and Stern 2018, algorithm 4 (arXiv:1804.04235)
  """
  factored = optax.scale_by_factored_rms()
  clip = optax.clip_by_block_rms(LARGEST_RMS)

  def update(grads, state, params=None):
    updates, state = factored.update(grads, state, params)
    return clip.update(updates, optax.EmptyState())[0], state

  return optax.GradientTransformation(factored.init, update)


def decayed(params: Params) -> Params:
  """Marks the weights that decay: True for all but biases and the weights of norms."""

  def decays(path, _) -> bool:
    name = jax.tree_util.keystr(path[-2:], simple=True, separator="/").lower()
    return not re.search("norm|bias", name)

  return jax.tree_util.tree_map_with_path(decays, params)


def make_schedule(c: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
  """Returns step -> the share of the peak learning rate that the step takes, float32 []; the first step is 0.

  Args:
    c: its schedule, warmup_steps and final_scale are read.
    steps: the run's length; the decay ends just after its last step.

  Raises:
    InputError: an unknown schedule, or a warm-up that leaves no step.
  """
  if c.schedule not in ("cosine", "linear", "constant"):
    raise InputError(f"optimizer.schedule={c.schedule!r}: use one of cosine, linear, constant")
  if not 0 <= c.warmup_steps < max(steps, 1):
    raise InputError(
      f"optimizer.warmup_steps={c.warmup_steps} must be at least 0 and less than run.steps={steps}; lower it, or raise "
      "run.steps"
    )

  def schedule(step: jax.Array) -> jax.Array:
    warmup = jnp.minimum(1.0, (step + 1) / (c.warmup_steps + 1))
    progress = jnp.clip((step - c.warmup_steps) / max(steps - c.warmup_steps, 1), 0.0, 1.0)
    remaining = {
      "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
      "linear": 1 - progress,
      "constant": jnp.ones_like(progress),
    }[c.schedule]
    return warmup * (c.final_scale + (1 - c.final_scale) * remaining)

  return schedule
