"""Group-relative policy optimisation and its family: no critic, a completion is measured against its prompt's others.

One iteration: every prompt gets `num_generations` completions, rewards score them, and the advantage of each is how
much better it is than its group. `algorithm.loss` names the member of the family (losses/policy.py), `advantages` the
baseline (losses/advantages.py): RLOO is loss=rloo with advantages=rloo, REINFORCE++ loss=ppo with reinforce++.

Source: Shao et al. 2024 (arXiv:2402.03300); of each loss, see its docstring
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from alignjax.algorithms import policy_update, rollout
from alignjax.algorithms.algorithm import Algorithm, Parts, Passes, Recipe, one_of
from alignjax.algorithms.policy_update import Bounds, PassesOptions, PassesTraced
from alignjax.algorithms.rollout import completion_scores
from alignjax.losses import advantages, policy, token_weight
from alignjax.losses.objective import Family, Term
from alignjax.model.decoder import Model
from alignjax.system.microbatch import map_over_microbatches
from alignjax.system.ranges import Count, NonNegative, ShareAboveZero, Whole
from alignjax.types import Batch, HParams

LOSSES = {"grpo": policy.LOSSES["grpo"]} | policy.LOSSES  # the default first
FAMILY = Family(LOSSES, adopt=policy.adopt, argument="tokens")
SCALES = ("group", "batch", "none")  # of the group's mean subtracted: divided by the spread of what
ADVANTAGES = (*SCALES, "rloo", "reinforce++", "gdpo")


@dataclasses.dataclass(frozen=True)
class GrpoOptions(PassesOptions):
  """Static settings of GRPO and its family; `advantages` and `algorithm.loss` are chosen apart, see the module."""

  num_generations: Count = 8
  advantages: str = "group"  # one of ADVANTAGES
  kl_in: str = "none"  # where the KL is paid: "loss", "reward" of the completion (as RLOO), or "none": no reference
  mask_truncated: bool = False  # a completion that did not end by itself is not learned from
  overlong_buffer: Whole = 0  # DAPO: so many last tokens cost up to a reward of 1; 0: none
  only_varied: bool = False  # groups of one reward count for nothing, as in DAPO's dynamic sampling, which draws anew
  top_entropy: ShareAboveZero = 1.0  # the share of tokens, those of the highest entropy, that are learned from


@dataclasses.dataclass(frozen=True)
class GrpoTraced(PassesTraced):
  """Traced hyper-parameters of GRPO and its family."""

  # Worse completions that the policy has left by so many nats a token count for nothing; 0: all do.
  stale_above: Annotated[NonNegative, "0 leaves none out"] = 0.0


def check(terms: tuple[Term, ...], options: GrpoOptions) -> None:
  """Raises InputError where an option is unknown, or has no meaning with another; `terms` is unused."""
  del terms
  one_of("advantages", options.advantages, ADVANTAGES)
  one_of("kl_in", options.kl_in, ("loss", "reward", "none"))
  policy_update.kl_estimator(options.kl_estimator, options.kl_in)
  policy_update.check(options)


def make(model: Model, terms: tuple[Term, ...], options: GrpoOptions, parts: Parts) -> Algorithm:
  """Makes the algorithm that learns by a policy gradient against the mean of each prompt's completions.

  Policy and reference have the model `model`. Neither a KL nor its reference exists with kl_in="none".

  Args:
    terms: the objective; only the first is read.
    options: as `check` accepts them.
    parts: `models` has the reward model and its domain, `special` the tokens that end completions.

  Raises:
    InputError: rewards that cannot be had, a user's loss that fails, or a single completion of each prompt.
  """
  rollout.check(options, compared="a group")
  policy_update.check_own(terms)
  objective = terms[0].objective
  special = parts.special
  models = rollout.models(parts)
  rescores = policy_update.rescores(model.config.dtype, options)

  def sample(trees, batch, key):
    return rollout.sample(model, trees.policy, batch, key, trees.hparams, special, options)

  def prepare(trees, batch, key):
    del key
    hp = trees.hparams

    def look(part):
      columns = rollout.score(models, trees, part, special, options)
      if options.kl_in != "none":
        columns["reference_logps"] = completion_scores(model, trees.reference, part, hp, special, options)[0].logps
      if rescores or options.top_entropy < 1:
        columns["rescored"] = completion_scores(model, trees.policy, part, hp, special, options, entropy=True)[0]
      return columns

    pieces = policy_update.parts_of(batch, parts.microbatches, options.minibatches) if rescores else parts.microbatches
    batch = batch | map_over_microbatches(look, batch, pieces)
    rescored = batch.pop("rescored", None)
    if rescores:
      batch = policy_update.settle(batch, rescored, model.config, hp, options)
    if options.kl_in != "none":
      batch["kl"] = jnp.sum((batch["old_logps"] - batch["reference_logps"]) * batch["loss_mask"], axis=1)
    batch["scores"] = shaped_scores(batch, hp, options)

    def grouped(x):
      return x.reshape(-1, options.num_generations)

    weights = grouped(batch["weights"])
    varied = advantages.varied(jnp.where(weights > 0, grouped(batch["raw_scores"]), jnp.nan))[:, None]
    if options.only_varied:  # the others leave every mean, as if they had not been drawn
      weights = weights * varied
    rewards = jnp.where(weights > 0, grouped(batch["scores"]), jnp.nan)
    better_by = relative(rewards, batch, options, weights).reshape(-1)
    batch["weights"] = weights.reshape(-1, 1)
    mask = batch["loss_mask"] * (batch["weights"] > 0)
    if options.mask_truncated:
      mask = advantages.finished_only(mask, batch["finished"])
    batch |= {
      "loss_mask": mask,
      "advantages": better_by[:, None] * mask,
      "same_reward": jnp.broadcast_to(1.0 - varied, weights.shape).reshape(-1),
      "told": (better_by != 0).astype(jnp.float32),
    }
    if options.top_entropy < 1:
      batch["kept"] = token_weight.top_entropy(rescored.entropy, mask, share=options.top_entropy)
    return batch

  def loss_fn(params, batch, hp):
    scores, _ = completion_scores(model, params, batch, hp, special, options, entropy=True, entropy_gradient=True)
    total, metrics = policy_update.policy_loss(objective, scores, batch, hp, options)
    metrics |= policy_update.metrics(batch) | {"loss/policy": total}
    metrics |= policy_update.scored_means({"frac_reward_zero_std": batch["same_reward"]}, batch)
    total -= hp["entropy_coef"] * policy_update.entropy(scores, batch)
    if "kl" in batch:
      metrics |= policy_update.scored_means({"objective/kl": batch["kl"]}, batch)
    if options.kl_in == "loss":
      total += hp["kl_coef"] * policy_update.kl_loss(scores, objective, batch, options)
    return total, metrics

  tolerated = policy_update.tolerated(model.config.dtype, options, options)
  return Algorithm(
    prepare,
    loss_fn,
    count="num_scored",  # not the examples: of those, only_varied leaves some out
    reads=(*(["reference"] if options.kl_in != "none" else []), *models),
    reads_policy=True,
    models=models,
    finish=functools.partial(policy_update.finish, tolerated=tolerated),
    rollout=sample,
    counts=policy_update.counts,
    passes=Passes(options.epochs, options.minibatches, ("policy/approxkl", "target_kl"), policy_update.FIRST),
  )


def shaped_scores(batch: Batch, hparams: HParams, options: GrpoOptions) -> jax.Array:
  """Returns scores [B] less the penalty of length and the KL, where these are paid, to make advantages of.

  Args:
    batch: as scored, with "kl" [B] (nats a completion) if options.kl_in is "reward".
    hparams: `kl_coef` is read, if the KL is paid here.
    options: `overlong_buffer`, `max_new_tokens` and `kl_in` are read.
  """
  scores = batch["scores"]
  if options.overlong_buffer:
    lengths = batch["loss_mask"].sum(axis=1)
    scores += advantages.overlong_penalty(lengths, max_length=options.max_new_tokens, buffer=options.overlong_buffer)
  if options.kl_in == "reward":
    scores -= hparams["kl_coef"] * batch["kl"]  # the sum of k1 over the completion
  return scores


def relative(
  rewards: jax.Array, batch: Batch, options: GrpoOptions, example_weights: jax.Array | None = None
) -> jax.Array:
  """Computes the advantages [P, G] of shaped scores [P, G], as the option `advantages` selects.

  Args:
    rewards: [P, G], of P prompts; NaN where there is none, whose advantage is 0.
    batch: with "reward/NAME" [P * G] of each reward that has a weight; only read for "gdpo".
    options: `advantages` and `rewards` are read.
    example_weights: [P, G], of the records, by which statistics of the whole batch are taken; None: all are equal.
  """
  if options.advantages in SCALES:
    return advantages.group_advantages(rewards, scale=options.advantages, weights=example_weights)
  if options.advantages == "rloo":
    return advantages.rloo_advantages(rewards)
  if options.advantages == "reinforce++":
    return advantages.reinforce_plus_plus_advantages(rewards, weights=example_weights)
  weights = {name: weight for name, weight in rollout.weights(options).items() if weight}
  each = jnp.stack([batch[f"reward/{name}"].reshape(rewards.shape) for name in weights], axis=-1)
  return advantages.gdpo_advantages(
    each, jnp.array(list(weights.values())), shaped=rewards, example_weights=example_weights
  )


RECIPE = Recipe(
  options=GrpoOptions,
  family=FAMILY,
  make=make,
  records=lambda terms, options: "prompt",
  traced=(GrpoTraced, Bounds),
  more_traced=lambda terms, options: policy_update.bounds(options),
  check=check,
  models=rollout.MODELS,
  online=True,
)
