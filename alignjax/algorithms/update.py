"""What the updates of online algorithms share: a policy's loss on the rows that `rollout` made, and what is logged.

A minibatch has some of an iteration's rows, and the counts of them all, by which every mean divides.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import keywords
from alignjax.errors import InputError
from alignjax.losses.aggregation import Counts, aggregate
from alignjax.losses.logps import TokenScores
from alignjax.losses.policy import PolicyLoss, make_tokens
from alignjax.losses.token_weight import on_policy
from alignjax.types import Batch, HParams, Metrics

TOLERANCE = 1e-3  # by which a ratio may differ from 1 before the first update of an iteration, in float32
OFF = "policy/off"  # metric: the share of tokens where it differs by more


def counts(batch: Batch) -> Batch:
  """The numbers that a loss over these rows divides by."""
  return {
    "num_examples": jnp.maximum(batch["weights"].sum(), 1.0),
    "num_tokens": jnp.maximum(batch["loss_mask"].sum(), 1.0),
    "num_prompted": jnp.maximum(batch["example_mask"].sum(), 1.0),
  }


def policy_loss(
  loss: PolicyLoss, scores: TokenScores, batch: Batch, hparams: HParams, o: Mapping[str, Any]
) -> tuple[jax.Array, Metrics]:
  """One number of a policy's scores [B, T] on the rows of a batch with `advantages` [B, T], and what it looks like."""
  mask = batch["loss_mask"]
  tokens = make_tokens(
    scores.logps,
    batch["old_logps"],
    batch["advantages"],
    mask,
    ratio=loss.ratio,
    correction=batch.get("correction", 1.0),
  )
  found = loss.loss(tokens, **{name: hparams[name] for name in keywords(loss.loss)})
  examples = batch["num_examples"]
  losses = found.losses * batch.get("kept", 1.0)
  if "stale_above" in hparams:
    limit = jnp.where(hparams["stale_above"] > 0, hparams["stale_above"], jnp.inf)
    losses *= on_policy(scores.logps, batch["old_logps"], batch["advantages"], mask, threshold=limit)
  total = aggregate(
    losses, mask, loss.aggregation, Counts(batch["num_tokens"], examples, examples * o["max_new_tokens"])
  )
  drift = jnp.where(mask > 0, scores.logps - batch["old_logps"], 0.0)
  return total, {
    "policy/approxkl": token_mean(jnp.square(drift) / 2, batch),
    "policy/clipfrac": token_mean(found.clipped, batch),
    "val/ratio": token_mean(tokens.ratio, batch),
  } | sampler_metrics(scores, batch)


def sampler_metrics(scores: TokenScores, batch: Batch) -> Metrics:
  """Of a policy's scores [B, T]: its entropy, and the share of tokens that the sampler's probability is off for."""
  drift = jnp.where(batch["loss_mask"] > 0, scores.logps - batch["old_logps"], 0.0)
  return {
    "policy/entropy": token_mean(scores.entropy, batch),
    OFF: token_mean(jnp.abs(jnp.expm1(drift)) > TOLERANCE, batch),
  }


def token_mean(x: jax.Array, batch: Batch) -> jax.Array:
  """The mean of x [B, T] over the tokens of a minibatch that `batch` has some rows of."""
  return jnp.sum(jnp.where(batch["loss_mask"] > 0, x, 0.0)) / batch["num_tokens"]


def row_mean(x: jax.Array, batch: Batch) -> jax.Array:
  """The mean of x [B] over the rows of a minibatch that `batch` has some of, by their weights."""
  return jnp.sum(batch["weights"][:, 0] / batch["num_examples"] * x)


def metrics(batch: Batch) -> Metrics:
  """Means over the rows of what is known before the update; parts of means where a reward may be missing."""
  there = batch["example_mask"][:, 0] / batch["num_prompted"]
  found = {
    "objective/scores": row_mean(batch["scores"], batch),
    "completions/mean_length": row_mean(batch["lengths"], batch),
    "completions/clipped_ratio": row_mean(1 - batch["finished"], batch),
  }
  if "occupancy" in batch:
    found["rollout/occupancy"] = row_mean(batch["occupancy"], batch)
  if "steps" in batch:
    found["completions/steps"] = row_mean(batch["steps"], batch)
  found |= {name: row_mean(batch[name], batch) for name in batch if name.startswith("domain/")}
  if "host_failed" in batch:
    found["rewards/failed"] = jnp.sum(there * batch["host_failed"])
  for name in (name for name in batch if name.startswith("reward/")):
    key, applies = f"rewards/{name.removeprefix('reward/')}", ~jnp.isnan(batch[name])
    found[f"part/{key}"] = jnp.sum(there * jnp.where(applies, batch[name], 0.0))
    found[f"share/{key}"] = jnp.sum(there * applies)
  return found


def tolerated(dtype: str, o: Mapping[str, Any]) -> float:
  """The share of tokens whose ratio may be off before the first update of an iteration.

  None in float32. A truncated sampler has an edge, where a rounding error adds or removes a token; and in bfloat16 the
  cached and the full forward pass round differently.
  """
  if dtype != "float32":
    return 1.0
  return 0.01 if o["top_k"] or o["top_p"] < 1 else 0.0


def finish(found: dict[str, float], tolerated: float) -> dict[str, float]:
  """Metrics with the mean of each reward over the completions that it judged; one that judged none has none.

  Raises:
    InputError: trainer and sampler score more than the tolerated share of the same tokens differently.
  """
  if found.get(OFF, 0.0) > tolerated:
    raise InputError(
      f"before the first update of an iteration, the trainer's probability of {found[OFF]:.2%} of tokens is off the "
      f"sampler's by more than {TOLERANCE:.0e}: the gradient would be of another policy's samples. Cached decoding and "
      "the full forward pass must agree: see that matmuls run in float32 (jax_default_matmul_precision=highest), "
      "and that the model's cache is right"
    )
  out = {name: value for name, value in found.items() if not name.startswith(("part/", "share/"))}
  for name in (name.removeprefix("share/") for name in found if name.startswith("share/")):
    if share := found[f"share/{name}"]:
      out[name] = found[f"part/{name}"] / share
      if not math.isclose(share, 1.0, rel_tol=1e-4):
        out[f"{name}/judged"] = share
  return out
