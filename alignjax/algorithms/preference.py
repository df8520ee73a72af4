"""Preference optimisation on pairs: a policy, for most losses a reference, and one objective or a sum of several."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import (
  Algorithm,
  Column,
  Options,
  Parts,
  Recipe,
  Sync,
  one_of,
  own_hparams,
  weighted_sum_of,
)
from alignjax.algorithms.pair_sums import (
  confidences,
  likelihood_sums,
  matched_columns,
  pair_logps,
  side_sums,
  to_pairs,
  token_scores,
  token_weights,
  wpo_weights,
)
from alignjax.errors import InputError
from alignjax.losses import preference, reference_free
from alignjax.losses.aggregation import divisor
from alignjax.losses.divergence import DIVERGENCES
from alignjax.losses.logps import TokenScores
from alignjax.losses.objective import Family, Term, check_losses, keywords, record_of
from alignjax.losses.pair import PairObjective, abstract_pair, expected
from alignjax.model.decoder import Model
from alignjax.system.microbatch import map_over_microbatches
from alignjax.system.ranges import Count, Share, ShareAboveZero
from alignjax.types import Batch, HParams, Metrics, Rows

LOSSES = preference.LOSSES | reference_free.LOSSES
FAMILY = Family(LOSSES, adopt=functools.partial(record_of, record=PairObjective), argument="pair", sums=True)
REFERENCES, WEIGHTINGS, LIKELIHOODS = ("frozen", "none", "sync"), ("none", "wpo"), ("chosen", "third")


@dataclasses.dataclass(frozen=True)
class PairOptions(Options):
  """Static settings of losses over pairs, whoever wrote the completions."""

  reference: str = ""  # "frozen", "none" (of probability 1), "sync" (TR-DPO); "": "frozen" if the loss needs one
  sync_every: Count = 512  # "sync": steps between its moves
  sync_mix: ShareAboveZero = 0.6  # "sync": the policy's share in a move
  divergence: str = "reverse_kl"  # one of losses.divergence.DIVERGENCES
  ld_alpha: Share = 1.0  # weight of tokens beyond the shorter side's length (LD-DPO); 1: as all others
  weighting: str = "none"  # "wpo" weighs pairs by how likely the policy itself is to write them


@dataclasses.dataclass(frozen=True)
class PreferenceOptions(PairOptions):
  """Static settings of losses over pairs of a data set."""

  likelihood: str = ""  # of whose completion a likelihood term is: "chosen", "third"; "": "third" for tpo alone


def records(terms: tuple[Term, ...], options: PreferenceOptions) -> str:
  """Returns the kind of records: "triple" if the likelihood term is of a third completion, else "preference"."""
  return "triple" if likelihood_of(terms, options) == "third" else "preference"


def likelihood_of(terms: tuple[Term, ...], options: PreferenceOptions) -> str:
  """Returns whose completion the likelihood terms are of, "chosen" or "third"; the losses decide if it is ""."""
  default = "third" if any(term.objective.third for term in terms) else "chosen"
  return options.likelihood or default


def check(terms: tuple[Term, ...], options: PreferenceOptions) -> None:
  """Raises InputError where a value is unknown, or a combination means nothing."""
  one_of("divergence", options.divergence, DIVERGENCES)
  one_of("weighting", options.weighting, WEIGHTINGS)
  if options.reference:
    one_of("reference", options.reference, REFERENCES)
  if options.likelihood:
    one_of("likelihood", options.likelihood, LIKELIHOODS)
  loss = "+".join(term.name for term in terms)
  bound = ", ".join(term.name for term in terms if not term.objective.divergence)
  if options.divergence != "reverse_kl" and bound:
    raise InputError(f"algorithm.divergence={options.divergence}: has no meaning for {bound}; use reverse_kl")
  coupled = ", ".join(term.name for term in terms if term.objective.match)
  if options.weighting == "wpo" and coupled:
    raise InputError(f"algorithm.weighting=wpo: has no meaning for {coupled}, which mixes pairs; use none")
  if options.likelihood == "third" and not any(term.objective.likelihood for term in terms):
    raise InputError(f"algorithm.likelihood=third: {loss} has no likelihood term; add one: {loss}+sft")
  if options.reference in ("frozen", "sync") and not reads_reference(terms):
    raise InputError(f"algorithm.reference={options.reference}: {loss} takes no reference; leave it empty")


def reads_reference(terms: tuple[Term, ...]) -> bool:
  """Returns whether any of the objectives reads the reference's log-probabilities."""
  return any(term.objective.reference for term in terms)


def divergence_hparams(terms: tuple[Term, ...], options: PairOptions) -> dict[str, float]:
  """Returns {name: default} of the hyper-parameters of the divergence; `terms` is unused."""
  del terms
  return keywords(DIVERGENCES[options.divergence])


