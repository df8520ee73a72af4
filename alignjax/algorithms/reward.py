"""A reward model of pairs or rankings: a decoder with a scalar head, read at the last token of each side."""

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, one_of
from alignjax.losses.reward import bradley_terry, plackett_luce
from alignjax.model import heads
from alignjax.model.decoder import Model
from alignjax.types import Batch, HParams, Metrics, Params

HEAD = "scalar"
LOSSES = {f.__name__: f for f in (bradley_terry, plackett_luce)}
OPTIONS: dict[str, object] = {}


def data(loss: str = "") -> str:
  """The kind of records: rankings for `plackett_luce`, else pairs."""
  return "ranked" if loss == "plackett_luce" else "preference"


def hparams(loss: str = "") -> dict[str, float]:
  """See losses.reward.

  Raises:
    InputError: an unknown loss.
  """
  one_of("loss", loss or "bradley_terry", LOSSES)
  return {"center_coefficient": 0.01}


def make(model: Model, loss: str = "", microbatches: int = 1) -> Algorithm:
  """Reward modelling with `model`, whose config has head="scalar", and one of `LOSSES`."""
  del microbatches  # prepare only counts
  ranked = data(loss) == "ranked"
  objective = of_rankings if ranked else of_pairs

  def prepare(frozen, batch, key):
    del frozen, key
    return batch | {"num_examples": jnp.maximum(batch["weights"].sum(), 1.0)}

  def loss_fn(params, batch, hparams):
    sides = batch["ranks"].shape[-1] if ranked else 2
    return objective(side_rewards(model, params, batch, sides), batch, hparams)

  return Algorithm(prepare, loss_fn, count="num_examples", **({"finish": per_comparison} if ranked else {}))


def of_pairs(rewards: jax.Array, batch: Batch, hparams: HParams) -> tuple[jax.Array, Metrics]:
  """Loss and metrics of rewards [B, P, 2] by `bradley_terry`."""
  chosen, rejected = rewards[..., 0], rewards[..., 1]
  losses = bradley_terry(
    chosen,
    rejected,
    margin=batch["margins"],
    center_coefficient=hparams["center_coefficient"],
  )
  weights = batch["weights"] / batch["num_examples"]
  mean = lambda x: jnp.sum(weights * x)
  return mean(losses), {
    "rewards/chosen": mean(chosen),
    "rewards/rejected": mean(rejected),
    "rewards/margins": mean(chosen - rejected),
    "rewards/accuracies": mean(chosen > rejected),  # a tie counts as wrong
  }


def of_rankings(rewards: jax.Array, batch: Batch, hparams: HParams) -> tuple[jax.Array, Metrics]:
  """Loss and metrics of rewards [B, P, K] by `plackett_luce`; chosen are the best of a ranking, rejected the worst.

  Accuracy is over all comparisons, two responses of different rank: `per_comparison` divides by their number.
  """
  ranks = batch["ranks"]
  losses = plackett_luce(rewards, ranks, center_coefficient=hparams["center_coefficient"])
  over = lambda which: jnp.sum(jnp.where(which, rewards, 0), axis=-1) / jnp.maximum(which.sum(axis=-1), 1)
  best, worst = ((ranks == f(ranks, axis=-1, keepdims=True)) & (ranks > 0) for f in (_least, jnp.max))
  better = (ranks[..., :, None] < ranks[..., None, :]) & (ranks[..., :, None] > 0)
  right = better & (rewards[..., :, None] > rewards[..., None, :])
  weights = batch["weights"] / batch["num_examples"]
  mean = lambda x: jnp.sum(weights * x)
  return mean(losses), {
    "rewards/chosen": mean(over(best)),
    "rewards/rejected": mean(over(worst)),
    "rewards/margins": mean(over(best) - over(worst)),
    "comparisons": mean(better.sum(axis=(-1, -2))),
    "part/rewards/accuracies": mean(right.sum(axis=(-1, -2))),  # a tie of rewards counts as wrong
  }


def _least(ranks, **axes):
  return jnp.min(jnp.where(ranks > 0, ranks, jnp.inf), **axes)


def per_comparison(metrics: dict[str, float]) -> dict[str, float]:
  """Metrics with the accuracy of a comparison in place of the number of right ones per ranking; all ties have none."""
  out = {name: value for name, value in metrics.items() if not name.startswith("part/")}
  if out["comparisons"]:
    out["rewards/accuracies"] = metrics["part/rewards/accuracies"] / out["comparisons"]
  return out


def side_rewards(model: Model, params: Params, batch: Batch, sides: int) -> jax.Array:
  """Rewards [B, P, sides] of the sides of each example; 0 where there is none."""
  hidden, _ = model.forward(params, batch["tokens"], batch["segment_ids"], batch["positions"])
  B, P = batch["example_mask"].shape
  scores = heads.last_token_score(heads.score(params, hidden), batch["segment_ids"], sides * P)
  return scores.reshape(B, P, sides)


def pair_rewards(model: Model, params: Params, batch: Batch) -> jax.Array:
  """Rewards [B, P, 2] of the chosen and the rejected side; 0 where there is no pair."""
  return side_rewards(model, params, batch, 2)
