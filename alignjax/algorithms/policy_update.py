"""Shared updates of online algorithms: a policy's loss on the rows that `rollout` made, and what is logged.

A minibatch has some of an iteration's rows, and the counts of them all, by which every mean divides.
"""

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import Options, Traced, defaults_of, one_of, own_hparams
from alignjax.algorithms.online_rows import Learned, Outcome, Rollout, ScoredRows
from alignjax.algorithms.sampling_options import SamplingOptions, SamplingTraced
from alignjax.errors import InputError
from alignjax.losses import token_weight
from alignjax.losses.aggregation import Counts, aggregate, divisor
from alignjax.losses.kl import CORRECTED, KL_ESTIMATORS, PLACES, loss_kl
from alignjax.losses.logps import TokenScores
from alignjax.losses.objective import Term, check_losses
from alignjax.losses.policy import PolicyLoss, TokenLosses, Tokens, gmpo, make_tokens
from alignjax.losses.token_weight import on_policy
from alignjax.system.ranges import Count, NonNegative, Positive
from alignjax.system.sharding import ways
from alignjax.types import Batch, HParams, Mean, Metrics, Scalars, divided


@dataclasses.dataclass(frozen=True)
class UpdateOptions(Options):
  """Static settings of how a policy is updated from its own completions."""

  old_logps: str = "auto"  # whose forward pass gives the ratio's denominator, one of OLD_LOGPS
  correction: str = "none"  # for a sampler that rounds otherwise than the trainer (bfloat16): one of CORRECTIONS


@dataclasses.dataclass(frozen=True)
class PassesOptions(SamplingOptions, UpdateOptions):
  """Static settings of algorithms that learn from completions in several optimizer steps."""

  epochs: Count = 1  # passes over an iteration's completions
  minibatches: Count = 1  # parts of a pass, an optimizer step each
  kl_estimator: str = ""  # of the KL from the reference, one of losses.kl.PLACES; "": that of the place
  kl_in: str = "none"  # where the KL is paid: see the algorithm


@dataclasses.dataclass(frozen=True)
class PassesTraced(SamplingTraced):
  """Traced hyper-parameters of these algorithms.

  kl_coef is the price of a nat of KL from the reference, unused with kl_in="none"; entropy_coef is the weight of the
  entropy bonus, in nats a token.
  """

  kl_coef: NonNegative = 0.04
  entropy_coef: NonNegative = 0.0
  # The iteration ends where a minibatch is this far from the sampler, in nats a token.
  target_kl: Annotated[NonNegative, "0 ends none"] = 0.0


@dataclasses.dataclass(frozen=True)
class Bounds(Traced):
  """Bounds of a correction's weights, which are clipped to them or set to 0 beyond; correction_low=0 is no bound."""

  correction_low: NonNegative = 0.0
  correction_high: Positive = 3.0


CORRECTIONS = ("none", *(f"{level}_{bound}" for level in token_weight.LEVELS for bound in token_weight.BOUNDS))
# "auto": the trainer's where a correction needs them, or it computes in less than float32; else the sampler's.
OLD_LOGPS = ("auto", "trainer", "sampler")

TOLERANCE = 1e-3  # by which a ratio may differ from 1 before the first update of an iteration, in float32
OFF = "policy/off"  # metric: the share of tokens where it differs by more
SAMPLER_OFF = "sampling/off"  # metric: the share of tokens where p_trainer / p_sampler does
# In narrower floats the cached and the full forward pass round differently, by a share of the logits' spread. Measured
# in bfloat16: from 1/280 of it (2 layers) to 1/29 (8 layers of twice the usual scale); an emptied cache: 3/4 of it.
NATS, SPREAD_SHARE = 0.1, 0.1  # a token's mean difference may be the smaller of so many nats and this share
SAME_PROGRAM = 0.2  # of that, between two forward passes of the trainer; measured: up to 1/340 of the spread
TOLERATED = "sampling/tolerated"  # metric: that mean, in nats
DIFFERENCE = "sampling/sampling_logp_difference"  # metrics: /mean and /max of |log p_trainer - log p_sampler|
WEIGHT = "sampling/importance_sampling_ratio"  # metrics: /min, /mean, /max of the correction's weights
DRIFT = "policy/drift"  # metric: mean |log ratio| before the first update of an iteration, in nats
SIGNAL = "signal"  # not logged: 0 where the rewards of an iteration tell nothing that could be learned
FIRST = (OFF, DRIFT)  # of several optimizer steps an iteration, those of the first


