"""Preference optimisation on pairs: a policy, for most losses a reference, and one of `LOSSES` or a sum of several."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, Column, Sync, keywords, one_of, segments, weighted_sum
from alignjax.errors import InputError
from alignjax.losses import preference, reference_free
from alignjax.losses.aggregation import divisor
from alignjax.losses.divergence import DIVERGENCES
from alignjax.losses.logps import TokenScores, next_token_scores, segment_sum
from alignjax.losses.preference import COUPLED, DIVERGENT, Pair, make_pair, per_token
from alignjax.model.decoder import Model
from alignjax.system import ranges
from alignjax.system.microbatch import map_over_microbatches
from alignjax.system.ranges import Count, Share, ShareAboveZero
from alignjax.types import Batch, HParams, Metrics, Params

HEAD = "none"
LOSSES = preference.LOSSES | reference_free.LOSSES
NEEDS_REFERENCE = preference.LOSSES.keys() - {"sft"}
HAS_LIKELIHOOD = ("sft", "orpo", "cpo", "cpo_simpo", "tpo")
OPTIONS: dict[str, Any] = {
  "reference": "",  # "frozen", "none" (of probability 1), "sync" (TR-DPO); "": "frozen" if the loss needs one
  "sync_every": 512,  # "sync": steps between its moves
  "sync_mix": 0.6,  # "sync": the policy's share in a move
  "divergence": "reverse_kl",  # one of losses.divergence.DIVERGENCES
  "ld_alpha": 1.0,  # weight of tokens beyond the shorter side's length (LD-DPO); 1: as all others
  "weighting": "none",  # "wpo" weighs pairs by how likely the policy itself is to write them
  "likelihood": "",  # whose it is where a loss has such a term: "chosen", or "third" (TPO); "": "third" for tpo alone
}
RANGES = {"sync_every": Count, "sync_mix": ShareAboveZero, "ld_alpha": Share}
REFERENCES, WEIGHTINGS, LIKELIHOODS = ("frozen", "none", "sync"), ("none", "wpo"), ("chosen", "third")


def data(loss: str = "", **options) -> str:
  """The kind of records: with a third completion if the likelihood term is of that one."""
  return "triple" if likelihood_of(loss, **options) == "third" else "preference"


def likelihood_of(loss: str = "", **options) -> str:
  """Whose likelihood the losses take: "chosen" or "third"."""
  default = "third" if "tpo" in weighted_sum(loss, LOSSES) else "chosen"
  return options.get("likelihood") or default


def hparams(loss: str = "", **options) -> dict[str, float]:
  """The traced hyper-parameters of a loss, or of a weighted sum of losses: their keywords.

  Raises:
    InputError: an unknown name or value, or a combination that means nothing.
  """
  weights, o = weighted_sum(loss, LOSSES), OPTIONS | options
  if unknown := options.keys() - OPTIONS.keys():
    raise InputError(f"algorithm.{min(unknown)}: no such option; use {', '.join(OPTIONS)}")
  ranges.check_all("algorithm", o, RANGES)
  one_of("divergence", o["divergence"], DIVERGENCES)
  one_of("weighting", o["weighting"], WEIGHTINGS)
  for key, known in (("reference", REFERENCES), ("likelihood", LIKELIHOODS)):
    if o[key]:
      one_of(key, o[key], known)
  named = lambda condition: ", ".join(name for name in weights if condition(name))
  if o["divergence"] != "reverse_kl" and (names := named(lambda name: name not in DIVERGENT)):
    raise InputError(f"algorithm.divergence={o['divergence']}: has no meaning for {names}; use reverse_kl")
  if o["weighting"] == "wpo" and (names := named(lambda name: name in COUPLED)):
    raise InputError(f"algorithm.weighting=wpo: has no meaning for {names}, which mixes pairs; use none")
  if o["likelihood"] == "third" and not named(lambda name: name in HAS_LIKELIHOOD):
    raise InputError(
      f"algorithm.likelihood=third: {loss or 'dpo'} has no likelihood term; add one: {loss or 'dpo'}+sft"
    )
  if o["reference"] in ("frozen", "sync") and not named(lambda name: name in NEEDS_REFERENCE):
    raise InputError(f"algorithm.reference={o['reference']}: {loss} takes no reference; leave it empty")
  return keywords(*(LOSSES[name] for name in weights), DIVERGENCES[o["divergence"]])


def make(model: Model, loss: str = "", microbatches: int = 1, **options) -> Algorithm:
  """Preference optimisation of `model`.

  Args:
    model: policy and reference alike.
    loss: a name of `LOSSES`, or several with weights: "dpo:0.8+bco_pair:0.2+sft:1"; "dpo" if empty.
    microbatches: what needs no gradient takes the rows in so many parts, as the step does.
    **options: see `OPTIONS`.

  Raises:
    InputError: as `hparams`.
  """
  hparams(loss, **options)
  names, o = list(weighted_sum(loss, LOSSES)), OPTIONS | options
  coupled = [COUPLED[name] for name in names if name in COUPLED]
  kind = o["reference"] or ("frozen" if NEEDS_REFERENCE & set(names) else "none")
  objective = make_objective(loss, **options)
  wpo = o["weighting"] == "wpo"
  sides = 3 if data(loss, **options) == "triple" else 2

  def score(params, batch):
    return map_over_microbatches(
      lambda part: pair_logps(model, params, part, o["ld_alpha"], sides), batch, microbatches
    )

  def prepare(frozen, batch, key):
    del key
    if kind != "none" and "reference_logps" not in batch:
      batch = batch | {"reference_logps": score(frozen["reference"], batch)}
    policy = score(frozen["policy"], batch) if coupled else None
    return batch | step_columns(loss, batch, policy, **options)

  def loss_fn(params, batch, hparams):
    return objective(token_scores(model, params, batch, sides, log_sum_sq_probs=wpo), batch, hparams)

  return Algorithm(
    prepare,
    loss_fn,
    count="num_examples",
    frozen=(*(() if kind == "none" else ("reference",)), *(("policy",) if coupled else ())),
    synced={"reference": Sync(o["sync_every"], o["sync_mix"])} if kind == "sync" else {},
    columns={"reference_logps": Column("reference", score, (2,), {"ld_alpha": o["ld_alpha"]})}
    if kind == "frozen"
    else {},
  )


def step_columns(loss: str, batch: Batch, policy_logps: jax.Array | None = None, **options) -> Batch:
  """Counts of the whole step, and the columns [B, P] by which pairs meet in it.

  Args:
    loss: as in `make`.
    batch: of the whole step, with `reference_logps` [B, P, 2] if there is a reference.
    policy_logps: [B, P, 2], for the losses in `COUPLED`.
    **options: as in `make`.
  """
  count = divisor(batch["weights"].sum())
  tokens = likelihood_sums(batch["loss_mask"], batch, likelihood_of(loss, **options))
  columns = {
    "num_examples": count,
    "mean_nll_tokens": divisor(jnp.sum(batch["weights"] * tokens) / count),
  }
  for match in (COUPLED[name] for name in weighted_sum(loss, LOSSES) if name in COUPLED):
    columns |= match(to_pair(policy_logps, batch), batch["example_mask"])
  return columns


def make_objective(loss: str = "", **options) -> Callable[[TokenScores, Batch, HParams], tuple[jax.Array, Metrics]]:
  """Returns f(scores [B, T], prepared batch, hparams) -> (loss, metrics): all that comes after the model."""
  weights, o = weighted_sum(loss, LOSSES), OPTIONS | options
  first = next(iter(weights))
  wanted = lambda f, hparams: {name: hparams[name] for name in keywords(f)}
  divergence, likely = DIVERGENCES[o["divergence"]], likelihood_of(loss, **options)

  def objective(scores, batch, hparams):
    logps = side_sums(scores.logps * token_weights(batch, o["ld_alpha"]), batch)
    nll = -likelihood_sums(scores.logps * batch["loss_mask"], batch, likely)
    score = lambda ratio: divergence(ratio, **wanted(divergence, hparams))
    pair = to_pair(logps, batch, nll=nll, score=score)
    losses = sum(weight * LOSSES[name](pair, **wanted(LOSSES[name], hparams)) for name, weight in weights.items())
    if o["weighting"] == "wpo":
      losses *= wpo_weights(scores, batch)
    metrics = pair_metrics(pair, hparams)
    mean = lambda x: jnp.sum(batch["weights"] / batch["num_examples"] * x)
    return mean(losses), {name: mean(x) for name, x in metrics.items()}

  def pair_metrics(pair, hparams):
    chosen, rejected = reference_free.LOGPS.get(first, reference_free.sums)(pair)
    metrics = {"logps/chosen": chosen, "logps/rejected": rejected}
    if "beta" in hparams:
      rewards = reference_free.REWARDS.get(first, log_ratios)
      chosen, rejected = (hparams["beta"] * x for x in rewards(pair, **wanted(rewards, hparams)))
      metrics |= {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,  # a tie counts as wrong
      }
    for name in weights:
      metrics |= reference_free.METRICS.get(name, lambda pair: {})(pair)
    return metrics

  return objective


def token_scores(model: Model, params: Params, batch: Batch, sides: int = 2, **also: bool) -> TokenScores:
  """`next_token_scores` of the batch's tokens, of which an example has so many sides."""
  hidden, _ = model.forward(params, batch["tokens"], segments(batch, sides), batch["positions"])
  return next_token_scores(hidden, model.unembedding(params), batch["tokens"], **also)


