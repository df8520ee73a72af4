"""Group-relative policy optimisation and its family: no critic, a completion is measured against its prompt's others.

One iteration: every prompt gets `num_generations` completions, rewards score them, and the advantage of each is how
much better it is than its group. `algorithm.loss` names the member of the family (losses/policy.py), `advantages` the
baseline (losses/advantages.py): RLOO is loss=rloo with advantages=rloo, REINFORCE++ loss=ppo with reinforce++.

Source: Shao et al. 2024 (arXiv:2402.03300); of each loss, see its docstring
"""

import functools
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from alignjax.algorithms import policy_update, rollout
from alignjax.algorithms.algorithm import Algorithm, Passes, keywords, one_of
from alignjax.algorithms.rollout import ENDLESS, Special, completion_scores
from alignjax.losses import advantages, policy, token_weight
from alignjax.model.decoder import Model
from alignjax.system import ranges
from alignjax.system.microbatch import map_over_microbatches
from alignjax.system.ranges import NonNegative, ShareAboveZero, Whole
from alignjax.types import Batch, HParams

HEAD = "none"
LOSSES = {"grpo": policy.LOSSES["grpo"]} | policy.LOSSES  # the default first
MODELS = rollout.MODELS
SCALES = ("group", "batch", "none")  # of the group's mean subtracted: divided by the spread of what
ADVANTAGES = (*SCALES, "rloo", "reinforce++", "gdpo")
OPTIONS = rollout.OPTIONS | {
  "num_generations": 8,
  "epochs": 1,  # passes over an iteration's completions
  "minibatches": 1,  # parts of a pass, an optimizer step each
  "advantages": "group",  # one of ADVANTAGES
  "kl_estimator": "",  # of the KL from the reference, one of losses.kl.PLACES; "": that of the place
  "kl_in": "none",  # where it is paid: "loss", "reward" of the completion (as RLOO), or "none": no reference
  "mask_truncated": False,  # a completion that did not end by itself is not learned from
  "overlong_buffer": 0,  # DAPO: so many last tokens cost up to a reward of 1; 0: none
  "only_varied": False,  # groups of one reward count for nothing, as in DAPO's dynamic sampling; none is drawn instead
  "top_entropy": 1.0,  # the share of tokens, those of the highest entropy, that are learned from
  **policy_update.OPTIONS,
}
HPARAMS = rollout.HPARAMS | {
  "kl_coef": 0.04,
  "entropy_coef": 0.0,
  "target_kl": 0.0,  # the iteration ends where a minibatch is this far from the sampler (nats a token); 0: never
  "stale_above": 0.0,  # worse completions that the policy has left by so many nats a token count for nothing; 0: all do
}
RANGES = (
  rollout.RANGES
  | policy_update.RANGES
  | {
    "overlong_buffer": Whole,
    "top_entropy": ShareAboveZero,
    "stale_above": Annotated[NonNegative, "0 leaves none out"],
  }
)


def data(loss: str = "", **options) -> str:
  """The kind of records."""
  del loss, options
  return "prompt"


def hparams(loss: str = "", **options) -> dict[str, float]:
  """The traced hyper-parameters: the loss's keywords, and those of all.

  Raises:
    InputError: an unknown loss, or an option that has no meaning.
  """
  o = OPTIONS | options
  ranges.check_all("algorithm", o, RANGES)
  one_of("loss", loss or "grpo", LOSSES)
  one_of("advantages", o["advantages"], ADVANTAGES)
  one_of("kl_in", o["kl_in"], ("loss", "reward", "none"))
  policy_update.kl_estimator(o)
  policy_update.check(o)
  return HPARAMS | keywords(LOSSES[loss or "grpo"].loss) | policy_update.bounds(o)


