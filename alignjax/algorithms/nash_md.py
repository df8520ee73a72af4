"""Nash-MD: the policy plays against the geometric mixture of itself and the reference, and learns from who wins.

One iteration: every prompt gets `num_generations` completions, the last of them from the mixture; the others win
against it with the probability that a Bradley-Terry model gives, sigmoid of the difference of their scores.

Source: Munos et al. 2023 (arXiv:2312.00886)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from alignjax.algorithms import policy_update, rollout
from alignjax.algorithms.algorithm import Algorithm, Parts, Recipe
from alignjax.algorithms.policy_update import UpdateOptions
from alignjax.algorithms.rollout import completion_scores
from alignjax.algorithms.sampling_options import SamplingOptions, SamplingTraced
from alignjax.errors import InputError
from alignjax.losses.objective import Family, Term
from alignjax.losses.online_preference import nash_md
from alignjax.model import mixture
from alignjax.model.decoder import Model
from alignjax.system.microbatch import map_over_microbatches
from alignjax.system.ranges import Count, Share
from alignjax.types import Batch

UPDATE = UpdateOptions()  # there is no ratio: the policy's scores are compared with the sampler's alone


@dataclasses.dataclass(frozen=True)
class NashOptions(SamplingOptions):
  """Static settings of Nash-MD."""

  num_generations: Count = 2  # of each prompt; the last is the mixture's


@dataclasses.dataclass(frozen=True)
class NashTraced(SamplingTraced):
  """Traced hyper-parameters of Nash-MD."""

  mixture_coef: Share = 0.5  # the reference's share in the exponent


def make(model: Model, terms: tuple[Term, ...], options: NashOptions, parts: Parts) -> Algorithm:
  """Makes Nash-MD of `model`, policy and reference alike, against its mixture with the reference.

  Args:
    terms: unused; there is one objective.
    parts: `models` has the reward model and its domain, `special` the tokens that end completions.

  Raises:
    InputError: rewards that cannot be had, a single completion of each prompt, or a model whose logits are capped.
  """
  del terms
  rollout.check(options, compared="a game")
  special = parts.special
  if cap := model.config.final_softcap:
    raise InputError(f"model.final_softcap={cap}: squashed logits have no mixture that is a model; take another")
  models = rollout.models(parts)
  mixed = mixture.mix(model)
  rescores = policy_update.rescores(model.config.dtype, UPDATE)

  def sample(trees, batch, key):
    hp = trees.hparams
    other = {"policy": trees.policy, "reference": trees.reference, "coef": hp["mixture_coef"]}
    return rollout.sample_against((model, trees.policy), (mixed, other), batch, key, hp, special, options)

  def prepare(trees, batch, key):
    del key

    def look(part):
      reference, _ = completion_scores(model, trees.reference, part, trees.hparams, special, options)
      columns = {"reference_logps": reference.logps} | rollout.score(models, trees, part, special, options)
      if rescores:
        policy, hparams = trees.policy, trees.hparams
        columns["rescored"], _ = completion_scores(model, policy, part, hparams, special, options, entropy=True)
      return columns

    batch = batch | map_over_microbatches(look, batch, parts.microbatches)
    rescored = batch.pop("rescored", None)
    batch = play(batch, options.num_generations)
    if rescores:
      batch = policy_update.settle(batch, rescored, model.config, trees.hparams, UPDATE)
    return batch | policy_update.counts(batch)

  def loss_fn(params, batch, hp):
    scores, _ = completion_scores(model, params, batch, hp, special, options, entropy=True)
    mask = batch["loss_mask"]
    losses = nash_md(scores.logps, batch["reference_logps"], mask, batch["preferred"], beta=hp["beta"])
    mean = functools.partial(policy_update.row_mean, batch=batch)
    kl = jnp.sum((batch["old_logps"] - batch["reference_logps"]) * mask, axis=1)
    known = policy_update.scored_means({"objective/kl": kl, "rewards/probabilities": batch["preferred"]}, batch)
    return mean(losses), policy_update.metrics(batch) | policy_update.sampler_metrics(scores, batch) | known

  tolerated = policy_update.tolerated(model.config.dtype, options, UPDATE)
  return Algorithm(
    prepare,
    loss_fn,
    count="num_examples",
    reads=("reference", *models),
    reads_policy=True,
    models=models,
    finish=functools.partial(policy_update.finish, tolerated=tolerated),
    rollout=sample,
  )


def play(batch: Batch, group: int) -> Batch:
  """Adds `preferred` [B], the probability that a completion beats its prompt's last one, and drops the last ones.

  Nothing is learned from the last ones, nor where either side has no score: their weights, masks and example masks
  become 0. `told` [B] is 1 where the two scores differ.

  Args:
    batch: scored rows with `from_other` [B], of `rollout.sample_against`; a prompt's rows are neighbours.
    group: completions of a prompt.
  """

  def last(x):
    return jnp.repeat(x.reshape(-1, group)[:, -1], group)

  own = 1 - batch["from_other"]
  counts = (own * last(batch["weights"][:, 0] > 0))[:, None]
  weights = batch["weights"] * counts
  better = batch["scores"] - last(batch["scores"])
  return batch | {
    "preferred": jax.nn.sigmoid(better),
    "told": (better != 0).astype(jnp.float32),
    "weights": weights,
    "scored": weights[:, 0],
    "prompted": batch.get("prompted", batch["example_mask"][:, 0]) * own,
    "loss_mask": batch["loss_mask"] * counts * (batch["weights"] > 0),
    "example_mask": batch["example_mask"] * own[:, None],
  }


RECIPE = Recipe(
  options=NashOptions,
  family=Family({"nash_md": nash_md}),
  make=make,
  records=lambda terms, options: "prompt",
  traced=(NashTraced,),
  models=rollout.MODELS,
  online=True,
)
