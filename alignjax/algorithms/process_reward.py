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
  """None."""


def make(model: Model, terms: tuple[Term, ...], options: ProcessRewardOptions, parts: Parts) -> Algorithm:
  """Process-reward modelling with `model`, whose config has head="scalar".

  The mean is over labelled steps, as TRL's: an answer in more steps counts for more.

  Raises:
    InputError: a model of several heads.
  """
  del options, parts  # prepare only counts
  if (count := model.config.score_heads) > 1:
    raise InputError(f"model.score_heads={count}: only algorithm.name=reward trains an ensemble; use 1")
  step_loss = terms[0].objective

  def prepare(trees, batch, key):
    del trees, key
    return batch | {"num_steps": divisor(token_weights(batch).sum())}

  def loss_fn(params, batch, hparams):
    del hparams
    hidden, _ = model.forward(params, batch["tokens"], segments(batch), batch["positions"])
    scores, labels = heads.score(params, hidden), batch["step_labels"]
    weights = token_weights(batch) / batch["num_steps"]

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
