"""Losses over single completions that are labelled desirable or undesirable: arrays in, per-example losses out.

A new loss is one function of `(labelled, *, beta: Positive = ..., ...)` and one `UnpairedObjective` in the table at the
foot. Its keywords, their ranges (`alignjax.system.ranges`) and defaults are the hyper-parameters that a config may set.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignjax.losses.aggregation import divisor
from alignjax.losses.objective import by_name
from alignjax.system.ranges import NonNegative, Positive


class Labelled(NamedTuple):
  """The arrays of one shape that losses over labelled completions read, and two constants of the optimizer step.

  Attributes:
    ratio: log-probability of the completion less the reference's, summed over tokens, in nats.
    desirable: 1.0, or 0.0 for an undesirable completion.
    kl: how far the policy is from the reference, in nats; see `clamped_kl`. Only `kto` reads it.
    mean_ratio: the running mean of the ratio; see `update_mean`. Only `bco` reads it.
  """

  ratio: jax.Array
  desirable: jax.Array
  kl: jax.Array | float = 0.0
  mean_ratio: jax.Array | float = 0.0


class UnpairedObjective(NamedTuple):
  """A loss over labelled completions, and all that an algorithm must know of it.

  Attributes:
    loss: (labelled, *, hyper-parameters) -> losses of the examples, in their shape.
    mismatched: whether it reads `Labelled.kl`, which needs prompts with another prompt's completion.
    running_mean: whether it reads `Labelled.mean_ratio`, a statistic over the steps.
  """

  loss: Callable[..., jax.Array]
  mismatched: bool = False
  running_mean: bool = False


def kto(
  labelled: Labelled,
  *,
  beta: Positive = 0.1,
  desirable_weight: NonNegative = 1.0,
  undesirable_weight: NonNegative = 1.0,
) -> jax.Array:
  """Computes w (1 - sigmoid(beta (r - z))) of desirable, w (1 - sigmoid(beta (z - r))) of undesirable completions.

  r is the ratio, w the weight of the completion's class, and z = labelled.kl, `clamped_kl`. Scope of z: all examples of
  the optimizer step, over microbatches and devices; TRL takes the mean over each device's microbatch, and mismatches
  completions within it.

  Source: Ethayarajh et al. 2024, eq. 8 (arXiv:2402.01306)
  """
  weight = class_weight(labelled, desirable_weight, undesirable_weight)
  return weight * jax.nn.sigmoid(-beta * towards(labelled, labelled.ratio - labelled.kl))


def apo_zero_unpaired(
  labelled: Labelled,
  *,
  beta: Positive = 0.1,
  desirable_weight: NonNegative = 1.0,
  undesirable_weight: NonNegative = 1.0,
) -> jax.Array:
  """Computes `kto` with z = 0: desirable completions up, undesirable down, whatever the policy does elsewhere.

  Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266), unpaired as in TRL
  """
  weight = class_weight(labelled, desirable_weight, undesirable_weight)
  return weight * jax.nn.sigmoid(-beta * towards(labelled, labelled.ratio))


def bco(
  labelled: Labelled,
  *,
  beta: Positive = 0.1,
  desirable_weight: NonNegative = 1.0,
  undesirable_weight: NonNegative = 1.0,
) -> jax.Array:
  """Computes -w log sigmoid(beta r - delta), or of an undesirable completion -w log sigmoid(delta - beta r).

  delta = beta * mean_ratio: a classifier of desirable against undesirable, whose threshold is the mean reward so far.
  Scope of the mean: every example of the run, those of this step included. The paper's weights of undesirable
  examples, `density_ratio`, are given as the examples' own.

  Source: Jung et al. 2024, eq. 8 (arXiv:2404.04656)
  """
  weight = class_weight(labelled, desirable_weight, undesirable_weight)
  return -weight * jax.nn.log_sigmoid(beta * towards(labelled, labelled.ratio - labelled.mean_ratio))


def density_ratio(desirable: jax.Array, least: float = 0.5, most: float = 10.0) -> jax.Array:
  """Computes p / (1 - p), within bounds: a weight of undesirable examples for `bco`, where the classes' prompts differ.

  Args:
    desirable: p, a classifier's probability that the example's prompt comes from the desirable ones, any shape.
    least, most: the bounds; TRL's.

  Source: Jung et al. 2024, underlying distribution matching (arXiv:2404.04656)
  """
  return jnp.clip(desirable / (1 - desirable + 1e-8), least, most)  # TRL's guard against p = 1


def towards(labelled: Labelled, values: jax.Array) -> jax.Array:
  """Returns `values` where the completion is desirable, -`values` where it is undesirable."""
  return (2 * labelled.desirable - 1) * values


def class_weight(labelled: Labelled, desirable_weight: jax.Array | float, undesirable_weight: jax.Array | float):
  """Returns the weight of each example's class, in the shape of `labelled.desirable`."""
  return labelled.desirable * desirable_weight + (1 - labelled.desirable) * undesirable_weight


def clamped_kl(ratio: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes (max(0, mean), variance) of log-ratios of mismatched completions, constants in nats and nats^2.

  Each is of a prompt with another prompt's completion: over the batch their mean ratio estimates, from below and with
  noise, the KL from policy to reference. The variance is of the unclamped mean.

  Args:
    ratio: policy less reference, any shape.
    weights: the same shape, of the prompts' examples; 0 where there is none.

  Source: Ethayarajh et al. 2024, section 4.1 (arXiv:2402.01306)
  """
  count = divisor(weights.sum())
  mean = jnp.sum(weights * ratio) / count
  variance = jnp.sum(weights * jnp.square(ratio - mean)) / count
  return jax.lax.stop_gradient(jnp.maximum(mean, 0.0)), jax.lax.stop_gradient(variance)


def update_mean(mean: jax.Array, count: jax.Array, values: jax.Array, weights: jax.Array):
  """Updates a running (mean, count) by `values` with `weights` of the same shape; both results are constants.

  The count is the sum of all weights so far.

  Source: Chan et al. 1979, eq. 2.1a, "Updating formulae and a pairwise algorithm for computing sample variances"
  """
  total = count + weights.sum()
  new = mean + jnp.sum(weights * (values - mean)) / divisor(total)
  return jax.lax.stop_gradient(new), jax.lax.stop_gradient(total)


LOSSES = by_name(
  UnpairedObjective(kto, mismatched=True),
  UnpairedObjective(apo_zero_unpaired),
  UnpairedObjective(bco, running_mean=True),
)