SAMPLING = (  # totals of a batch that was scored anew, by the names of their metrics
  *(f"{DIFFERENCE}/{of}" for of in ("mean", "max")),
  *(f"{WEIGHT}/{of}" for of in ("min", "mean", "max")),
  TOLERATED,
  SAMPLER_OFF,
)


class Settled(NamedTuple):
  """The log-probs that a ratio divides by: the sampler's alone, or what `settle` made of them and the trainer's.

  Attributes:
    old_logps, correction: of `Learned`.
    totals: how far trainer and sampler are apart, by the names of metrics; {} if that is not known.
  """

  old_logps: jax.Array
  correction: jax.Array | None = None
  totals: Mapping[str, jax.Array] = types.MappingProxyType({})


def is_low(dtype: str) -> bool:
  """Returns whether a model of this dtype computes in floats narrower than float32."""
  return jnp.finfo(dtype).bits < 32


def check(options: UpdateOptions) -> None:
  """Raises InputError where the options of the update are unknown or mean nothing together."""
  one_of("old_logps", options.old_logps, OLD_LOGPS)
  one_of("correction", options.correction, CORRECTIONS)
  if options.correction != "none" and options.old_logps == "sampler":
    raise InputError(
      f"algorithm.old_logps=sampler with algorithm.correction={options.correction}: a correction is from the "
      "sampler's to the trainer's; use old_logps=\"auto\""
    )


def check_own(terms: Iterable[Term]) -> None:
  """Raises InputError where a user's loss fails, or does not return a float loss for each token."""
  wide: Any = jax.ShapeDtypeStruct((2, 3), jnp.float32)  # in place of an array
  check_losses(terms, Tokens(wide, wide, wide, wide, wide), wide.shape, TokenLosses)


def rescores(dtype: str, options: UpdateOptions) -> bool:
  """Returns whether the trainer scores completions once more, before it learns from them: see `settle`.

  It does in narrow floats, or if the options ask for the trainer's old log-probs or a correction. `dtype` is the
  model's.
  """
  return is_low(dtype) or options.old_logps == "trainer" or options.correction != "none"


def parts_of(rows: int, microbatches: int, minibatches: int) -> int:
  """Counts the parts in which so many rows are scored: minibatches * microbatches, so that scores round as in the loss.

  It is `microbatches` if the rows do not divide evenly, as in an evaluation.
  """
  parts = microbatches * minibatches
  return parts if rows % (parts * ways("batch")) == 0 else microbatches


def bounds(options: UpdateOptions) -> dict[str, float]:
  """Returns {name: default} of the hyper-parameters that the options bring: `Bounds`, if there is a correction."""
  return defaults_of(Bounds) if options.correction != "none" else {}


def settle(rollout: Rollout, rescored: TokenScores, config: Any, hparams: HParams, options: UpdateOptions) -> Settled:
  """Returns the trainer's log-probs as the old ones, unless the options want the sampler's.

  Beside these, the correction from the sampler's to the trainer's that the options ask for.

  Args:
    rollout: as sampled; its mask is that of the scored rows.
    rescored: the policy's scores [B, T], with their entropy.
    config: the model's; dtype and vocab are read.
    hparams: `correction_low` and `correction_high`, read if the options have a correction.
    options: of the update.
  """
  mask, sampled = rollout.texts["loss_mask"], rollout.logps
  gap = jnp.where(mask > 0, rescored.logps - sampled, 0.0)
  weights, correction = token_weight.ratio(gap), None
  if options.correction != "none":
    level, bound = options.correction.split("_")
    bounds = {"low": hparams["correction_low"], "high": hparams["correction_high"]}
    weights = token_weight.sampling_correction(rescored.logps, sampled, mask, level=level, bound=bound, **bounds)
    correction = weights

  def mean(x):
    return jnp.sum(jnp.where(mask > 0, x, 0.0)) / jnp.maximum(mask.sum(), 1.0)

  totals = {
    f"{DIFFERENCE}/mean": mean(jnp.abs(gap)),
    f"{DIFFERENCE}/max": jnp.abs(gap).max(),
    f"{WEIGHT}/min": jnp.where(jnp.any(mask > 0), jnp.min(jnp.where(mask > 0, weights, jnp.inf)), 1.0),
    f"{WEIGHT}/mean": mean(weights),
    f"{WEIGHT}/max": jnp.max(jnp.where(mask > 0, weights, 0.0)),
  }
  if is_low(config.dtype):
    totals[TOLERATED] = mean(tolerated_nats(rescored.entropy, config.vocab))
  else:
    totals[SAMPLER_OFF] = mean(is_off(gap))
  return Settled(sampled if options.old_logps == "sampler" else rescored.logps, correction, totals)


