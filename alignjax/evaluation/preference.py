"""The accuracy of a reward model on pairs, and the calibration of its confidence.

Everything here takes margins [n] = reward(chosen) - reward(rejected), in nats: under Bradley-Terry,
P(chosen preferred) = sigmoid(margin). Data always labels the chosen side "preferred", so that a plain reliability
diagram of that probability would have a constant outcome. Here a pair predicts instead the side with the larger reward,
with confidence sigmoid(|margin|) in [1/2, 1]; this is right if the margin is positive.
"""

import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import ArrayLike
from scipy.special import expit

from alignjax.algorithms.reward import pair_rewards
from alignjax.data.stream import NumpyBatch
from alignjax.evaluation import interval
from alignjax.model import Model
from alignjax.types import Params, Rows


class Bin(NamedTuple):
  """One row of a reliability table: pairs whose confidence fell into one bin."""

  confidence: float  # mean sigmoid(|margin|)
  accuracy: float  # share that was right, ties half
  low: float | None  # 95 % interval of the accuracy (Wilson, over prompts); None if there is only one prompt
  high: float | None
  count: Any  # int; a tuple has a method of this name


class Calibration(NamedTuple):
  """The difference between stated confidence and observed accuracy.

  Attributes:
    ece: expected calibration error, sum over bins of (count / n) |accuracy - confidence|.
    ece_if_calibrated: the expected `ece` of a perfectly calibrated model on this many pairs, from the noise of the
      labels alone. An `ece` near it is no evidence of miscalibration.
    brier: mean squared error of P(chosen preferred); 1/4 for a model whose margins are all 0.
    log_loss: mean -log P(chosen preferred), nats; log 2 for a model whose margins are all 0.
    reliability: the bins that contain pairs, in order of confidence.
  """

  ece: float
  ece_if_calibrated: float
  brier: float
  log_loss: float
  reliability: tuple[Bin, ...]


def reward_margins(model: Model, params: Params, batches: Iterable[Rows | NumpyBatch]) -> dict[int, float]:
  """Computes the margins of all pairs in preference batches, by record id; a repeated record counts once.

  Args:
    model: a reward model; the margins of an ensemble are those of its mean.
    params: its parameters, on the current mesh.
    batches: NumPy batches whole in every process, or arrays on the mesh.
  """
  rewards = _pair_rewards(model)
  margins: dict[int, float] = {}
  for batch in batches:
    values = _whole(rewards(params, batch))
    present = _whole(batch["example_mask"]) > 0
    ids = _whole(batch["record_ids"])
    margins.update(zip(ids[present].tolist(), (values[..., 0] - values[..., 1])[present].tolist(), strict=True))
  return margins


def _whole(x: np.ndarray | jax.Array) -> np.ndarray:
  """Returns the array of all processes; a numpy array is whole in every process."""
  if isinstance(x, np.ndarray):
    return x
  return multihost_utils.process_allgather(x, tiled=True)


@functools.cache
def _pair_rewards(model: Model):
  """Jits `pair_rewards` of a model."""
  return jax.jit(functools.partial(pair_rewards, model))


def accuracy(margins: ArrayLike, prompts: Sequence[Hashable] | None = None) -> interval.Estimate:
  """Computes the share of pairs with margin > 0, with Wilson's interval; a tie counts as wrong, as in TRL's metric.

  Args:
    margins: of the pairs.
    prompts: of each pair, the clusters of the interval; None: all are different.

  Raises:
    ValueError: there are no margins, or one is NaN.
  """
  return interval.share(_check(margins) > 0, prompts)


def calibration(margins: ArrayLike, bins: int = 10, prompts: Sequence[Hashable] | None = None) -> Calibration:
  """Computes the calibration over `bins` equal-width bins of confidence in [1/2, 1].

  A tied pair (margin 0) is half right, as the mean over both orders of the pair; only `accuracy` counts it as wrong.

  Args:
    margins: of the pairs.
    bins: their number; those without a pair are left out of the reliability table.
    prompts: as in `accuracy`.

  Raises:
    ValueError: there are no margins, or one is NaN.

  Source: Guo et al. 2017, eq. 3 (arXiv:1706.04599), on confidences of a binary choice; Brier 1950
  """
  margins = _check(margins)
  confidence = expit(np.abs(margins))
  right = np.where(margins == 0, 0.5, margins > 0)
  place = np.minimum((2 * bins * (confidence - 0.5)).astype(int), bins - 1)
  reliability = []
  ece = 0.0
  noise = 0.0
  for index in np.unique(place):
    member = place == index
    clusters = None
    if prompts is not None:
      clusters = [prompts[int(i)] for i in np.flatnonzero(member)]
    observed = interval.share(right[member], clusters)
    stated = float(confidence[member].mean())
    reliability.append(Bin(stated, observed.value, observed.low, observed.high, observed.count))
    ece += observed.count / margins.size * abs(observed.value - stated)
    # E|N(0, s^2)| = s sqrt(2 / pi), with s^2 the sum of the pairs' own Bernoulli variances.
    variance = np.sum(confidence[member] * (1 - confidence[member]))
    noise += np.sqrt(2 / np.pi * variance) / margins.size
  return Calibration(
    ece=float(ece),
    ece_if_calibrated=float(noise),
    brier=float(np.mean(expit(-margins) ** 2)),
    log_loss=float(np.mean(np.logaddexp(0.0, -margins))),
    reliability=tuple(reliability),
  )


def summary(margins: ArrayLike, prompts: Sequence[Hashable] | None = None) -> dict:
  """Computes accuracy and calibration of held-out pairs as a JSON-ready record.

  Args:
    margins, prompts: as in `accuracy`.

  Raises:
    ValueError: as `accuracy`.
  """
  estimate = accuracy(margins, prompts)
  measured = calibration(margins, prompts=prompts)
  return {
    "heldout_accuracy": estimate.value,
    "heldout_interval": estimate.interval,
    "heldout_interval_method": estimate.method,
    "pairs": estimate.count,
    **measured._asdict(),
    "reliability": [row._asdict() for row in measured.reliability],
  }


def _check(margins: ArrayLike) -> np.ndarray:
  """Returns the margins in float64; ValueError unless they are numbers of shape [n >= 1]."""
  margins = np.asarray(margins, np.float64)
  if margins.ndim != 1 or not margins.size or np.isnan(margins).any():
    raise ValueError(f"margins must be numbers of shape [n >= 1], got shape {margins.shape}")
  return margins
