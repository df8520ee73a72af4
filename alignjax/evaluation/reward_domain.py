"""Fits a reward model's in-distribution region, its domain (algorithms/reward_domain.py).

A text is outside if its features are farther from the mean of the training data's features than those of nearly all
held-out data of the same kind. Its reward is an extrapolation.
"""

import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import ArrayLike

from alignjax.algorithms import reward_domain as domain_lib
from alignjax.algorithms.reward import last_states
from alignjax.data.stream import NumpyBatch
from alignjax.evaluation import interval
from alignjax.model import Model
from alignjax.types import Params, Rows


class Texts(NamedTuple):
  """A reward model's features [N, D] and rewards [N] of N texts; for an ensemble, the mean of its rewards."""

  features: np.ndarray
  rewards: np.ndarray


def measure(model: Model, params: Params, batches: Iterable[Rows | NumpyBatch], sides: int = 2) -> Texts:
  """Computes features and rewards of all texts in batches of pairs, or of rows with one text each (`sides` 1).

  Args:
    model: a reward model.
    params: its parameters, on the current mesh.
    batches: at least one; absent examples are left out.
    sides: texts of an example.
  """
  measure_batch = _make_measure(model, sides)
  all_features = []
  all_rewards = []
  for batch in batches:
    features, rewards, present = multihost_utils.process_allgather(measure_batch(params, batch), tiled=True)
    all_features.append(features[present])
    all_rewards.append(rewards[present])
  return Texts(np.concatenate(all_features).astype(np.float64), np.concatenate(all_rewards).astype(np.float64))


@functools.cache
def _make_measure(model: Model, sides: int):
  """Returns a jitted (params, rows) -> features [n, D], rewards [n], whether there is a text [n]."""

  @jax.jit
  def measure_batch(params, rows):
    features, rewards = last_states(model, params, rows, sides)
    rewards = rewards.mean(axis=-1)
    present = jnp.repeat(rows["example_mask"], sides, axis=1) > 0
    return features.reshape(-1, features.shape[-1]), rewards.reshape(-1), present.reshape(-1)

  return measure_batch


def fit(training: Texts, held_out: Texts, share: float = 0.01) -> Params:
  """Fits the parameters of `algorithms.reward_domain.of` a reward model, float32.

  Args:
    training: gives mean and covariance; the reward model may have been trained on it.
    held_out: unseen texts of the same kind; they give the limit, and the rewards' mean and deviation.
    share: the largest expected share of texts like the held-out ones that are beyond the limit.

  Raises:
    ValueError: there are fewer than two training texts, or too few held-out ones for such a share.
  """
  count = len(held_out.rewards)
  rank = int(np.ceil((count + 1) * (1 - share)))
  if len(training.rewards) < 2 or rank > count:
    raise ValueError(f"a domain needs 2 training texts and {int(np.ceil(1 / share)) - 1} held-out ones, got {count}")
  mean = training.features.mean(axis=0)
  values, vectors = np.linalg.eigh(shrunk_covariance(training.features))
  # A direction in which the training data does not vary gets a scale; without one, rounding would decide.
  values = np.maximum(values, values.max() * 1e-10 + np.finfo(np.float64).tiny)
  whitening = vectors / np.sqrt(values)
  distances = np.linalg.norm((held_out.features - mean) @ whitening, axis=1)
  limit = np.partition(distances, rank - 1)[rank - 1]
  differences = held_out.rewards - held_out.rewards[0]  # exactly 0 if all are equal, so that the deviation is too
  moments = {"reward_mean": held_out.rewards.mean(), "reward_std": differences.std(ddof=1)}
  fitted = {"mean": mean, "whitening": whitening, "limit": limit} | moments
  return {name: np.float32(value) for name, value in fitted.items()}


def shrunk_covariance(features: ArrayLike) -> np.ndarray:
  """Computes the covariance [D, D] of features [N, D], shrunk towards a multiple of the identity.

  The smaller N is, the more it is shrunk.

  Source: Ledoit and Wolf 2004, lemma 3.2 and 3.3 (doi:10.1016/S0047-259X(03)00096-4)
  """
  centred = np.asarray(features, np.float64)
  centred = centred - centred.mean(axis=0)
  count, size = centred.shape
  sample = centred.T @ centred / count
  scale = np.trace(sample) / size
  spread = np.sum(np.square(sample - scale * np.eye(size)))  # d^2, both without the division by D
  # The mean over texts of |x x' - S|^2 is that of |x|^4, less |S|^2.
  noise = (np.mean(np.sum(np.square(centred), axis=1) ** 2) - np.sum(np.square(sample))) / count
  weight = 0.0
  if spread > 0:
    weight = min(noise / spread, 1.0)
  return weight * scale * np.eye(size) + (1 - weight) * sample


def outside(domain: Params, features: ArrayLike, clusters: Sequence[Hashable] | None = None) -> interval.Estimate:
  """Computes the share of features [N, D] beyond the limit, with Wilson's interval over `clusters`.

  Args:
    domain: of `fit`.
    features: of `measure`, at least one row.
    clusters: the texts' prompts; None: all are different.
  """
  is_outside = np.asarray(domain_lib.distance(domain, jnp.float32(features))) > domain["limit"]
  return interval.share(is_outside, clusters)
