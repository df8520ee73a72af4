"""A process reward model: a decoder with a scalar head, read after each step of an answer."""

import dataclasses

import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, Options, Parts, Recipe, segments
from alignjax.algorithms.sft import token_weights
from alignjax.errors import InputError
from alignjax.losses.aggregation import divisor
from alignjax.losses.objective import Family, Term
from alignjax.losses.reward import step_logistic
from alignjax.model import heads
from alignjax.model.decoder import Model


@dataclasses.dataclass(frozen=True)
class ProcessRewardOptions(Options):
  """Process-reward modelling has no options of its own."""


def make(model: Model, terms: tuple[Term, ...], options: ProcessRewardOptions, parts: Parts) -> Algorithm:
  """Makes the algorithm that trains `model` to tell right steps of an answer from wrong ones.

  Batches have "step_labels" [B, T]: 1 or 0 at the last token of each labelled step. The loss is the mean over all
  labelled steps of the optimizer step, as in TRL, so an answer with more steps counts for more.

  Args:
    model: a decoder with head="scalar", which is not checked here.
    terms: the objective; only the first is read.
    options, parts: unused; every recipe's `make` takes them.

  Raises:
    InputError: model.config.score_heads is more than 1.
  """
  del options, parts  # prepare only counts
  if (count := model.config.score_heads) > 1:
    raise InputError(f"model.score_heads={count}: only algorithm.name=reward trains an ensemble; use 1")
  step_loss = terms[0].objective

  def prepare(trees, batch, key):
    del trees, key
    return batch.updated(totals={"num_steps": divisor(token_weights(batch.rows).sum())})

  def loss_fn(params, batch, hparams):
    del hparams
    rows = batch.rows
    hidden, _ = model.forward(params, rows["tokens"], segments(rows), rows["positions"])
    scores, labels = heads.score(params, hidden), rows["step_labels"]
    weights = token_weights(rows) / batch.totals["num_steps"]

    def mean(x):
      return jnp.sum(weights * x)

    return mean(step_loss(scores, labels)), {
      "accuracy": mean((scores > 0) == (labels > 0)),
      "share/right": mean(labels),  # what a model that always says right would score
    }

  return Algorithm(prepare, loss_fn, count="num_steps")


RECIPE = Recipe(
  options=ProcessRewardOptions,
  family=Family({"step_logistic": step_logistic}),
  make=make,
  records=lambda terms, options: "stepwise",
  head="scalar",
)
