"""Preference optimisation on single completions, each labelled desirable or undesirable: KTO and its relatives."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, Column, Options, Parts, Recipe, segments, weighted_sum_of
from alignjax.losses.aggregation import divisor
from alignjax.losses.logps import next_token_logps, segment_sum
from alignjax.losses.objective import Family, Term, check_losses, record_of
from alignjax.losses.unpaired import LOSSES, Labelled, UnpairedObjective, clamped_kl, update_mean
from alignjax.model.decoder import Model
from alignjax.system.microbatch import map_over_microbatches
from alignjax.types import Batch, HParams, Mean, Metrics, Params, Rows, divided

FAMILY = Family(LOSSES, adopt=functools.partial(record_of, record=UnpairedObjective), argument="labelled", sums=True)
RUNNING = {"mean_ratio": 0.0, "ratio_count": 0.0}  # of objectives with a running mean
BESIDE = ("tokens", "segment_ids", "positions", "loss_mask")  # with "kl_" before: the mismatched rows


@dataclasses.dataclass(frozen=True)
class UnpairedOptions(Options):
  """Unpaired preference optimisation has no options of its own."""


def records(terms: tuple[Term, ...], options: UnpairedOptions) -> str:
  """Returns the kind of records: "mismatched" if an objective reads mismatched completions, else "unpaired"."""
  del options
  return "mismatched" if any(term.objective.mismatched for term in terms) else "unpaired"


def make(model: Model, terms: tuple[Term, ...], options: UnpairedOptions, parts: Parts) -> Algorithm:
  """Makes the optimisation of `model`, policy and reference alike, on completions that are labelled desirable or not.

  Args:
    terms: the objectives, whose weighted sum is learned.
    options: unused; every recipe's `make` takes it.
    parts: only `microbatches` is read.

  Raises:
    InputError: a user's loss fails, or does not return a loss for each example.
  """
  wide: Any = jax.ShapeDtypeStruct((2, 3), jnp.float32)  # in place of an array
  scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
  check_losses(terms, Labelled(wide, wide, scalar, scalar), wide.shape)
  objective = make_objective(terms)
  mismatches = records(terms, options) == "mismatched"
  keeps_mean = any(term.objective.running_mean for term in terms)

  def score(params, rows):
    return map_over_microbatches(lambda part: logps(model, params, part), rows, parts.microbatches)

  def prepare(trees, batch, key):
    del key
    rows = batch.rows
    if "reference_logps" not in rows:
      batch = batch.updated(rows={"reference_logps": score(trees.reference, rows)})
    mismatched = policy = None
    if mismatches:
      beside = rows | {name: rows[f"kl_{name}"] for name in BESIDE}
      mismatched = score(trees.policy, beside) - score(trees.reference, beside)
    if keeps_mean:
      policy = score(trees.policy, rows)
    return with_totals(batch, mismatched, policy)

  def loss_fn(params, batch, hparams):
    return objective(logps(model, params, batch.rows), batch, hparams)

  # The log-ratios of mismatched completions depend on who meets whom in a batch, so no cache has them.
  columns = {} if mismatches else {"reference_logps": Column("reference", score, (), {})}
  return Algorithm(
    prepare,
    loss_fn,
    count="num_examples",
    reads=("reference",),
    reads_policy=mismatches or keeps_mean,
    running=RUNNING if keeps_mean else {},
    columns=columns,
    finish=by_class,
  )


def with_totals(batch: Batch, mismatched: jax.Array | None = None, policy: jax.Array | None = None) -> Batch:
  """Adds to the batch the count of the whole step, and the numbers that couple its examples.

  These are the totals "kl" and "kl_variance" with `mismatched`; with `policy` the running mean is updated.

  Args:
    batch: of the whole step, with `reference_logps` [B, P], and for a running mean the statistics in `RUNNING`.
    mismatched: log-ratios [B, P] of mismatched completions, if an objective reads them.
    policy: log-probabilities [B, P], for a running mean.
  """
  weights = batch.rows["weights"]
  totals = {"num_examples": divisor(weights.sum())}
  if mismatched is not None:
    totals["kl"], totals["kl_variance"] = clamped_kl(mismatched, weights)
  running = {}
  if policy is not None:
    ratio = policy - batch.rows["reference_logps"]
    mean, count = update_mean(batch.running["mean_ratio"], batch.running["ratio_count"], ratio, weights)
    running = {"mean_ratio": mean, "ratio_count": count}
  return batch.updated(totals=totals, running=running)


def make_objective(terms: tuple[Term, ...]) -> Callable[[jax.Array, Batch, HParams], tuple[jax.Array, Metrics]]:
  """Returns f(logps [B, P], prepared batch, hparams) -> (loss, metrics): all that comes after the model.

  A label is the probability that the completion is desirable; the loss is its expectation over both classes. Metrics of
  a class are means over its examples.
  """

  def objective(logps, batch, hparams):
    rows, totals, running = batch.rows, batch.totals, batch.running
    labels, ratio = rows["labels"], logps - rows["reference_logps"]
    labelled = Labelled(ratio, labels, totals.get("kl", 0.0), running.get("mean_ratio", 0.0))

    def losses_if(desirable):
      return weighted_sum_of(terms, labelled._replace(desirable=desirable.astype(labels.dtype)), hparams)

    # Of a label without doubt, both are of the same class: no infinite loss meets a weight of 0.
    losses = labels * losses_if(labels > 0) + (1 - labels) * losses_if(labels == 1)

    def mean(x):
      return jnp.sum(rows["weights"] / totals["num_examples"] * x)

    metrics = {}
    for side, of_side in (("chosen", labelled.desirable), ("rejected", 1 - labelled.desirable)):
      share = metrics[f"share/{side}"] = mean(of_side)
      if "beta" in hparams:  # else it has no implied reward
        metrics[f"rewards/{side}"] = Mean(mean(of_side * hparams["beta"] * labelled.ratio), share)
      metrics[f"logps/{side}"] = Mean(mean(of_side * logps), share)
    for name in ("kl", "kl_variance"):
      if name in totals:
        metrics[name] = mean(jnp.full_like(logps, totals[name]))
    if "mean_ratio" in running and "beta" in hparams:
      metrics["delta"] = mean(jnp.full_like(logps, hparams["beta"] * running["mean_ratio"]))
    return mean(losses), metrics

  return objective


def by_class(metrics: Mapping[str, float | Mean]) -> dict[str, float]:
  """Returns the numbers to log, and rewards/margins where both classes have a reward."""
  numbers = divided(metrics)
  if {"rewards/chosen", "rewards/rejected"} <= numbers.keys():
    numbers["rewards/margins"] = numbers["rewards/chosen"] - numbers["rewards/rejected"]
  return numbers


def logps(model: Model, params: Params, rows: Rows) -> jax.Array:
  """Computes the log-probabilities of the completions, [B, P] in nats, summed over tokens; 0 where there is none."""
  hidden, _ = model.forward(params, rows["tokens"], segments(rows), rows["positions"])
  scores = next_token_logps(hidden, model.unembedding(params), rows["tokens"])
  return segment_sum(scores * rows["loss_mask"], rows["segment_ids"], rows["example_mask"].shape[1])


RECIPE = Recipe(options=UnpairedOptions, family=FAMILY, make=make, records=records)
