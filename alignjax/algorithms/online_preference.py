"""Preference optimisation on pairs of the policy's own completions: online DPO, with any loss for pairs, and XPO.

One iteration: every prompt gets `num_generations` completions, rewards score them, and the best and the worst are a
pair, which algorithms/preference.py learns from as if it came from a file. XPO (`second` = "reference") draws the
second completion from the reference and is paid for leaving it.

The losses score the policy at temperature 1 whatever the sampler's is: they are about the model, not about how pairs
were found.

Source: Guo et al. 2024 (arXiv:2402.04792); XPO: Xie et al. 2024 (arXiv:2405.21046)
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from alignjax.algorithms import policy_update, preference, rollout
from alignjax.algorithms.algorithm import Algorithm, one_of
from alignjax.algorithms.rollout import ENDLESS, Special
from alignjax.errors import InputError
from alignjax.model.decoder import Model
from alignjax.system import ranges
from alignjax.system.ranges import NonNegative
from alignjax.types import Batch

HEAD = "none"
LOSSES = {name: loss for name, loss in preference.LOSSES.items() if name != "tpo"}  # which needs a third completion
MODELS = rollout.MODELS
PAIR_OPTIONS = ("divergence", "ld_alpha", "weighting", "reference", "sync_every", "sync_mix")
OPTIONS = rollout.OPTIONS | {
  "num_generations": 2,  # of each prompt; the best and the worst are the pair
  "second": "policy",  # who writes every prompt's last completion: "policy", or "reference" (XPO)
  **{name: preference.OPTIONS[name] for name in PAIR_OPTIONS},
}
RANGES = rollout.RANGES | preference.RANGES | {"xpo_alpha": NonNegative}
SECONDS = ("policy", "reference")
BONUS = {"xpo_alpha": 1e-5}  # XPO: weight of the log-probability of the reference's completion


def data(loss: str = "", **options) -> str:
  """The kind of records."""
  del loss, options
  return "prompt"


def hparams(loss: str = "", **options) -> dict[str, float]:
  """The traced hyper-parameters: the sampler's, and those of the loss.

  Raises:
    InputError: an unknown loss, or a combination that means nothing.
  """
  o = OPTIONS | options
  ranges.check_all("algorithm", o, RANGES)
  one_of("second", o["second"], SECONDS)
  if preference.likelihood_of(loss) == "third":
    raise InputError(f"algorithm.loss={loss}: needs a third completion, which no sampler gives; use another loss")
  bonus = BONUS if o["second"] == "reference" else {}
  return rollout.HPARAMS | preference.hparams(loss, **_of_pairs(o)) | bonus


def make(model: Model, loss: str = "", microbatches: int = 1, special: Special = ENDLESS, **options) -> Algorithm:
  """Preference optimisation of `model` on its own completions.

  Args:
    model: policy and reference alike.
    loss: as in `preference.make`.
    microbatches: what needs no gradient takes the rows in so many parts, as the step does.
    special: token ids of the sampler.
    **options: see `OPTIONS`; "reward_model" is its Model, and "domain" too.

  Raises:
    InputError: as `hparams`, or rewards that can not be had.
  """
  hparams(loss, **options)
  o = OPTIONS | options
  rollout.check(o, compared="a pair")
  inner = preference.make(model, loss, microbatches, **_of_pairs(o))
  models = rollout.models(o)
  explores = o["second"] == "reference"
  objective = preference.make_objective(loss, **_of_pairs(o))

  def sample(frozen, batch, key):
    policy, rest = (model, frozen["policy"]), (batch, key, frozen["hparams"], special, o)
    if not explores:
      return rollout.sample(*policy, *rest)
    return rollout.sample_against(policy, (model, frozen["reference"]), *rest)

  def prepare(frozen, batch, key):
    batch = batch | rollout.judge(models, frozen, batch, special, o)
    pairs = pair_up(batch, o["num_generations"])
    return policy_update.counts(pairs) | inner.prepare(frozen, pairs, key)

  def loss_fn(params, batch, hp):
    scores = preference.token_scores(model, params, batch, log_sum_sq_probs=o["weighting"] == "wpo")
    total, metrics = objective(scores, batch, hp)
    metrics |= policy_update.metrics(batch)
    if explores:
      logps = preference.side_sums(scores.logps * batch["loss_mask"], batch)
      bonus = policy_update.row_mean(jnp.sum(logps[:, 0] * batch["from_other"], axis=-1), batch)
      total, metrics["loss/bonus"] = total + hp["xpo_alpha"] * bonus, bonus
    return total, metrics

  return Algorithm(
    prepare,
    loss_fn,
    count="num_examples",
    # In one order on every host: trees are saved and loaded in it.
    frozen=tuple(dict.fromkeys((*inner.frozen, *(("reference",) if explores else ()), "policy", "hparams", *models))),
    synced=inner.synced,
    models=models,
    finish=functools.partial(policy_update.finish, tolerated={}),
    rollout=sample,
  )


def pair_up(batch: Batch, group: int) -> Batch:
  """Rows [P, 2T] of the best (segment 1) and the worst (segment 2) of each prompt's completions, of equals the first.

  A prompt with fewer than two judged completions, or whose best and worst are the same tokens, weighs nothing.
  """
  grouped = {name: x.reshape(-1, group, *x.shape[1:]) for name, x in batch.items() if x.ndim}
  judged = grouped["weights"][..., 0] > 0
  scores = grouped["scores"]
  best = jnp.argmax(jnp.where(judged, scores, -jnp.inf), axis=1)
  # From the end, so that of equals the pair is two completions.
  worst = group - 1 - jnp.argmin(jnp.where(judged, scores, jnp.inf)[:, ::-1], axis=1)
  sides = jnp.stack([best, worst], axis=1)
  take = lambda x: jnp.take_along_axis(x, sides.reshape(*sides.shape, *(1,) * (x.ndim - 2)), axis=1)
  wide = lambda name: take(grouped[name]).reshape(len(sides), -1)
  tokens = take(grouped["tokens"])
  best_score = jnp.max(jnp.where(judged, scores, -jnp.inf), axis=1)
  worst_score = jnp.min(jnp.where(judged, scores, jnp.inf), axis=1)
  differ = jnp.any(tokens[:, 0] != tokens[:, 1], axis=-1) & (judged.sum(axis=1) > 1)
  picked = take(grouped["segment_ids"])
  mean = lambda x: jnp.nanmean(x, axis=1)
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
      "judged": grouped["weights"].max(axis=(1, 2)),
      "told": (best_score > worst_score).astype(jnp.float32),
      "scores": jnp.sum(jnp.where(judged, scores, 0.0), axis=1) / jnp.maximum(judged.sum(axis=1), 1),
      **({"from_other": take(grouped["from_other"])} if "from_other" in grouped else {}),
    }
  )


def _of_pairs(o: Mapping[str, Any]) -> dict[str, Any]:
  return {name: o[name] for name in PAIR_OPTIONS}