def make(model: Model, terms: tuple[Term, ...], options: PreferenceOptions, parts: Parts) -> Algorithm:
  """Makes preference optimisation of `model`, policy and reference alike, by a weighted sum of objectives.

  Args:
    terms: the objectives; the metrics rewards/* and logps/* are those of the first.
    options: as `check` accepts them.
    parts: only `microbatches` is read.

  Raises:
    InputError: a user's loss fails, or does not return a loss for each pair.
  """
  check_losses(terms, abstract_pair((2, 2, 3)), (2, 2, 3))
  coupled = any(term.objective.match for term in terms)
  kind = options.reference or ("frozen" if reads_reference(terms) else "none")
  objective = make_objective(terms, options)
  weighs = options.weighting == "wpo"
  sides = 3 if records(terms, options) == "triple" else 2

  def score(params, rows):
    return map_over_microbatches(
      lambda part: pair_logps(model, params, part, options.ld_alpha, sides), rows, parts.microbatches
    )

  def prepare(trees, batch, key):
    del key
    if kind != "none" and "reference_logps" not in batch.rows:
      batch = batch.updated(rows={"reference_logps": score(trees.reference, batch.rows)})
    policy = score(trees.policy, batch.rows) if coupled else None
    return with_totals(terms, batch, options, policy)

  def loss_fn(params, batch, hparams):
    return objective(token_scores(model, params, batch.rows, sides, log_sum_sq_probs=weighs), batch, hparams)

  columns = {"reference_logps": Column("reference", score, (2,), {"ld_alpha": options.ld_alpha})}
  return Algorithm(
    prepare,
    loss_fn,
    count="num_examples",
    reads=("reference",) if kind != "none" else (),
    reads_policy=coupled,
    synced={"reference": Sync(options.sync_every, options.sync_mix)} if kind == "sync" else {},
    columns=columns if kind == "frozen" else {},
  )


def with_totals(
  terms: tuple[Term, ...], batch: Batch, options: PreferenceOptions, policy_logps: jax.Array | None = None
) -> Batch:
  """Adds to the batch the counts of the whole step, and the columns matched_* [B, P, 2] that couple its pairs.

  Args:
    terms: the objectives.
    batch: of the whole step, with `reference_logps` [B, P, 2] if there is a reference.
    options: of the algorithm.
    policy_logps: [B, P, 2]; needed if an objective couples pairs (`PairObjective.match`).
  """
  rows = batch.rows
  count = divisor(rows["weights"].sum())
  of_sides = likelihood_sums(rows["loss_mask"], rows, likelihood_of(terms, options))
  tokens = expected(jnp.moveaxis(of_sides, -1, 0), confidences(rows))
  batch = batch.updated(
    totals={"num_examples": count, "mean_nll_tokens": divisor(jnp.sum(rows["weights"] * tokens) / count)}
  )
  columns: Rows = {}
  for match in (term.objective.match for term in terms if term.objective.match):
    assert policy_logps is not None
    columns |= matched_columns(match, policy_logps, batch)
  return batch.updated(rows=columns)


def make_objective(
  terms: tuple[Term, ...], options: PreferenceOptions
) -> Callable[[TokenScores, Batch, HParams], tuple[jax.Array, Metrics]]:
  """Returns f(scores [B, T], prepared batch, hparams) -> (loss, metrics): all that comes after the model.

  A pair whose label is right with probability q counts as two: with the weight q as it is, with 1 - q turned over. The
  metrics rewards/* and logps/* are those of the first objective.
  """
  first = terms[0].objective
  divergence = DIVERGENCES[options.divergence]
  likelihood = likelihood_of(terms, options)

  def objective(scores, batch, hparams):
    rows = batch.rows
    logps = side_sums(scores.logps * token_weights(rows, options.ld_alpha), rows)
    nll = -likelihood_sums(scores.logps * rows["loss_mask"], rows, likelihood)
    score = functools.partial(divergence, **own_hparams(divergence, hparams))
    pairs = to_pairs(logps, batch, nll, score=score)
    losses = weighted_sum_of(terms, pairs, hparams)
    if options.weighting == "wpo":
      losses *= wpo_weights(scores, rows)

    def mean(x):
      return jnp.sum(rows["weights"] / batch.totals["num_examples"] * expected(x, confidences(rows)))

    return mean(losses), {name: mean(x) for name, x in pair_metrics(pairs, hparams).items()}

  def pair_metrics(pair, hparams):
    chosen_logps, rejected_logps = first.logps(pair)
    metrics = {"logps/chosen": chosen_logps, "logps/rejected": rejected_logps}
    if "beta" in hparams:
      rewards = first.rewards(pair, **own_hparams(first.rewards, hparams))
      chosen, rejected = (hparams["beta"] * x for x in rewards)
      metrics |= {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,  # a tie counts as wrong
      }
    for term in terms:
      metrics |= term.objective.metrics(pair)
    return metrics

  return objective


RECIPE = Recipe(
  options=PreferenceOptions,
  family=FAMILY,
  make=make,
  records=records,
  more_traced=divergence_hparams,
  functions=tuple(DIVERGENCES.values()),
  check=check,
)
