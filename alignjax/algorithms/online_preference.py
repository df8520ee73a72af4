"""Preference optimisation on pairs of the policy's own completions: online DPO, with any loss for pairs, and XPO.

One iteration: every prompt gets `num_generations` completions, rewards score them, and the best and the worst are a
pair, which algorithms/preference.py learns from as if it came from a file. XPO (`second` = "reference") draws the
second completion from the reference and is paid for leaving it.

The losses score the policy at temperature 1 whatever the sampler's is: they are about the model, not about how pairs
were found.

Source: Guo et al. 2024 (arXiv:2402.04792); XPO: Xie et al. 2024 (arXiv:2405.21046)
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from alignjax.algorithms import pair_sums, policy_update, preference, rollout
from alignjax.algorithms.algorithm import Algorithm, Parts, Traced, defaults_of, one_of
from alignjax.algorithms.online_rows import Outcome, Rollout, ScoredRows
from alignjax.algorithms.preference import PairOptions, PreferenceOptions
from alignjax.algorithms.sampling_options import SamplingOptions, SamplingTraced
from alignjax.data import segment
from alignjax.errors import InputError
from alignjax.losses.objective import Term
from alignjax.model.decoder import Model
from alignjax.system.ranges import Count, NonNegative

FAMILY = preference.FAMILY._replace(
  known={name: objective for name, objective in preference.LOSSES.items() if not objective.third}
)
SECONDS = ("policy", "reference")


@dataclasses.dataclass(frozen=True)
class OnlinePreferenceOptions(SamplingOptions, PairOptions):
  """Static settings of preference optimisation on the policy's own completions."""

  num_generations: Count = 2  # of each prompt; the best and the worst are the pair
  second: str = "policy"  # who writes every prompt's last completion: "policy", or "reference" (XPO)


@dataclasses.dataclass(frozen=True)
class Bonus(Traced):
  """The traced hyper-parameter of XPO."""

  xpo_alpha: NonNegative = 1e-5  # weight of the log-probability of the reference's completion


@flax.struct.dataclass(kw_only=True)
class PairRows(ScoredRows):
  """Rows of pairs, whose outcome is that of all the prompt's completions.

  Attributes:
    from_other: [B, 2], 1 where another model than the policy wrote the side; None if none did.
  """

  from_other: jax.Array | None = None


def check(terms: tuple[Term, ...], options: OnlinePreferenceOptions) -> None:
  """Raises InputError where a value is unknown, a combination means nothing, or a loss needs a third completion."""
  one_of("second", options.second, SECONDS)
  if third := [term.name for term in terms if term.objective.third]:
    raise InputError(f"algorithm.loss={third[0]}: needs a third completion, which no sampler gives; use another loss")
  preference.check(terms, of_pairs(options))


def more_traced(terms: tuple[Term, ...], options: OnlinePreferenceOptions) -> dict[str, float]:
  """Returns {name: default} of the hyper-parameters of the divergence, and of XPO if second="reference"."""
  bonus = defaults_of(Bonus) if options.second == "reference" else {}
  return preference.divergence_hparams(terms, options) | bonus


def of_pairs(options: OnlinePreferenceOptions) -> PreferenceOptions:
  """Returns the settings of the loss over pairs alone; a likelihood term is of the chosen completion."""
  return PreferenceOptions(**{field.name: getattr(options, field.name) for field in dataclasses.fields(PairOptions)})


