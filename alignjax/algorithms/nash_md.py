"""Nash-MD: the policy plays against the geometric mixture of itself and the reference, and learns from who wins.

One iteration: every prompt gets `num_generations` completions, the last of them from the mixture; the others win
against it with the probability that a Bradley-Terry judge gives, sigmoid of the difference of their scores.

Source: Munos et al. 2023 (arXiv:2312.00886)
"""

import functools

import jax
import jax.numpy as jnp

from alignjax.algorithms import policy_update, rollout
from alignjax.algorithms.algorithm import Algorithm, keywords, one_of
from alignjax.algorithms.rollout import ENDLESS, Special, completion_scores
from alignjax.errors import InputError
from alignjax.losses.online_preference import nash_md
from alignjax.model import mixture
from alignjax.model.decoder import Model
from alignjax.system import ranges
from alignjax.system.microbatch import map_over_microbatches
from alignjax.system.ranges import Share
from alignjax.types import Batch

HEAD = "none"
LOSSES = {"nash_md": nash_md}
MODELS = rollout.MODELS
OPTIONS = rollout.OPTIONS | {"num_generations": 2}  # of each prompt; the last is the mixture's
HPARAMS = rollout.HPARAMS | keywords(nash_md) | {"mixture_coef": 0.5}  # the reference's share in the exponent
RANGES = rollout.RANGES | {"mixture_coef": Share}


def data(loss: str = "", **options) -> str:
  """The kind of records."""
  del loss, options
  return "prompt"


def hparams(loss: str = "", **options) -> dict[str, float]:
  """The traced hyper-parameters.

  Raises:
    InputError: an unknown loss, or a number out of range.
  """
  ranges.check_all("algorithm", options, RANGES)
  one_of("loss", loss or "nash_md", LOSSES)
  return dict(HPARAMS)


def make(model: Model, loss: str = "", microbatches: int = 1, special: Special = ENDLESS, **options) -> Algorithm:
  """Nash-MD of `model` against its mixture with the reference.

  Args:
    model: policy and reference alike.
    loss: "nash_md", which "" means.
    microbatches: what needs no gradient takes the rows in so many parts, as the step does.
    special: token ids of the sampler.
    **options: see `OPTIONS`; "reward_model" is its Model, and "domain" too.

  Raises:
    InputError: as `hparams`, or rewards that can not be had.
  """
  hparams(loss, **options)
  o = OPTIONS | options
  rollout.check(o, compared="a game")
  if cap := model.config.final_softcap:
    raise InputError(f"model.final_softcap={cap}: squashed logits have no mixture that is a model; take another")
  models = rollout.models(o)
  mixed = mixture.mix(model)
  o |= policy_update.OPTIONS  # there is no ratio: the policy's scores are compared with the sampler's alone
  rescores = policy_update.rescores(model.config.dtype, o)

  def sample(frozen, batch, key):
    hp = frozen["hparams"]
    other = {"policy": frozen["policy"], "reference": frozen["reference"], "coef": hp["mixture_coef"]}
    return rollout.sample_against((model, frozen["policy"]), (mixed, other), batch, key, hp, special, o)

  def prepare(frozen, batch, key):
    del key

    def look(part):
      reference, _ = completion_scores(model, frozen["reference"], part, frozen["hparams"], special, o)
      found = {"reference_logps": reference.logps} | rollout.judge(models, frozen, part, special, o)
      if rescores:
        found["own"] = completion_scores(model, frozen["policy"], part, frozen["hparams"], special, o, entropy=True)[0]
      return found

    batch = batch | map_over_microbatches(look, batch, microbatches)
    own = batch.pop("own", None)
    batch = play(batch, o["num_generations"])
    if rescores:
      batch = policy_update.settle(batch, own, model.config, frozen["hparams"], o)
    return batch | policy_update.counts(batch)

  def loss_fn(params, batch, hp):
    scores, _ = completion_scores(model, params, batch, hp, special, o, entropy=True)
    mask = batch["loss_mask"]
    losses = nash_md(scores.logps, batch["reference_logps"], mask, batch["preferred"], beta=hp["beta"])
    mean = functools.partial(policy_update.row_mean, batch=batch)
    kl = jnp.sum((batch["old_logps"] - batch["reference_logps"]) * mask, axis=1)
    known = policy_update.judged_means({"objective/kl": kl, "rewards/probabilities": batch["preferred"]}, batch)
    return mean(losses), policy_update.metrics(batch) | policy_update.sampler_metrics(scores, batch) | known

  return Algorithm(
    prepare,
    loss_fn,
    count="num_examples",
    frozen=("reference", "policy", "hparams", *models),
    models=models,
    finish=functools.partial(policy_update.finish, tolerated=policy_update.tolerated(model.config.dtype, o)),
    rollout=sample,
  )


def play(batch: Batch, group: int) -> Batch:
  """A batch with `preferred` [B], the probability that a completion beats its prompt's last one.

  Nothing is learned from the last ones, nor where either side has no score: their weights, masks and example masks
  become 0.
  """
  last = lambda x: jnp.repeat(x.reshape(-1, group)[:, -1], group)
  own = 1 - batch["from_other"]
  counts = (own * last(batch["weights"][:, 0] > 0))[:, None]
  weights = batch["weights"] * counts
  better = batch["scores"] - last(batch["scores"])
  return batch | {
    "preferred": jax.nn.sigmoid(better),
    "told": (better != 0).astype(jnp.float32),
    "weights": weights,
    "judged": weights[:, 0],
    "prompted": batch.get("prompted", batch["example_mask"][:, 0]) * own,
    "loss_mask": batch["loss_mask"] * counts * (batch["weights"] > 0),
    "example_mask": batch["example_mask"] * own[:, None],
  }
