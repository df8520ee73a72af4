"""Supervised fine-tuning on completion tokens: cross-entropy or DFT."""

import dataclasses

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, Options, Parts, Recipe, segments
from alignjax.losses.aggregation import divisor
from alignjax.losses.logps import next_token_scores
from alignjax.losses.objective import Family, Term
from alignjax.losses.sft import cross_entropy, dft
from alignjax.model.decoder import Model
from alignjax.types import Rows


@dataclasses.dataclass(frozen=True)
class SftOptions(Options):
  """Supervised fine-tuning has no options of its own."""


def make(model: Model, terms: tuple[Term, ...], options: SftOptions, parts: Parts) -> Algorithm:
  """Makes the algorithm that fine-tunes `model`; the loss is the mean over the whole step's completion tokens.

  Args:
    terms: cross_entropy or dft; only the first is read.
    options, parts: unused; every recipe's `make` takes them.
  """
  del options, parts  # prepare only counts
  token_loss = terms[0].objective

  def prepare(trees, batch, key):
    del trees, key
    return batch.updated(totals={"num_tokens": divisor(token_weights(batch.rows).sum())})

  def loss_fn(params, batch, hparams):
    del hparams
    rows = batch.rows
    hidden, _ = model.forward(params, rows["tokens"], segments(rows), rows["positions"])
    scores = next_token_scores(hidden, model.unembedding(params), rows["tokens"], entropy=True)
    weights = token_weights(rows) / batch.totals["num_tokens"]

    def mean(x):
      return jnp.sum(weights * x)

    return mean(token_loss(scores.logps)), {
      "mean_token_accuracy": mean(scores.is_top1),
      "entropy": mean(scores.entropy),
    }

  return Algorithm(prepare, loss_fn, count="num_tokens")


def token_weights(rows: Rows) -> jax.Array:
  """Returns loss_mask times the weight of the example that the token belongs to, [B, T].

  Rows must hold one segment an example.
  """
  padded = jnp.pad(rows["weights"], ((0, 0), (1, 0)))  # by segment: 0 is padding
  return rows["loss_mask"] * jnp.take_along_axis(padded, rows["segment_ids"], axis=1)


RECIPE = Recipe(
  options=SftOptions,
  family=Family({"cross_entropy": cross_entropy, "dft": dft}),
  make=make,
  records=lambda terms, options: "sft",
)
