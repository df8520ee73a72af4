"""A Bradley-Terry reward model: a decoder with a scalar head, read at the last token of each side."""

import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, one_of
from alignjax.losses.reward import bradley_terry
from alignjax.model import heads
from alignjax.model.decoder import Model

HEAD = "scalar"
LOSSES = {f.__name__: f for f in (bradley_terry,)}
OPTIONS: dict[str, object] = {}


def data(loss: str = "") -> str:
  """The kind of records."""
  del loss
  return "preference"


def hparams(loss: str = "") -> dict[str, float]:
  """See losses.reward.bradley_terry.

  Raises:
    InputError: an unknown loss.
  """
  one_of("loss", loss or "bradley_terry", LOSSES)
  return {"center_coefficient": 0.01}


def make(model: Model, loss: str = "", microbatches: int = 1) -> Algorithm:
  """Reward modelling with `model`, whose config has head="scalar", and one of `LOSSES`."""
  del microbatches  # prepare only counts
  pair_loss = LOSSES[loss or "bradley_terry"]

  def prepare(frozen, batch, key):
    del frozen, key
    return batch | {"num_examples": jnp.maximum(batch["weights"].sum(), 1.0)}

  def loss_fn(params, batch, hparams):
    rewards = pair_rewards(model, params, batch)
    chosen, rejected = rewards[..., 0], rewards[..., 1]
    losses = pair_loss(
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

  return Algorithm(prepare, loss_fn, count="num_examples")


def pair_rewards(model: Model, params, batch):
  """Rewards [B, P, 2] of the chosen and the rejected side; 0 where there is no pair."""
  hidden, _ = model.forward(params, batch["tokens"], batch["segment_ids"], batch["positions"])
  B, P = batch["example_mask"].shape
  scores = heads.last_token_score(heads.score(params, hidden), batch["segment_ids"], 2 * P)
  return scores.reshape(B, P, 2)
