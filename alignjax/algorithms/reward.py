"""A Bradley-Terry reward model: a decoder with a scalar head, read at the last token of each side.

With `model.score_heads` > 1 it is an ensemble on one trunk. Its heads differ by where they begin and by what they see:
head k takes record i into account as often as a Poisson(1) draw that belongs to (i, k) says, which is the bootstrap
for a stream. Rewards and their metrics are the mean's; `rewards/disagreement` is the spread, over heads, of a pair's
margin: of the reward itself it would hold the offset that the likelihood leaves free. Heads that share a trunk agree
more than whole models would: a disagreement warns, an agreement proves little.

Source: Coste et al. 2024 (arXiv:2310.02743); the bootstrap: Oza and Russell 2001
"""

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, one_of
from alignjax.losses.reward import bradley_terry
from alignjax.model import heads
from alignjax.model.decoder import Model

HEAD = "scalar"
LOSSES = {f.__name__: f for f in (bradley_terry,)}
OPTIONS = {"bootstrap": "poisson"}  # which pairs a head of an ensemble learns from; "none": each from all
BOOTSTRAPS = ("poisson", "none")


def data(loss: str = "", bootstrap: str = "poisson") -> str:
  """The kind of records."""
  del loss, bootstrap
  return "preference"


def hparams(loss: str = "", bootstrap: str = "poisson") -> dict[str, float]:
  """See losses.reward.bradley_terry.

  Raises:
    InputError: an unknown loss or bootstrap.
  """
  one_of("loss", loss or "bradley_terry", LOSSES)
  one_of("bootstrap", bootstrap, BOOTSTRAPS)
  return {"center_coefficient": 0.01}


def make(model: Model, loss: str = "", microbatches: int = 1, bootstrap: str = "poisson") -> Algorithm:
  """Reward modelling with `model`, whose config has head="scalar", and one of `LOSSES`; options as in `OPTIONS`."""
  del microbatches  # prepare only counts
  pair_loss = LOSSES[loss or "bradley_terry"]
  num_heads = model.config.score_heads

  def prepare(frozen, batch, key):
    del frozen, key
    if num_heads > 1 and bootstrap == "poisson":
      batch = batch | {"head_weights": poisson_weights(batch["record_ids"], num_heads)}
    return batch | {"num_examples": jnp.maximum(batch["weights"].sum(), 1.0)}

  def loss_fn(params, batch, hparams):
    rewards = head_rewards(model, params, batch)
    losses = pair_loss(
      rewards[..., 0, :],
      rewards[..., 1, :],
      margin=batch["margins"][..., None],
      center_coefficient=hparams["center_coefficient"],
    )
    losses = (losses * batch.get("head_weights", 1.0)).mean(axis=-1)
    weights = batch["weights"] / batch["num_examples"]
    mean = lambda x: jnp.sum(weights * x)
    return mean(losses), {name: mean(x) for name, x in pair_metrics(rewards).items()}

  return Algorithm(prepare, loss_fn, count="num_examples")


def pair_metrics(rewards: jax.Array) -> dict[str, jax.Array]:
  """Metrics [B, P] of pairs from rewards [B, P, 2, heads]."""
  chosen, rejected = rewards.mean(axis=-1)[..., 0], rewards.mean(axis=-1)[..., 1]
  metrics = {
    "rewards/chosen": chosen,
    "rewards/rejected": rejected,
    "rewards/margins": chosen - rejected,
    "rewards/accuracies": chosen > rejected,  # a tie counts as wrong
  }
  if rewards.shape[-1] > 1:
    margins = rewards[..., 0, :] - rewards[..., 1, :]
    metrics |= {
      "rewards/head_accuracies": (margins > 0).mean(axis=-1),  # of one head, on average
      "rewards/disagreement": margins.std(axis=-1),
    }
  return metrics


def pair_rewards(model: Model, params, batch):
  """Rewards [B, P, 2] of the chosen and the rejected side, of an ensemble their mean; 0 where there is no pair."""
  return head_rewards(model, params, batch).mean(axis=-1)


def head_rewards(model: Model, params, batch):
  """Rewards [B, P, 2, heads] of the chosen and the rejected side; 0 where there is no pair."""
  hidden, _ = model.forward(params, batch["tokens"], batch["segment_ids"], batch["positions"])
  B, P = batch["example_mask"].shape
  scores = heads.last_token_score(heads.head_scores(params, hidden), batch["segment_ids"], 2 * P)
  return scores.reshape(B, P, 2, -1)


def poisson_weights(record_ids: jax.Array, num_heads: int) -> jax.Array:
  """How often each head sees a record, [..., heads] of mean 1: a draw that belongs to the two, whatever their batch."""
  draw = lambda record: jax.random.uniform(jax.random.fold_in(jax.random.key(0), record), (num_heads,))
  uniform = jax.vmap(draw)(record_ids.reshape(-1)).reshape(*record_ids.shape, num_heads)
  shares = jnp.exp(-1.0) / jnp.cumprod(jnp.maximum(jnp.arange(9.0), 1))  # of 0, 1, ... 8 times
  return (uniform[..., None] > jnp.cumsum(shares)).sum(axis=-1).astype(jnp.float32)
