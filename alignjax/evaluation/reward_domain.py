"""Fits a reward model's domain (algorithms/reward_domain.py): what is farther from the mean of its training data's
features than nearly all held-out data of the same kind lies outside, where a reward is extrapolation.
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
from alignjax.evaluation import interval
from alignjax.model import Model
from alignjax.types import Batch, Params


class Texts(NamedTuple):
  """What a reward model makes of N texts: features [N, D] and rewards [N], of an ensemble the mean."""

  features: np.ndarray
  rewards: np.ndarray


def measure(model: Model, params: Params, batches: Iterable[Batch], sides: int = 2) -> Texts:
  """Features and rewards of all texts in batches (numpy or jax) of pairs, or of rows with one text each (`sides` 1)."""
  look, found = _look(model, sides), []
  for batch in batches:
    features, rewards, there = multihost_utils.process_allgather(look(params, batch), tiled=True)
    found.append((features[there], rewards[there]))
  features, rewards = zip(*found, strict=True)
  return Texts(np.concatenate(features).astype(np.float64), np.concatenate(rewards).astype(np.float64))


@functools.cache
def _look(model: Model, sides: int):
  """A jitted (params, batch) -> features [n, D], rewards [n], whether there is a text [n]."""

  @jax.jit
  def look(params, batch):
    features, rewards = last_states(model, params, batch, sides * batch["example_mask"].shape[1])
    rewards = rewards.mean(axis=-1)
    there = jnp.repeat(batch["example_mask"], sides, axis=1) > 0
    return features.reshape(-1, features.shape[-1]), rewards.reshape(-1), there.reshape(-1)

  return look


def fit(training: Texts, held_out: Texts, share: float = 0.01) -> Params:
  """The parameters of `algorithms.reward_domain.of` a reward model, float32.

  Args:
    training: what gives mean and covariance; the reward model may have seen it.
    held_out: of the same kind, unseen: what gives the limit, and the rewards' mean and deviation.
    share: of texts like the held-out ones that the limit calls outside, at most, in expectation.

  Raises:
    ValueError: fewer than two training texts, or too few held-out ones for such a share.
  """
  count = len(held_out.rewards)
  rank = int(np.ceil((count + 1) * (1 - share)))
  if len(training.rewards) < 2 or rank > count:
    raise ValueError(f"a domain needs 2 training texts and {int(np.ceil(1 / share)) - 1} held-out ones, got {count}")
  mean = training.features.mean(axis=0)
  values, vectors = np.linalg.eigh(shrunk_covariance(training.features))
  # A direction in which the training data does not vary at all still has a scale, or rounding would decide.
  values = np.maximum(values, values.max() * 1e-10 + np.finfo(np.float64).tiny)
  whitening = vectors / np.sqrt(values)
  distances = np.linalg.norm((held_out.features - mean) @ whitening, axis=1)
  limit = np.partition(distances, rank - 1)[rank - 1]
  differences = held_out.rewards - held_out.rewards[0]  # 0 where all are equal: then there is no deviation
  moments = {"reward_mean": held_out.rewards.mean(), "reward_std": differences.std(ddof=1)}
  fitted = {"mean": mean, "whitening": whitening, "limit": limit} | moments
  return {name: np.float32(value) for name, value in fitted.items()}


def shrunk_covariance(features: ArrayLike) -> np.ndarray:
  """The covariance [D, D] of features [N, D], drawn towards a multiple of the identity by as much as N is too few.

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
  weight = min(noise / spread, 1.0) if spread > 0 else 0.0
  return weight * scale * np.eye(size) + (1 - weight) * sample


def outside(domain: Params, features: ArrayLike, clusters: Sequence[Hashable] | None = None) -> interval.Estimate:
  """The share of features [N, D] beyond the limit, with Wilson's interval over `clusters`: the texts' prompts."""
  found = np.asarray(domain_lib.distance(domain, jnp.float32(features))) > domain["limit"]
  return interval.share(found, clusters)
