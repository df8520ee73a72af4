"""Group-relative policy optimisation and its family: no critic, a completion is measured against its prompt's others.

One iteration: every prompt gets `num_generations` completions, rewards score them, and the advantage of each is how
much better it is than its group. `algorithm.loss` names the member of the family (losses/policy.py), `advantages` the
baseline (losses/advantages.py): RLOO is loss=rloo with advantages=rloo, REINFORCE++ loss=ppo with reinforce++.

Source: Shao et al. 2024 (arXiv:2402.03300); of each loss, see its docstring
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated

import flax.struct
import jax
import jax.numpy as jnp

from alignjax.algorithms import policy_update, rollout
from alignjax.algorithms.algorithm import Algorithm, Parts, Passes, one_of
from alignjax.algorithms.online_rows import Learned, Outcome, Rollout
from alignjax.algorithms.policy_update import Bounds, PassesOptions, PassesTraced, Settled
from alignjax.algorithms.rollout import completion_scores
from alignjax.losses import advantages, policy, token_weight
from alignjax.losses.objective import Family, Term
from alignjax.model.decoder import Model
from alignjax.system.microbatch import map_over_microbatches
from alignjax.system.ranges import Count, NonNegative, ShareAboveZero, Whole
from alignjax.types import HParams

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


@flax.struct.dataclass(kw_only=True)
class GroupRows(Learned):
  """Rows of completions whose advantages are over their prompt's others.

  Attributes:
    same_reward: [B], 1 where all of the prompt's completions have the same rewards.
    kl: [B], of the completion, from the reference, in nats; None without a reference.
  """

  same_reward: jax.Array
  kl: jax.Array | None = None


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
      """Returns the outcome of rows, the reference's log-probs, and the trainer's scores: None where not asked for."""
      outcome = rollout.score(models, trees, part, special, options)
      reference_logps = own = None
      if options.kl_in != "none":
        reference_logps = completion_scores(model, trees.reference, part.texts, hp, special, options)[0].logps
      if rescores or options.top_entropy < 1:
        own, _ = completion_scores(model, trees.policy, part.texts, hp, special, options, entropy=True)
      return outcome, reference_logps, own

    pieces = parts.microbatches
    if rescores:
      pieces = policy_update.parts_of(batch.size, pieces, options.minibatches)
    outcome, reference_logps, own = map_over_microbatches(look, batch.rows, pieces)
    sampled = batch.rows.counting(outcome.weights)
    settled = Settled(sampled.logps)
    if rescores:
      settled = policy_update.settle(sampled, own, model.config, hp, options)
    rows = learned_rows(sampled, outcome, settled, reference_logps, hp, options)
    if options.top_entropy < 1:
      kept = token_weight.top_entropy(own.entropy, rows.texts["loss_mask"], share=options.top_entropy)
      rows = rows.replace(kept=kept)
    return batch.replace(rows=rows).updated(totals=settled.totals)

  def loss_fn(params, batch, hp):
    rows: GroupRows = batch.rows
    scores, _ = completion_scores(model, params, rows.texts, hp, special, options, entropy=True, entropy_gradient=True)
    total, metrics = policy_update.policy_loss(objective, scores, batch, hp, options)
    metrics |= policy_update.metrics(batch) | {"loss/policy": total}
    metrics |= policy_update.scored_means({"frac_reward_zero_std": rows.same_reward}, batch)
    total -= hp["entropy_coef"] * policy_update.entropy(scores, batch)
    if rows.kl is not None:
      metrics |= policy_update.scored_means({"objective/kl": rows.kl}, batch)
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


def learned_rows(
  sampled: Rollout,
  outcome: Outcome,
  settled: Settled,
  reference_logps: jax.Array | None,
  hparams: HParams,
  options: GrpoOptions,
) -> GroupRows:
  """Returns the rows to learn from, with their advantages: all that follows what the models say of them.

  Args:
    sampled: counting as the outcome says.
    outcome: of the completions; its scores are then shaped.
    settled: the old log-probs.
    reference_logps: [B, T]; None without a reference.
    hparams: as for `shaped_scores`.
    options: of the algorithm.
  """
  kl = None
  if reference_logps is not None:
    kl = jnp.sum((settled.old_logps - reference_logps) * sampled.texts["loss_mask"], axis=1)
  shaped = shaped_scores(outcome.scores, sampled.texts["loss_mask"], kl, hparams, options)
  outcome = dataclasses.replace(outcome, scores=shaped)

  def grouped(x):
    return x.reshape(-1, options.num_generations)

  weights = grouped(outcome.weights)
  varied = advantages.varied(jnp.where(weights > 0, grouped(outcome.raw_scores), jnp.nan))[:, None]
  if options.only_varied:  # the others leave every mean, as if they had not been drawn
    weights = weights * varied
  rewards = jnp.where(weights > 0, grouped(outcome.scores), jnp.nan)
  better_by = relative(rewards, outcome.each, options, weights).reshape(-1)
  texts = sampled.counting(weights.reshape(-1)).texts
  if options.mask_truncated:
    texts |= {"loss_mask": advantages.finished_only(texts["loss_mask"], sampled.finished)}
  return GroupRows(
    texts=texts,
    outcome=outcome,
    told=(better_by != 0).astype(jnp.float32),
    sampler_logps=sampled.logps,
    old_logps=settled.old_logps,
    reference_logps=reference_logps,
    advantages=better_by[:, None] * texts["loss_mask"],
    correction=settled.correction,
    same_reward=jnp.broadcast_to(1.0 - varied, weights.shape).reshape(-1),
    kl=kl,
  )


def shaped_scores(
  scores: jax.Array, mask: jax.Array, kl: jax.Array | None, hparams: HParams, options: GrpoOptions
) -> jax.Array:
  """Returns scores [B] less the penalty of length and the KL, where these are paid, to make advantages of.

  Args:
    scores: [B], of `Outcome`.
    mask: [B, T], of the completions.
    kl: [B], nats a completion; read if options.kl_in is "reward".
    hparams: `kl_coef` is read, if the KL is paid here.
    options: `overlong_buffer`, `max_new_tokens` and `kl_in` are read.
  """
  if options.overlong_buffer:
    lengths = mask.sum(axis=1)
    scores += advantages.overlong_penalty(lengths, max_length=options.max_new_tokens, buffer=options.overlong_buffer)
  if options.kl_in == "reward":
    scores -= hparams["kl_coef"] * kl  # the sum of k1 over the completion
  return scores


def relative(
  rewards: jax.Array, each: Mapping[str, jax.Array], options: GrpoOptions, example_weights: jax.Array | None = None
) -> jax.Array:
  """Computes the advantages [P, G] of shaped scores [P, G], as the option `advantages` selects.

  Args:
    rewards: [P, G], of P prompts; NaN where there is none, whose advantage is 0.
    each: [P * G] of each reward by name, those that have a weight; only read for "gdpo".
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
  stacked = jnp.stack([each[name].reshape(rewards.shape) for name in weights], axis=-1)
  return advantages.gdpo_advantages(
    stacked, jnp.array(list(weights.values())), shaped=rewards, example_weights=example_weights
  )


RECIPE = rollout.recipe(
  options=GrpoOptions,
  family=FAMILY,
  make=make,
  traced=(GrpoTraced, Bounds),
  more_traced=lambda terms, options: policy_update.bounds(options),
  check=check,
)