def is_off(log_ratio: jax.Array) -> jax.Array:
  """Returns 1.0 where a ratio, given by its log, is further than TOLERANCE from 1; else 0.0."""
  return (jnp.abs(jnp.expm1(log_ratio)) > TOLERANCE).astype(jnp.float32)


def tolerated_nats(entropy: jax.Array, vocab: int) -> jax.Array:
  """Returns by how many nats two forward passes in narrow floats may score a token differently, on average.

  The spread of logits is that of normal ones whose distribution has this entropy (nats): sqrt(2 (log vocab - entropy)).
  """
  spread = jnp.sqrt(2 * jnp.maximum(math.log(vocab) - entropy, 0.0))
  return jnp.minimum(NATS, SPREAD_SHARE * spread)


def counts(rows: ScoredRows) -> Scalars:
  """Counts what a loss over these rows divides by: sums of the rows' weights, each above 0 (see `divisor`).

  The rows are all those of a minibatch. "num_scored" and "num_prompted" are for metrics of rewards and of completions.
  """
  weights = rows.texts["weights"]
  return {
    "num_examples": divisor(weights.sum()),
    "num_tokens": divisor(jnp.sum(weights[:, :1] * rows.texts["loss_mask"])),
    "num_scored": divisor(rows.outcome.weights.sum()),
    "num_prompted": divisor(rows.outcome.prompted.sum()),
  }


def policy_loss(
  loss: PolicyLoss, scores: TokenScores, batch: Batch, hparams: HParams, options: PassesOptions
) -> tuple[jax.Array, Metrics]:
  """Returns the policy-gradient loss of some rows, a scalar, and its metrics.

  These have the clip fraction, the approximate KL, the mean ratio and `sampler_metrics`. The parts of a minibatch add
  up to its loss.

  Args:
    loss: of `losses.policy`.
    scores: of the policy, [B, T].
    batch: its rows are `Learned`, with advantages; its totals the counts of the whole minibatch.
    hparams: the keywords of the loss; `stale_above` is used if present.
    options: `max_new_tokens` is read, for aggregation over a constant.
  """
  rows: Learned = batch.rows
  assert rows.advantages is not None
  mask = counted = rows.texts["loss_mask"]
  if rows.kept is not None and loss.loss is gmpo:  # its ratio is a mean over the tokens that are kept
    counted = mask * rows.kept
  tokens = make_tokens(
    scores.logps, rows.old_logps, rows.advantages, counted, ratio=loss.ratio, correction=_correction(rows)
  )
  result = loss.loss(tokens, **own_hparams(loss, hparams))
  losses = result.losses
  if rows.kept is not None:
    losses *= rows.kept
  if "stale_above" in hparams:
    limit = jnp.where(hparams["stale_above"] > 0, hparams["stale_above"], jnp.inf)
    losses *= on_policy(scores.logps, rows.sampler_logps, rows.advantages, mask, threshold=limit)
  drift = jnp.where(mask > 0, scores.logps - rows.old_logps, 0.0)
  metrics: Metrics = {
    "policy/approxkl": token_mean(jnp.square(drift) / 2, batch),
    "policy/clipfrac": token_mean(result.clipped, batch),
    "val/ratio": Mean(token_mean(tokens.ratio, batch), learned(batch)),
  }
  return aggregated(losses, counted, loss, batch, options), metrics | sampler_metrics(scores, batch)


def _correction(rows: Learned) -> jax.Array | float:
  """Returns the weights of tokens for another sampler than the trainer; 1.0 where none was asked for."""
  if rows.correction is None:
    return 1.0
  return rows.correction


def aggregated(losses: jax.Array, mask: jax.Array, loss: PolicyLoss, batch: Batch, options: PassesOptions) -> jax.Array:
  """Sums token losses [B, T] on a mask to a scalar by `loss.aggregation`, each row by its record's weight.

  For terms that are added to the loss, such as the KL, too. The parts of a minibatch add up.
  """
  examples = batch.totals["num_examples"]
  of_step = Counts(batch.totals["num_tokens"], examples, examples * options.max_new_tokens)
  return aggregate(losses * batch.rows.texts["weights"][:, :1], mask, loss.aggregation, of_step)