def make(model: Model, terms: tuple[Term, ...], options: OnlinePreferenceOptions, parts: Parts) -> Algorithm:
  """Makes preference optimisation of `model`, policy and reference alike, on its own completions.

  Args:
    terms: objectives of pairs without a third completion.
    options: as `check` accepts them.
    parts: `models` has the reward model and its domain, `special` the tokens that end completions.

  Raises:
    InputError: rewards that cannot be had, or a single completion of each prompt.
  """
  rollout.check(options, compared="a pair")
  special = parts.special
  pair_options = of_pairs(options)
  inner = preference.make(model, terms, pair_options, parts)
  models = rollout.models(parts)
  explores = options.second == "reference"
  objective = preference.make_objective(terms, pair_options)

  def sample(trees, batch, key):
    policy = (model, trees.policy)
    hparams = trees.hparams
    if not explores:
      return rollout.sample(*policy, batch, key, hparams, special, options)
    return rollout.sample_against(policy, (model, trees.reference), batch, key, hparams, special, options)

  def prepare(trees, batch, key):
    outcome = rollout.score(models, trees, batch.rows, special, options)
    pairs = pair_up(batch.rows.counting(outcome.weights), outcome, options.num_generations)
    prepared = inner.prepare(trees, batch.replace(rows=pairs.texts).updated(totals=policy_update.counts(pairs)), key)
    return prepared.replace(rows=pairs.replace(texts=prepared.rows))

  def loss_fn(params, batch, hp):
    rows: PairRows = batch.rows
    scores = pair_sums.token_scores(model, params, rows.texts, log_sum_sq_probs=options.weighting == "wpo")
    total, metrics = objective(scores, batch.replace(rows=rows.texts), hp)
    metrics |= policy_update.metrics(batch)
    if explores:
      logps = pair_sums.side_sums(scores.logps * rows.texts["loss_mask"], rows.texts)
      bonus = policy_update.row_mean(jnp.sum(logps[:, 0] * rows.from_other, axis=-1), batch)
      total, metrics["loss/bonus"] = total + hp["xpo_alpha"] * bonus, bonus
    return total, metrics

  return Algorithm(
    prepare,
    loss_fn,
    count="num_examples",
    # In one order on every host: trees are saved and loaded in it.
    reads=tuple(dict.fromkeys((*inner.reads, *(["reference"] if explores else []), *models))),
    reads_policy=True,
    synced=inner.synced,
    models=models,
    finish=functools.partial(policy_update.finish, tolerated={}),
    rollout=sample,
  )


def pair_up(rollout: Rollout, outcome: Outcome, group: int) -> PairRows:
  """Builds rows [P, 2T] of the best (chosen) and the worst (rejected) of each prompt's completions.

  A prompt with fewer than two scored completions, or whose best and worst are the same tokens, weighs nothing. Of equal
  scores the best is the first and the worst the last. What is known of single completions becomes its mean over the
  prompt.

  Args:
    rollout: rows [P * group, T], a prompt's being neighbours.
    outcome: of these completions.
    group: completions of a prompt.
  """

  def grouped(tree):
    return jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), tree)

  texts, results = grouped(rollout.texts), grouped(outcome)
  weights, scores = results.weights, results.scores
  scored = weights > 0
  best = jnp.argmax(jnp.where(scored, scores, -jnp.inf), axis=1)
  # From the end, so that of equals the pair is two completions.
  worst = group - 1 - jnp.argmin(jnp.where(scored, scores, jnp.inf)[:, ::-1], axis=1)
  sides = jnp.stack([best, worst], axis=1)

  def take(x):
    return jnp.take_along_axis(x, sides.reshape(*sides.shape, *(1,) * (x.ndim - 2)), axis=1)

  def wide(x):
    return x.reshape(len(sides), -1)

  tokens, segment_ids = take(texts["tokens"]), take(texts["segment_ids"])
  best_score = jnp.max(jnp.where(scored, scores, -jnp.inf), axis=1)
  worst_score = jnp.min(jnp.where(scored, scores, jnp.inf), axis=1)
  differ = jnp.any(tokens[:, 0] != tokens[:, 1], axis=-1) & (scored.sum(axis=1) > 1)
  numbers = segment.of(0, jnp.arange(segment.PAIR), segment.PAIR)
  from_other = None
  if rollout.from_other is not None:
    from_other = take(grouped(rollout.from_other))
  of_prompt = jax.tree.map(lambda x: jnp.nanmean(x, axis=1), results)
  of_prompt = of_prompt.replace(
    scores=jnp.sum(jnp.where(scored, scores, 0.0), axis=1) / jnp.maximum(scored.sum(axis=1), 1),
    weights=weights.max(axis=1),
  )
  pairs = {
    "tokens": wide(tokens),
    "segment_ids": wide(segment_ids * numbers[:, None]),
    "positions": wide(take(texts["positions"])),
    "loss_mask": wide(take(texts["loss_mask"])),
    "example_mask": texts["example_mask"][:, 0],
    "record_ids": texts["record_ids"][:, 0],
    "weights": (weights.max(axis=1) * differ)[:, None],
  }
  told = (best_score > worst_score).astype(jnp.float32)
  return PairRows(texts=pairs, outcome=of_prompt, told=told, from_other=from_other)


RECIPE = rollout.recipe(
  options=OnlinePreferenceOptions,
  family=FAMILY,
  make=make,
  traced=(SamplingTraced, Bonus),
  more_traced=more_traced,
  functions=preference.RECIPE.functions,
  check=check,
)
