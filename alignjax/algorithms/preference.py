"""Direct preference optimisation: a policy, a frozen reference, and one of `losses.preference.LOSSES`."""

import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm
from alignjax.losses.logps import next_token_logps, segment_sum
from alignjax.losses.preference import LOSSES, Pair
from alignjax.model.decoder import Model
from alignjax.train_step import map_over_microbatches

DATA = "preference"
HEAD = "none"
HPARAMS = {"beta": 0.1, "label_smoothing": 0.0}


def make(model: Model, loss: str = "", microbatches: int = 1) -> Algorithm:
  """Preference optimisation of `model` with the loss of that name.

  Args:
    model: policy and reference alike.
    loss: a name of `LOSSES`; "dpo" if empty.
    microbatches: the reference scores the rows in so many parts, as the step does.
  """
  pair_loss = LOSSES[loss or "dpo"]

  def prepare(frozen, batch, key):
    del key
    score = lambda part: pair_logps(model, frozen["reference"], part)
    return batch | {
      "reference_logps": map_over_microbatches(score, batch, microbatches),
      "num_examples": jnp.maximum(batch["weights"].sum(), 1.0),
    }

  def loss_fn(params, batch, hparams):
    logps, reference_logps = pair_logps(model, params, batch), batch["reference_logps"]
    chosen, rejected = logps[..., 0], logps[..., 1]
    pair = Pair(chosen, rejected, reference_logps[..., 0], reference_logps[..., 1])
    losses = pair_loss(pair, beta=hparams["beta"], label_smoothing=hparams["label_smoothing"])
    weights = batch["weights"] / batch["num_examples"]
    mean = lambda x: jnp.sum(weights * x)
    chosen_rewards = hparams["beta"] * (pair.chosen - pair.reference_chosen)
    rejected_rewards = hparams["beta"] * (pair.rejected - pair.reference_rejected)
    return mean(losses), {
      "rewards/chosen": mean(chosen_rewards),
      "rewards/rejected": mean(rejected_rewards),
      "rewards/margins": mean(chosen_rewards - rejected_rewards),
      "rewards/accuracies": mean(chosen_rewards > rejected_rewards),  # a tie counts as wrong
      "logps/chosen": mean(chosen),
      "logps/rejected": mean(rejected),
    }

  return Algorithm(prepare, loss_fn, count="num_examples", frozen=("reference",))


def pair_logps(model: Model, params, batch):
  """Summed log-probabilities of the completions, [B, P, 2] in nats: chosen, rejected; 0 where there is no pair."""
  hidden, _ = model.forward(params, batch["tokens"], batch["segment_ids"], batch["positions"])
  token_logps = next_token_logps(hidden, model.unembedding(params), batch["tokens"])
  B, P = batch["example_mask"].shape
  logps = segment_sum(token_logps * batch["loss_mask"], batch["segment_ids"], 2 * P)
  return logps.reshape(B, P, 2)
