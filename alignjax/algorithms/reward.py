"""A reward model of pairs or rankings: a decoder with a scalar head, read at the last token of each side.

With `model.score_heads` > 1 it is an ensemble on one trunk. Its heads differ by where they begin and by what they see:
head k takes record i into account as often as a Poisson(1) draw that belongs to (i, k) says, which is the bootstrap
for a stream. Rewards and their metrics are the mean's; `rewards/disagreement` is the spread, over heads, of the margin
of chosen against rejected: of the reward itself it would hold the offset that the likelihood leaves free. Heads that
share a trunk agree more than whole models would: a disagreement warns, an agreement proves little.

Source: Coste et al. 2024 (arXiv:2310.02743); the bootstrap: Oza and Russell 2001
"""

import dataclasses

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, Options, Parts, Recipe, Traced, one_of, segments
from alignjax.algorithms.pair_sums import confidences
from alignjax.data import segment
from alignjax.losses.aggregation import divisor
from alignjax.losses.objective import Family, Term
from alignjax.losses.pair import both_ways, expected
from alignjax.losses.reward import bradley_terry, plackett_luce
from alignjax.model import heads
from alignjax.model.decoder import Model
from alignjax.system.ranges import NonNegative
from alignjax.types import HParams, Mean, Metrics, Params, Rows

BOOTSTRAPS = ("poisson", "none")


@dataclasses.dataclass(frozen=True)
class RewardOptions(Options):
  """Static settings of a reward model."""

  bootstrap: str = "poisson"  # which examples a head of an ensemble learns from; "none": each from all


@dataclasses.dataclass(frozen=True)
class RewardTraced(Traced):
  """Traced hyper-parameters of a reward model."""

  center_coefficient: NonNegative = 0.01  # weight of the term that holds the mean reward near 0


def records(terms: tuple[Term, ...], options: RewardOptions) -> str:
  """Returns the kind of records: "ranked" for `plackett_luce`, else "preference"; only the first of `terms` is read."""
  del options
  return "ranked" if terms[0].name == "plackett_luce" else "preference"


def check(terms: tuple[Term, ...], options: RewardOptions) -> None:
  """Raises InputError where the bootstrap is unknown; `terms` is unused."""
  del terms
  one_of("bootstrap", options.bootstrap, BOOTSTRAPS)


def make(model: Model, terms: tuple[Term, ...], options: RewardOptions, parts: Parts) -> Algorithm:
  """Makes the algorithm that trains `model`, whose config has head="scalar" (not checked here), as a reward model.

  Args:
    model: with model.config.score_heads > 1 it is an ensemble.
    terms: bradley_terry or plackett_luce; only the first is read.
    options: `bootstrap` is read by an ensemble alone.
    parts: unused; every recipe's `make` takes it.
  """
  del parts  # prepare only counts
  num_heads = model.config.score_heads
  ranked = records(terms, options) == "ranked"
  losses_of, metrics_of = (ranking_losses, ranking_metrics) if ranked else (pair_losses, pair_metrics)

  def prepare(trees, batch, key):
    del trees, key
    if num_heads > 1 and options.bootstrap == "poisson":
      batch = batch.updated(rows={"head_weights": poisson_weights(batch.rows["record_ids"], num_heads)})
    return batch.updated(totals={"num_examples": divisor(batch.rows["weights"].sum())})

  def loss_fn(params, batch, hparams):
    rows = batch.rows
    rewards = head_rewards(model, params, rows, rows["ranks"].shape[-1] if ranked else 2)
    losses = jax.vmap(lambda of_head: losses_of(of_head, rows, hparams), -1, -1)(rewards)
    if "head_weights" in rows:  # each head learns from its own draw; what is reported is the loss of all
      drawn = losses * rows["head_weights"]
      losses = drawn + jax.lax.stop_gradient(losses - drawn)
    weights = rows["weights"] / batch.totals["num_examples"]

    def mean(x):
      return jnp.sum(weights * x)

    return mean(losses.mean(axis=-1)), jax.tree.map(mean, metrics_of(rewards, rows))

  return Algorithm(prepare, loss_fn, count="num_examples")


def pair_losses(rewards: jax.Array, rows: Rows, hparams: HParams) -> jax.Array:
  """Returns losses [B, P] of rewards [B, P, 2] (chosen, rejected) by `bradley_terry`, with the rows' "margins".

  They are expected over labels that are right with the probability "confidences".
  """
  confidence = confidences(rows)
  chosen, rejected = both_ways(rewards[..., 0], rewards[..., 1], confidence)
  center_coefficient = hparams["center_coefficient"]
  losses = bradley_terry(chosen, rejected, margin=rows["margins"], center_coefficient=center_coefficient)
  return expected(losses, confidence)


