"""Supervised fine-tuning on completion tokens: cross-entropy or DFT."""

import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, one_of, segments
from alignjax.losses.aggregation import divisor
from alignjax.losses.logps import next_token_scores
from alignjax.losses.sft import cross_entropy, dft
from alignjax.model.decoder import Model

HEAD = "none"
LOSSES = {f.__name__: f for f in (cross_entropy, dft)}
OPTIONS: dict[str, object] = {}


def data(loss: str = "") -> str:
  """The kind of records."""
  del loss
  return "sft"


def hparams(loss: str = "") -> dict[str, float]:
  """None.

  Raises:
    InputError: an unknown loss.
  """
  one_of("loss", loss or "cross_entropy", LOSSES)
  return {}


def make(model: Model, loss: str = "", microbatches: int = 1) -> Algorithm:
  """Fine-tuning of `model` with one of `LOSSES`."""
  del microbatches  # prepare only counts
  token_loss = LOSSES[loss or "cross_entropy"]

  def prepare(frozen, batch, key):
    del frozen, key
    return batch | {"num_tokens": divisor(token_weights(batch).sum())}

  def loss_fn(params, batch, hparams):
    del hparams
    hidden, _ = model.forward(params, batch["tokens"], segments(batch), batch["positions"])
    scores = next_token_scores(hidden, model.unembedding(params), batch["tokens"], entropy=True)
    weights = token_weights(batch) / batch["num_tokens"]
    mean = lambda x: jnp.sum(weights * x)
    return mean(token_loss(scores.logps)), {
      "mean_token_accuracy": mean(scores.is_top1),
      "entropy": mean(scores.entropy),
    }

  return Algorithm(prepare, loss_fn, count="num_tokens")


def token_weights(batch):
  """loss_mask times the weight of the example that the token belongs to, [B, T]."""
  padded = jnp.pad(batch["weights"], ((0, 0), (1, 0)))  # segment 0 is padding
  return batch["loss_mask"] * jnp.take_along_axis(padded, batch["segment_ids"], axis=1)
