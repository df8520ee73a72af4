"""A process reward model: a decoder with a scalar head, read after each step of an answer."""

import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, one_of, segments
from alignjax.algorithms.sft import token_weights
from alignjax.errors import InputError
from alignjax.losses.aggregation import divisor
from alignjax.losses.reward import step_logistic
from alignjax.model import heads
from alignjax.model.decoder import Model

HEAD = "scalar"
LOSSES = {f.__name__: f for f in (step_logistic,)}
OPTIONS: dict[str, object] = {}


def data(loss: str = "") -> str:
  """The kind of records."""
  del loss
  return "stepwise"


def hparams(loss: str = "") -> dict[str, float]:
  """None.

  Raises:
    InputError: an unknown loss.
  """
  one_of("loss", loss or "step_logistic", LOSSES)
  return {}


def make(model: Model, loss: str = "", microbatches: int = 1) -> Algorithm:
  """Process-reward modelling with `model`, whose config has head="scalar", and one of `LOSSES`.

  The mean is over labelled steps, as TRL's: an answer in more steps counts for more.

  Raises:
    InputError: an unknown loss, or a model of several heads.
  """
  del microbatches  # prepare only counts
  hparams(loss)
  if (count := model.config.score_heads) > 1:
    raise InputError(f"model.score_heads={count}: only algorithm.name=reward trains an ensemble; use 1")
  step_loss = LOSSES[loss or "step_logistic"]

  def prepare(frozen, batch, key):
    del frozen, key
    return batch | {"num_steps": divisor(token_weights(batch).sum())}

  def loss_fn(params, batch, hparams):
    del hparams
    hidden, _ = model.forward(params, batch["tokens"], segments(batch), batch["positions"])
    scores, labels = heads.score(params, hidden), batch["step_labels"]
    weights = token_weights(batch) / batch["num_steps"]
    mean = lambda x: jnp.sum(weights * x)
    return mean(step_loss(scores, labels)), {
      "accuracy": mean((scores > 0) == (labels > 0)),
      "share/right": mean(labels),  # what a model that always says right would score
    }

  return Algorithm(prepare, loss_fn, count="num_steps")