def pair_logps(model: Model, params: Params, batch: Batch, ld_alpha: float = 1.0, sides: int = 2) -> jax.Array:
  """Log-probabilities of the completions, [B, P, 2] in nats, weighted by `token_weights`; 0 where there is no pair."""
  return side_sums(token_scores(model, params, batch, sides).logps * token_weights(batch, ld_alpha), batch)


def side_sums(values: jax.Array, batch: Batch) -> jax.Array:
  """Sums of values [B, T] over each pair's sides (chosen, rejected), [B, P, 2]; 0 where there is no pair."""
  B, P = batch["example_mask"].shape
  return segment_sum(values, batch["segment_ids"], 2 * P).reshape(B, P, 2)


def likelihood_sums(values: jax.Array, batch: Batch, likelihood: str) -> jax.Array:
  """Sums of values [B, T] over the completions of the likelihood term, [B, P]; third ones are segments from 2P + 1."""
  if likelihood == "chosen":
    return side_sums(values, batch)[..., 0]
  P = batch["example_mask"].shape[1]
  return segment_sum(values, jnp.maximum(batch["segment_ids"] - 2 * P, 0), P)


def token_weights(batch: Batch, ld_alpha: float = 1.0) -> jax.Array:
  """1 for the tokens of a completion, [B, T]; ld_alpha for those that come after as many as the shorter side has.

  In policy and reference alike, as in the paper and TRL 1.x; TRL 0.x weighs the policy alone.

  Source: Liu et al. 2024, eq. 9 (arXiv:2409.06411)
  """
  mask, segments = batch["loss_mask"], batch["segment_ids"]
  if ld_alpha == 1.0:
    return mask
  lengths = side_sums(mask, batch)
  shared = jnp.broadcast_to(lengths.min(axis=-1, keepdims=True), lengths.shape)
  before = jnp.cumsum(lengths.reshape(len(mask), -1), axis=1) - lengths.reshape(len(mask), -1)
  # The number that a token has in its completion, from 1: segments lie in a row one after the other.
  limit = jnp.pad(before + shared.reshape(before.shape), ((0, 0), (1, 0)))  # segment 0 is padding
  beyond = jnp.cumsum(mask, axis=1) > jnp.take_along_axis(limit, segments, axis=1)
  return mask * jnp.where(beyond, ld_alpha, 1.0)


