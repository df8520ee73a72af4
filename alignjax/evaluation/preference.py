"""How well a reward model orders pairs, and whether its confidence can be believed.

Everything here takes margins [n] = reward(chosen) - reward(rejected), in nats: under Bradley-Terry,
P(chosen preferred) = sigmoid(margin). Data always labels the chosen side "preferred", so a plain reliability diagram of
that probability would have a constant outcome. The symmetrical reading is used instead: a pair predicts its own larger
side with confidence sigmoid(|margin|) in [1/2, 1], and is right when the margin is positive.
"""

import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import ArrayLike
from scipy.special import expit

from alignjax.algorithms.reward import pair_rewards
from alignjax.evaluation import interval
from alignjax.model import Model
from alignjax.types import Batch, Params


class Bin(NamedTuple):
  """One row of a reliability table: pairs whose confidence fell into one bin."""

  confidence: float  # mean sigmoid(|margin|)
  accuracy: float  # share that was right, ties half
  low: float | None  # 95 % interval of the accuracy (Wilson, over prompts); None where there is one prompt
  high: float | None
  count: int


class Calibration(NamedTuple):
  """How far stated confidence lies from observed accuracy.

  Attributes:
    ece: expected calibration error, sum over bins of (count / n) |accuracy - confidence|.
    ece_if_calibrated: what `ece` a perfectly calibrated model is expected to show on this many pairs, from the noise of
      the labels alone. An `ece` near it is no evidence of miscalibration.
    brier: mean squared error of P(chosen preferred); 1/4 for a model that knows nothing.
    log_loss: mean -log P(chosen preferred), nats; log 2 for a model that knows nothing.
    reliability: the bins that hold pairs, in order of confidence.
  """

  ece: float
  ece_if_calibrated: float
  brier: float
  log_loss: float
  reliability: tuple[Bin, ...]


def reward_margins(model: Model, params: Params, batches: Iterable[Batch]) -> dict[int, float]:
  """Margins of all pairs in preference batches (numpy or jax), by record id; a record that comes twice counts once."""
  rewards = _pair_rewards(model)
  # numpy arrays are whole in every process
  whole = lambda x: x if isinstance(x, np.ndarray) else multihost_utils.process_allgather(x, tiled=True)
  margins: dict[int, float] = {}
  for batch in batches:
    values, present, ids = map(whole, (rewards(params, batch), batch["example_mask"], batch["record_ids"]))
    held = present > 0
    margins.update(zip(ids[held].tolist(), (values[..., 0] - values[..., 1])[held].tolist(), strict=True))
  return margins


@functools.cache
def _pair_rewards(model: Model):
  return jax.jit(functools.partial(pair_rewards, model))


def accuracy(margins: ArrayLike, prompts: Sequence[Hashable] | None = None) -> interval.Estimate:
  """The share of pairs with margin > 0, with Wilson's interval; a tie counts as wrong, as in TRL's metric.

  Args:
    margins: of the pairs.
    prompts: of each pair, over which the interval clusters; None: all are different.
  """
  return interval.share(_check(margins) > 0, prompts)


def calibration(margins: ArrayLike, bins: int = 10, prompts: Sequence[Hashable] | None = None) -> Calibration:
  """Calibration over `bins` equal-width bins of confidence in [1/2, 1].

  A tied pair (margin 0) says "I do not know" and is half right, which is what averaging over both orders of the pair
  gives; only `accuracy` calls it wrong.

  Source: Guo et al. 2017, eq. 3 (arXiv:1706.04599), on confidences of a binary choice; Brier 1950
  """
  margins = _check(margins)
  confidence = expit(np.abs(margins))
  right = np.where(margins == 0, 0.5, margins > 0)
  place = np.minimum((2 * bins * (confidence - 0.5)).astype(int), bins - 1)
  reliability, ece, noise = [], 0.0, 0.0
  for index in np.unique(place):
    member = place == index
    own = None if prompts is None else [prompts[i] for i in np.flatnonzero(member)]
    observed = interval.share(right[member], own)
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
  """Accuracy and calibration of held-out pairs as a flat, JSON-ready record; prompts as in `accuracy`."""
  estimate, measured = accuracy(margins, prompts), calibration(margins, prompts=prompts)
  return {
    "heldout_accuracy": estimate.value,
    "heldout_interval": estimate.interval,
    "heldout_interval_method": estimate.method,
    "pairs": estimate.count,
    **measured._asdict(),
    "reliability": [row._asdict() for row in measured.reliability],
  }


def _check(margins: ArrayLike) -> np.ndarray:
  margins = np.asarray(margins, np.float64)
  if margins.ndim != 1 or not margins.size or np.isnan(margins).any():
    raise ValueError(f"margins must be numbers of shape [n >= 1], got shape {margins.shape}")
  return margins
