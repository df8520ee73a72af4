"""Preference optimisation on single completions, each labelled desirable or undesirable: KTO and its relatives."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, Column, keywords, segments, weighted_sum
from alignjax.losses.aggregation import divisor
from alignjax.losses.logps import next_token_logps, segment_sum
from alignjax.losses.unpaired import LOSSES, Judged, clamped_kl, update_mean
from alignjax.model.decoder import Model
from alignjax.system.microbatch import map_over_microbatches
from alignjax.types import Batch, HParams, Metrics, Params

HEAD = "none"
OPTIONS: dict[str, object] = {}
RUNNING = {"mean_ratio": 0.0, "ratio_count": 0.0}  # of `bco`
BESIDE = ("tokens", "segment_ids", "positions", "loss_mask")  # with "kl_" before: the mismatched rows


def data(loss: str = "") -> str:
  """The kind of records: `kto` needs mismatched completions beside them."""
  return "mismatched" if "kto" in weighted_sum(loss, LOSSES) else "unpaired"


def hparams(loss: str = "") -> dict[str, float]:
  """The keywords of a loss, or of a weighted sum of losses.

  Raises:
    InputError: an unknown name, or a weight that is no number.
  """
  return keywords(*(LOSSES[name] for name in weighted_sum(loss, LOSSES)))


def make(model: Model, loss: str = "", microbatches: int = 1) -> Algorithm:
  """Optimisation of `model` on labelled completions.

  Args:
    model: policy and reference alike.
    loss: a name of `LOSSES`, or several with weights; "kto" if empty.
    microbatches: what needs no gradient takes the rows in so many parts, as the step does.

  Raises:
    InputError: as `hparams`.
  """
  names, objective = weighted_sum(loss, LOSSES).keys(), make_objective(loss)

  def score(params, batch):
    return map_over_microbatches(lambda part: logps(model, params, part), batch, microbatches)

  def prepare(frozen, batch, key):
    del key
    if "reference_logps" not in batch:
      batch = batch | {"reference_logps": score(frozen["reference"], batch)}
    mismatched = policy = None
    if "kto" in names:
      beside = batch | {name: batch[f"kl_{name}"] for name in BESIDE}
      mismatched = score(frozen["policy"], beside) - score(frozen["reference"], beside)
    if "bco" in names:
      policy = score(frozen["policy"], batch)
    return batch | step_columns(batch, mismatched, policy)

  return Algorithm(
    prepare,
    lambda params, batch, hparams: objective(logps(model, params, batch), batch, hparams),
    count="num_examples",
    frozen=("reference", *(("policy",) if names & {"kto", "bco"} else ())),
    running=RUNNING if "bco" in names else {},
    # What kto asks of the reference depends on who meets whom in a batch.
    columns={} if "kto" in names else {"reference_logps": Column("reference", score, (), {})},
    finish=by_class,
  )


def step_columns(batch: Batch, mismatched: jax.Array | None = None, policy: jax.Array | None = None) -> Batch:
  """The count of the whole step, and the scalars by which its examples meet.

  Args:
    batch: of the whole step, with `reference_logps` [B, P], and for `bco` the statistics in `RUNNING`.
    mismatched: log-ratios [B, P] of mismatched completions, for `kto`.
    policy: log-probabilities [B, P], for `bco`.
  """
  weights = batch["weights"]
  columns = {"num_examples": divisor(weights.sum())}
  if mismatched is not None:
    columns["kl"], columns["kl_variance"] = clamped_kl(mismatched, weights)
  if policy is not None:
    ratio = policy - batch["reference_logps"]
    mean, count = update_mean(batch["mean_ratio"], batch["ratio_count"], ratio, weights)
    columns |= {"mean_ratio": mean, "ratio_count": count}
  return columns


def make_objective(loss: str = "") -> Callable[[jax.Array, Batch, HParams], tuple[jax.Array, Metrics]]:
  """Returns f(logps [B, P], prepared batch, hparams) -> (loss, metrics): all that comes after the model.

  Metrics of a class are sums over it, divided by all examples; `by_class` makes means of them.
  """
  weights = weighted_sum(loss, LOSSES)
  wanted = lambda f, hparams: {name: hparams[name] for name in keywords(f)}

  def objective(logps, batch, hparams):
    constants = {name: batch[name] for name in ("kl", "mean_ratio") if name in batch}
    judged = Judged(logps - batch["reference_logps"], batch["labels"], **constants)
    losses = sum(weight * LOSSES[name](judged, **wanted(LOSSES[name], hparams)) for name, weight in weights.items())
    mean = lambda x: jnp.sum(batch["weights"] / batch["num_examples"] * x)
    metrics = {}
    for side, of_side in (("chosen", judged.desirable), ("rejected", 1 - judged.desirable)):
      metrics[f"share/{side}"] = mean(of_side)
      metrics[f"part/rewards/{side}"] = mean(of_side * hparams["beta"] * judged.ratio)
      metrics[f"part/logps/{side}"] = mean(of_side * logps)
    for name in ("kl", "kl_variance"):
      if name in batch:
        metrics[name] = mean(jnp.full_like(logps, batch[name]))
    if "mean_ratio" in batch:
      metrics["delta"] = mean(jnp.full_like(logps, hparams["beta"] * batch["mean_ratio"]))
    return mean(losses), metrics

  return objective


def by_class(metrics: dict[str, float]) -> dict[str, float]:
  """Metrics with means over each class in place of its parts; a class of which there is no example has none."""
  out = {name: value for name, value in metrics.items() if not name.startswith("part/")}
  for side in ("chosen", "rejected"):
    if share := metrics[f"share/{side}"]:
      out |= {f"{name}/{side}": metrics[f"part/{name}/{side}"] / share for name in ("rewards", "logps")}
  if metrics["share/chosen"] and metrics["share/rejected"]:
    out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
  return out


def logps(model: Model, params: Params, batch: Batch) -> jax.Array:
  """Log-probabilities of the completions, [B, P] in nats; 0 where there is none."""
  hidden, _ = model.forward(params, batch["tokens"], segments(batch), batch["positions"])
  scores = next_token_logps(hidden, model.unembedding(params), batch["tokens"])
  return segment_sum(scores * batch["loss_mask"], batch["segment_ids"], batch["example_mask"].shape[1])
