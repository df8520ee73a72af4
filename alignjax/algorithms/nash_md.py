"""Nash-MD: the policy plays against the geometric mixture of itself and the reference, and learns from who wins.

One iteration: every prompt gets `num_generations` completions, the last of them from the mixture; the others win
against it with the probability that a Bradley-Terry model gives, sigmoid of the difference of their scores.

Source: Munos et al. 2023 (arXiv:2312.00886)
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from alignjax.algorithms import policy_update, rollout
from alignjax.algorithms.algorithm import Algorithm, Parts
from alignjax.algorithms.online_rows import Learned, Outcome, Rollout
from alignjax.algorithms.policy_update import Settled, UpdateOptions
from alignjax.algorithms.rollout import completion_scores
from alignjax.algorithms.sampling_options import SamplingOptions, SamplingTraced
from alignjax.errors import InputError
from alignjax.losses.objective import Family, Term
from alignjax.losses.online_preference import nash_md
from alignjax.model import mixture
from alignjax.model.decoder import Model
from alignjax.system.microbatch import map_over_microbatches
from alignjax.system.ranges import Count, Share

UPDATE = UpdateOptions()  # there is no ratio: the policy's scores are compared with the sampler's alone


@dataclasses.dataclass(frozen=True)
class NashOptions(SamplingOptions):
  """Static settings of Nash-MD."""

  num_generations: Count = 2  # of each prompt; the last is the mixture's


@dataclasses.dataclass(frozen=True)
class NashTraced(SamplingTraced):
  """Traced hyper-parameters of Nash-MD."""

  mixture_coef: Share = 0.5  # the reference's share in the exponent


@flax.struct.dataclass(kw_only=True)
class NashRows(Learned):
  """Rows of completions that play against the last one of their prompt.

  Attributes:
    preferred: [B], the probability that a completion beats it.
  """

  preferred: jax.Array


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

    hp = trees.hparams

    def look(part):
      """Returns the outcome of rows, the reference's log-probs and, if asked for, the trainer's scores."""
      reference, _ = completion_scores(model, trees.reference, part.texts, hp, special, options)
      own = None
      if rescores:
        own, _ = completion_scores(model, trees.policy, part.texts, hp, special, options, entropy=True)
      return rollout.score(models, trees, part, special, options), reference.logps, own

    outcome, reference_logps, own = map_over_microbatches(look, batch.rows, parts.microbatches)
    played, outcome, preferred, told = play(batch.rows, outcome, options.num_generations)
    settled = Settled(played.logps)
    if rescores:
      settled = policy_update.settle(played, own, model.config, hp, UPDATE)
    rows = NashRows(
      texts=played.texts,
      outcome=outcome,
      told=told,
      sampler_logps=played.logps,
      old_logps=settled.old_logps,
      reference_logps=reference_logps,
      preferred=preferred,
    )
    return batch.replace(rows=rows).updated(totals=settled.totals | policy_update.counts(rows))

  def loss_fn(params, batch, hp):
    rows: NashRows = batch.rows
    scores, _ = completion_scores(model, params, rows.texts, hp, special, options, entropy=True)
    mask = rows.texts["loss_mask"]
    losses = nash_md(scores.logps, rows.reference_logps, mask, rows.preferred, beta=hp["beta"])
    mean = functools.partial(policy_update.row_mean, batch=batch)
    kl = jnp.sum((rows.old_logps - rows.reference_logps) * mask, axis=1)
    known = policy_update.scored_means({"objective/kl": kl, "rewards/probabilities": rows.preferred}, batch)
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


def play(rollout: Rollout, outcome: Outcome, group: int) -> tuple[Rollout, Outcome, jax.Array, jax.Array]:
  """Lets completions play against their prompt's last one, and drops the last ones.

  Nothing is learned from the last ones, nor where either side has no score: their weights, masks and example masks
  become 0.

  Args:
    rollout: of `rollout.sample_against`; a prompt's rows are neighbours.
    outcome: of these completions.
    group: completions of a prompt.

  Returns:
    The rollout and its outcome, of what is learned from; the probability [B] that a completion beats its prompt's last
    one; and 1 [B] where the two scores differ.
  """

  def last(x):
    return jnp.repeat(x.reshape(-1, group)[:, -1], group)

  assert rollout.from_other is not None
  own = 1 - rollout.from_other
  weights = outcome.weights * own * last(outcome.weights > 0)
  better = outcome.scores - last(outcome.scores)
  texts = rollout.texts | {"example_mask": rollout.texts["example_mask"] * own[:, None]}
  played = dataclasses.replace(rollout, texts=texts).counting(weights)
  outcome = dataclasses.replace(outcome, weights=weights, prompted=outcome.prompted * own)
  return played, outcome, jax.nn.sigmoid(better), (better != 0).astype(jnp.float32)


RECIPE = rollout.recipe(
  options=NashOptions,
  family=Family({"nash_md": nash_md}),
  make=make,
  traced=(NashTraced,),
)