def wpo_weights(scores: TokenScores, batch: Batch) -> jax.Array:
  """w(chosen) * w(rejected), [B, P], constants: near 1 for what the policy itself would write, small for what not.

  w is the exponential of the mean over a completion's tokens of log p - log sum_v p_v^2. Not cut at 1: neither are the
  paper's and TRL 1.x's; TRL 0.x cuts the product.

  Source: Zhou et al. 2024, eq. 4 (arXiv:2406.11827)
  """
  relative = (scores.logps - scores.log_sum_sq_probs) * batch["loss_mask"]
  means = per_token(side_sums(relative, batch), side_sums(batch["loss_mask"], batch))
  return jax.lax.stop_gradient(jnp.exp(means.sum(axis=-1)))


def to_pair(logps: jax.Array, batch: Batch, **more) -> Pair:
  """The Pair of log-probabilities [B, P, 2] and the batch's columns; `more` goes to `make_pair`."""
  reference, lengths = batch.get("reference_logps", jnp.zeros_like(logps)), side_sums(batch["loss_mask"], batch)
  columns = {name: batch[name] for name in Pair._fields if name.startswith("matched") and name in batch}
  return make_pair(
    logps[..., 0],
    logps[..., 1],
    reference[..., 0],
    reference[..., 1],
    chosen_length=lengths[..., 0],
    rejected_length=lengths[..., 1],
    mean_nll_tokens=batch.get("mean_nll_tokens"),
    **more,
  )._replace(**columns)


def log_ratios(pair: Pair) -> tuple[jax.Array, jax.Array]:
  """The rewards of losses with a reference, but for beta, whatever the divergence."""
  return pair.chosen_ratio, pair.rejected_ratio