def pair_metrics(rewards: jax.Array, rows: Rows) -> dict[str, jax.Array]:
  """Returns the metrics [B, P] of pairs from rewards [B, P, 2, heads], expected over labels as the losses are."""
  confidence = confidences(rows)
  chosen, rejected = both_ways(rewards[..., 0, :], rewards[..., 1, :], confidence[..., None])
  right = chosen.mean(axis=-1) > rejected.mean(axis=-1)  # a tie counts as wrong
  metrics = side_metrics(chosen, rejected) | {"rewards/accuracies": right}
  if rewards.shape[-1] > 1:
    metrics["rewards/head_accuracies"] = (chosen > rejected).mean(axis=-1)  # of one head, on average
  return {name: expected(values, confidence) for name, values in metrics.items()}


def ranking_losses(rewards: jax.Array, rows: Rows, hparams: HParams) -> jax.Array:
  """Returns losses [B, P] of rewards [B, P, K] by `plackett_luce`, with the rows' "ranks" [B, P, K]."""
  return plackett_luce(rewards, rows["ranks"], center_coefficient=hparams["center_coefficient"])


def ranking_metrics(rewards: jax.Array, rows: Rows) -> Metrics:
  """Returns the metrics [B, P] of rankings from rewards [B, P, K, heads]; chosen are the best, rejected the worst.

  Rewards of several best, or worst, are averaged. Accuracy is over all comparisons, of two responses of different rank;
  without any there is none.
  """
  ranks, mean = rows["ranks"], rewards.mean(axis=-1)
  there = ranks > 0
  best = there & (ranks == jnp.min(ranks, axis=-1, where=there, initial=jnp.inf, keepdims=True))
  worst = there & (ranks == jnp.max(ranks, axis=-1, keepdims=True))

  def over(which):
    return jnp.sum(jnp.where(which[..., None], rewards, 0), axis=-2) / jnp.maximum(which.sum(axis=-1), 1)[..., None]

  better = (ranks[..., :, None] < ranks[..., None, :]) & there[..., :, None]
  right = better & (mean[..., :, None] > mean[..., None, :])  # a tie of rewards counts as wrong
  comparisons = better.sum(axis=(-1, -2))
  compared: Metrics = {
    "comparisons": comparisons,
    "rewards/accuracies": Mean(right.sum(axis=(-1, -2)), comparisons),
  }
  return side_metrics(over(best), over(worst)) | compared


def side_metrics(chosen: jax.Array, rejected: jax.Array) -> dict[str, jax.Array]:
  """Returns the metrics [B, P] of rewards [B, P, heads] of better and worse side; of an ensemble, its disagreement."""
  margins = chosen - rejected
  sides = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": margins}
  metrics = {name: value.mean(axis=-1) for name, value in sides.items()}
  return metrics | ({"rewards/disagreement": margins.std(axis=-1)} if margins.shape[-1] > 1 else {})


def pair_rewards(model: Model, params: Params, rows: Rows) -> jax.Array:
  """Computes the rewards [B, P, 2] of the chosen and the rejected side, of an ensemble their mean; 0 for no pair."""
  return head_rewards(model, params, rows, 2).mean(axis=-1)


def head_rewards(model: Model, params: Params, rows: Rows, sides: int) -> jax.Array:
  """Computes the rewards [B, P, sides, heads] of the sides of each example; 0 where there is none."""
  return segment.by_example(last_states(model, params, rows, sides)[1], sides)


def last_states(model: Model, params: Params, rows: Rows, sides: int) -> tuple[jax.Array, jax.Array]:
  """Computes the last token's state [B, S, D] of each row's S texts and their rewards [B, S, heads].

  A text that the row does not have gets 0.

  Args:
    model, params: of a reward model; the parameters have an entry "score".
    rows: with P examples each.
    sides: S / P, texts of an example.
  """
  ids = segments(rows, sides)
  hidden, _ = model.forward(params, rows["tokens"], ids, rows["positions"])

  def last(x):
    return heads.last_token_score(x, rows["segment_ids"], ids.most)

  return last(hidden.astype(jnp.float32)), last(heads.head_scores(params, hidden))


def poisson_weights(record_ids: jax.Array, num_heads: int) -> jax.Array:
  """Draws how often each head of an ensemble counts each record, float32 [..., heads] of mean 1: an online bootstrap.

  The draws are Poisson(1); each depends on record id and head only, not on batch or run.
  """

  def draw(record):
    return jax.random.uniform(jax.random.fold_in(jax.random.key(0), record), (num_heads,))

  uniform = jax.vmap(draw)(record_ids.reshape(-1)).reshape(*record_ids.shape, num_heads)
  shares = jnp.exp(-1.0) / jnp.cumprod(jnp.maximum(jnp.arange(9.0), 1))  # of 0, 1, ... 8 times
  return (uniform[..., None] > jnp.cumsum(shares)).sum(axis=-1).astype(jnp.float32)


RECIPE = Recipe(
  options=RewardOptions,
  family=Family({"bradley_terry": bradley_terry, "plackett_luce": plackett_luce}),
  make=make,
  records=records,
  head="scalar",
  traced=(RewardTraced,),
  check=check,
)