def kl_loss(scores: TokenScores, loss: PolicyLoss, batch: Batch, options: PassesOptions) -> jax.Array:
  """Returns the KL from the reference as a scalar to add to the loss; the caller multiplies it by the coefficient.

  Args:
    scores: of the policy, [B, T].
    loss: gives the aggregation.
    batch: its rows are `Learned`, with the reference's log-probs.
    options: `kl_estimator` and `kl_in` name the estimator.
  """
  rows: Learned = batch.rows
  assert rows.reference_logps is not None
  estimator = kl_estimator(options.kl_estimator, options.kl_in)
  paid = loss_kl(estimator, scores.logps, rows.reference_logps, rows.old_logps, _correction(rows))
  return aggregated(paid, rows.texts["loss_mask"], loss, batch, options)


def kl_estimator(name: str, place: str) -> str:
  """Returns the name of the KL estimator, or of the default of the place where it is paid if `name` is "".

  Args:
    name: an option `kl_estimator`.
    place: an option `kl_in`: "loss" or "reward"; any other pays nowhere, and takes any known name.

  Raises:
    InputError: an unknown one, or one that means nothing in this place.
  """
  known = (*KL_ESTIMATORS, *CORRECTED)
  if name and name not in known:
    one_of("kl_estimator", name, known)
  if place not in PLACES:
    return name or PLACES["reward"][0]  # paid nowhere
  if name and name not in PLACES[place]:
    why, other = {
      "loss": ("as a loss its gradient is 0 on average, so nothing is paid", "reward"),
      "reward": ("in the reward the policy's gradient is then not that of the KL", "loss"),
    }[place]
    if name in CORRECTED:
      why = "in the reward a token is its sampler's own, and there is no ratio to correct by"
    raise InputError(
      f"algorithm.kl_estimator={name} with algorithm.kl_in={place}: {why}; use "
      f"{' or '.join(PLACES[place])}, leave kl_estimator empty ({PLACES[place][0]}), or pay in algorithm.kl_in={other}"
    )
  return name or PLACES[place][0]


def entropy(scores: TokenScores, batch: Batch) -> jax.Array:
  """Returns this microbatch's part of the minibatch's mean entropy over the tokens that are learned from, in nats.

  As in TRL, it is a mean over tokens, whatever the loss's own aggregation.
  """
  return token_mean(scores.entropy, batch)


def learned(batch: Batch) -> jax.Array:
  """Returns the share, by weight, of the minibatch's learned tokens that these rows have; 0 where there is none."""
  texts = batch.rows.texts
  return jnp.sum(texts["weights"][:, :1] * texts["loss_mask"]) / batch.totals["num_tokens"]


def sampler_metrics(scores: TokenScores, batch: Batch) -> Metrics:
  """Returns the metrics of a policy's scores [B, T]: its entropy, and how far they are from the old ones."""
  rows: Learned = batch.rows
  drift = jnp.where(rows.texts["loss_mask"] > 0, scores.logps - rows.old_logps, 0.0)
  return {
    "policy/entropy": Mean(entropy(scores, batch), learned(batch)),
    OFF: token_mean(is_off(drift), batch),
    DRIFT: token_mean(jnp.abs(drift), batch),
  }


def token_mean(x: jax.Array, batch: Batch) -> jax.Array:
  """Returns this microbatch's part of the weighted mean of x [B, T] over the minibatch; the parts add up to it.

  The mean is over the tokens of the loss mask; what x has elsewhere is ignored.
  """
  texts = batch.rows.texts
  return jnp.sum(texts["weights"][:, :1] * jnp.where(texts["loss_mask"] > 0, x, 0.0)) / batch.totals["num_tokens"]


def row_mean(x: jax.Array, batch: Batch) -> jax.Array:
  """Returns this microbatch's part of the weighted mean of x [B] over the whole minibatch; the parts add up to it."""
  return jnp.sum(batch.rows.texts["weights"][:, 0] / batch.totals["num_examples"] * x)


def scored_means(values: Mapping[str, jax.Array], batch: Batch) -> Metrics:
  """Returns {name: Mean} of values [B] over the rows that have a score, learned from or not; no mean without any."""
  weights = batch.rows.outcome.weights / batch.totals["num_scored"]
  return {name: Mean(jnp.sum(weights * x), weights.sum()) for name, x in values.items()}