def make(model: Model, loss: str = "", microbatches: int = 1, special: Special = ENDLESS, **options) -> Algorithm:
  """A policy gradient of `model` against the mean of each prompt's completions.

  Args:
    model: policy and reference alike.
    loss: a name of `LOSSES`; "grpo" if empty.
    microbatches: what needs no gradient takes the rows in so many parts, as the step does.
    special: token ids of the sampler.
    **options: see `OPTIONS`; "reward_model" is its Model, and "domain" too.

  Raises:
    InputError: as `hparams`, or rewards that can not be had.
  """
  hparams(loss, **options)
  o = OPTIONS | options
  rollout.check(o, compared="a group")
  objective = LOSSES[loss or "grpo"]
  models = rollout.models(o)
  rescores = policy_update.rescores(model.config.dtype, o)

  def sample(frozen, batch, key):
    return rollout.sample(model, frozen["policy"], batch, key, frozen["hparams"], special, o)

  def prepare(frozen, batch, key):
    del key
    hp = frozen["hparams"]

    def look(part):
      found = rollout.judge(models, frozen, part, special, o)
      if o["kl_in"] != "none":
        found["reference_logps"] = completion_scores(model, frozen["reference"], part, hp, special, o)[0].logps
      if rescores or o["top_entropy"] < 1:
        found["own"] = completion_scores(model, frozen["policy"], part, hp, special, o, entropy=True)[0]
      return found

    parts = policy_update.parts_of(batch, microbatches, o["minibatches"]) if rescores else microbatches
    batch = batch | map_over_microbatches(look, batch, parts)
    own = batch.pop("own", None)
    if rescores:
      batch = policy_update.settle(batch, own, model.config, hp, o)
    if o["kl_in"] != "none":
      batch["kl"] = jnp.sum((batch["old_logps"] - batch["reference_logps"]) * batch["loss_mask"], axis=1)
    batch["scores"] = shaped_scores(batch, hp, o)
    grouped = lambda x: x.reshape(-1, o["num_generations"])
    weights = grouped(batch["weights"])
    varied = advantages.varied(jnp.where(weights > 0, grouped(batch["raw_scores"]), jnp.nan))[:, None]
    if o["only_varied"]:  # the others leave every mean, as if they had not been drawn
      weights = weights * varied
    rewards = jnp.where(weights > 0, grouped(batch["scores"]), jnp.nan)
    found = relative(rewards, batch, o, weights).reshape(-1)
    batch["weights"] = weights.reshape(-1, 1)
    mask = batch["loss_mask"] * (batch["weights"] > 0)
    if o["mask_truncated"]:
      mask = advantages.finished_only(mask, batch["finished"])
    batch |= {
      "loss_mask": mask,
      "advantages": found[:, None] * mask,
      "same_reward": jnp.broadcast_to(1.0 - varied, weights.shape).reshape(-1),
      "told": (found != 0).astype(jnp.float32),
    }
    if o["top_entropy"] < 1:
      batch["kept"] = token_weight.top_entropy(own.entropy, mask, share=o["top_entropy"])
    return batch

  def loss_fn(params, batch, hp):
    scores, _ = completion_scores(model, params, batch, hp, special, o, entropy=True, entropy_gradient=True)
    total, metrics = policy_update.policy_loss(objective, scores, batch, hp, o)
    metrics |= policy_update.metrics(batch) | {"loss/policy": total}
    metrics |= policy_update.judged_means({"frac_reward_zero_std": batch["same_reward"]}, batch)
    total -= hp["entropy_coef"] * policy_update.entropy(scores, batch)
    if "kl" in batch:
      metrics |= policy_update.judged_means({"objective/kl": batch["kl"]}, batch)
    if o["kl_in"] == "loss":
      total += hp["kl_coef"] * policy_update.kl_loss(scores, objective, batch, o)
    return total, metrics

  return Algorithm(
    prepare,
    loss_fn,
    count="num_judged",  # not the examples: of those, only_varied leaves some out
    frozen=(*(("reference",) if o["kl_in"] != "none" else ()), "policy", "hparams", *models),
    models=models,
    finish=functools.partial(policy_update.finish, tolerated=policy_update.tolerated(model.config.dtype, o)),
    rollout=sample,
    counts=policy_update.counts,
    passes=Passes(o["epochs"], o["minibatches"], ("policy/approxkl", "target_kl"), policy_update.FIRST),
  )


def shaped_scores(batch: Batch, hparams: HParams, o: Mapping[str, Any]) -> jax.Array:
  """Scores [B] less the penalty of length and the KL, where these are paid: before any advantage is made of them."""
  scores = batch["scores"]
  if o["overlong_buffer"]:
    lengths = batch["loss_mask"].sum(axis=1)
    scores += advantages.overlong_penalty(lengths, max_length=o["max_new_tokens"], buffer=o["overlong_buffer"])
  if o["kl_in"] == "reward":
    scores -= hparams["kl_coef"] * batch["kl"]  # the sum of k1 over the completion
  return scores


def relative(
  rewards: jax.Array, batch: Batch, o: Mapping[str, Any], example_weights: jax.Array | None = None
) -> jax.Array:
  """Advantages [P, G] of shaped scores [P, G], NaN where there is none, by the wish of the options.

  `example_weights` [P, G] are those of the records, by which statistics of the whole batch are taken.
  """
  if o["advantages"] in SCALES:
    return advantages.group_advantages(rewards, scale=o["advantages"], weights=example_weights)
  if o["advantages"] == "rloo":
    return advantages.rloo_advantages(rewards)
  if o["advantages"] == "reinforce++":
    return advantages.reinforce_plus_plus_advantages(rewards, weights=example_weights)
  weights = {name: weight for name, weight in rollout.weights(o).items() if weight}
  each = jnp.stack([batch[f"reward/{name}"].reshape(rewards.shape) for name in weights], axis=-1)
  return advantages.gdpo_advantages(
    each, jnp.array(list(weights.values())), shaped=rewards, example_weights=example_weights
  )
