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

import jax.numpy as jnp

from alignjax.algorithms import pair_sums, policy_update, preference, rollout
from alignjax.algorithms.algorithm import Algorithm, Parts, Recipe, Traced, defaults_of, one_of
from alignjax.algorithms.preference import PairOptions, PreferenceOptions
from alignjax.algorithms.sampling_options import SamplingOptions, SamplingTraced
from alignjax.errors import InputError
from alignjax.losses.objective import Term
from alignjax.model.decoder import Model
from alignjax.system.ranges import Count, NonNegative
from alignjax.types import Batch

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
    batch = batch | rollout.score(models, trees, batch, special, options)
    pairs = pair_up(batch, options.num_generations)
    return policy_update.counts(pairs) | inner.prepare(trees, pairs, key)

  def loss_fn(params, batch, hp):
    scores = pair_sums.token_scores(model, params, batch, log_sum_sq_probs=options.weighting == "wpo")
    total, metrics = objective(scores, batch, hp)
    metrics |= policy_update.metrics(batch)
    if explores:
      logps = pair_sums.side_sums(scores.logps * batch["loss_mask"], batch)
      bonus = policy_update.row_mean(jnp.sum(logps[:, 0] * batch["from_other"], axis=-1), batch)
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


def pair_up(batch: Batch, group: int) -> Batch:
  """Builds rows [P, 2T] of the best (segment 1) and the worst (segment 2) of each prompt's completions.

  A prompt with fewer than two scored completions, or whose best and worst are the same tokens, weighs nothing. Of equal
  scores the best is the first and the worst the last. Metrics of single completions become their means over the prompt.

  Args:
    batch: scored rows [P * group, T] of `rollout`, a prompt's being neighbours; scalars pass through.
    group: completions of a prompt.
  """
  grouped = {name: x.reshape(-1, group, *x.shape[1:]) for name, x in batch.items() if x.ndim}
  scored = grouped["weights"][..., 0] > 0
  scores = grouped["scores"]
  best = jnp.argmax(jnp.where(scored, scores, -jnp.inf), axis=1)
  # From the end, so that of equals the pair is two completions.
  worst = group - 1 - jnp.argmin(jnp.where(scored, scores, jnp.inf)[:, ::-1], axis=1)
  sides = jnp.stack([best, worst], axis=1)

  def take(x):
    return jnp.take_along_axis(x, sides.reshape(*sides.shape, *(1,) * (x.ndim - 2)), axis=1)

  def wide(name):
    return take(grouped[name]).reshape(len(sides), -1)

  tokens = take(grouped["tokens"])
  best_score = jnp.max(jnp.where(scored, scores, -jnp.inf), axis=1)
  worst_score = jnp.min(jnp.where(scored, scores, jnp.inf), axis=1)
  differ = jnp.any(tokens[:, 0] != tokens[:, 1], axis=-1) & (scored.sum(axis=1) > 1)
  picked = take(grouped["segment_ids"])

  def mean(x):
    return jnp.nanmean(x, axis=1)

  per_prompt = {
    name: mean(x)
    for name, x in grouped.items()
    if name in ("finished", "lengths", "steps", "failed", "prompted") or name.startswith(("reward/", "domain/"))
  }
  return (
    {name: x for name, x in batch.items() if not x.ndim}
    | per_prompt
    | {
      "tokens": tokens.reshape(len(sides), -1),
      "segment_ids": (picked * jnp.array([1, 2])[:, None]).reshape(len(sides), -1),
      "positions": wide("positions"),
      "loss_mask": wide("loss_mask"),
      "example_mask": grouped["example_mask"][:, 0],
      "record_ids": grouped["record_ids"][:, 0],
      "weights": grouped["weights"].max(axis=1) * differ[:, None],
      "scored": grouped["weights"].max(axis=(1, 2)),
      "told": (best_score > worst_score).astype(jnp.float32),
      "scores": jnp.sum(jnp.where(scored, scores, 0.0), axis=1) / jnp.maximum(scored.sum(axis=1), 1),
      **({"from_other": take(grouped["from_other"])} if "from_other" in grouped else {}),
    }
  )


RECIPE = Recipe(
  options=OnlinePreferenceOptions,
  family=FAMILY,
  make=make,
  records=lambda terms, options: "prompt",
  traced=(SamplingTraced, Bonus),
  more_traced=more_traced,
  functions=preference.RECIPE.functions,
  check=check,
  models=rollout.MODELS,
  online=True,
)