def metrics(batch: Batch) -> Metrics:
  """Returns the metrics that are known before the update: of completions over all, of rewards over those that have one.

  The rows are `ScoredRows`; the totals have `counts`, and "occupancy" and `SAMPLING` as far as they are known.
  """
  rows, totals = batch.rows, batch.totals
  outcome: Outcome = rows.outcome
  prompted = outcome.prompted / totals["num_prompted"]

  def over_all(x):
    return jnp.sum(prompted * x)

  means = scored_means({"objective/scores": outcome.scores}, batch) | {
    "completions/mean_length": over_all(outcome.lengths),
    "completions/clipped_ratio": over_all(1 - outcome.finished),
    SIGNAL: row_mean(rows.told, batch),
    "rewards/failed": over_all(outcome.failed),
  }
  if "occupancy" in totals:
    means["rollout/occupancy"] = over_all(totals["occupancy"])
  if outcome.steps is not None:
    means["completions/steps"] = over_all(outcome.steps)
  means |= {f"domain/{name}": over_all(value) for name, value in outcome.domain.items()}
  means |= {name: over_all(jnp.full_like(outcome.scores, totals[name])) for name in SAMPLING if name in totals}
  for name, value in outcome.each.items():
    applies = ~jnp.isnan(value)
    total = jnp.sum(prompted * jnp.where(applies, value, 0.0))
    means[f"rewards/{name}"] = Mean(total, jnp.sum(prompted * applies))
  return means


def tolerated(dtype: str, sampling: SamplingOptions, update: UpdateOptions) -> dict[str, float]:
  """Returns {metric: the most it may be} for `finish`; in narrow floats, in units of the metric TOLERATED.

  In float32 no token's ratio may be off before the first update of an iteration, but for a truncated sampler: it has an
  edge, where a rounding error adds or removes a token.

  Args:
    dtype: the model's.
    sampling: `top_k` and `top_p` are read, in float32.
    update: `old_logps` is read, in narrow floats.
  """
  if is_low(dtype):
    return {f"{DIFFERENCE}/mean": 1.0, DRIFT: 1.0 if update.old_logps == "sampler" else SAME_PROGRAM}
  share = 0.01 if sampling.top_k or sampling.top_p < 1 else 0.0
  return {OFF: share, SAMPLER_OFF: share}


def finish(metrics: Mapping[str, float | Mean], tolerated: Mapping[str, float]) -> dict[str, float]:
  """Returns the numbers to log; beside a reward that does not apply everywhere, its share as rewards/NAME/scored.

  Args:
    metrics: on the host.
    tolerated: of `tolerated`; {} checks nothing.

  Raises:
    InputError: trainer and sampler, or the trainer's two forward passes, score the same tokens more differently than
      is tolerated.
  """
  numbers = divided(metrics)
  numbers.pop(SIGNAL, None)
  for name, most in tolerated.items():
    if numbers.get(name, 0.0) > (most := most * numbers.get(TOLERATED, 1.0)):
      raise InputError(_disagreement(name, numbers[name], most))
  for name, value in metrics.items():
    if not isinstance(value, Mean) or not name.startswith("rewards/"):
      continue
    if value.count and not math.isclose(value.count, 1.0, rel_tol=1e-4):
      numbers[f"{name}/scored"] = value.count
  return numbers


def _disagreement(name: str, value: float, most: float) -> str:
  """Returns the error's text where the metric `name` has a value above `most`."""
  if name in (OFF, SAMPLER_OFF):
    what = f"the trainer's probability of {value:.2%} of tokens is off the sampler's by more than {TOLERANCE:.0e}"
    remedy = (
      "see that matmuls run in float32 (jax_default_matmul_precision=highest), and that the model's cache is right"
    )
  else:
    pair = "two forward passes of the trainer" if name == DRIFT else "the trainer and the sampler"
    what = f"{pair} score a token {value:.2g} nats apart on average, where {most:.2g} are tolerated ({name})"
    remedy = "see that the model's cache is right and its forward pass draws nothing, or use model.dtype=float32"
  return (
    f"before the first update of an iteration, {what}: the gradient would be of another policy's samples. Cached "
    f"decoding and the full forward pass must agree: {remedy}"
  )
