"""Shared rollouts of online algorithms: completions of the policy as rows to learn from, and their worth.

A row is [pads | prompt | completion | pads]: T = data.row_length + max_new_tokens columns. The completions of a prompt
are neighbours, B = data.rows * num_generations rows in all. Everything that is per token is [B, T], belongs to the
token in its column, and is 0 where `loss_mask` is.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import rewards
from alignjax.algorithms import reward_domain, step_reward
from alignjax.algorithms.algorithm import Parts, Special, one_of
from alignjax.algorithms.reward import last_states
from alignjax.algorithms.sampling_options import SamplingOptions
from alignjax.errors import InputError
from alignjax.losses.logps import TokenScores, token_scores
from alignjax.losses.support import Support
from alignjax.model.attention.form import Segments
from alignjax.model.decoder import Model
from alignjax.rewards import Reward
from alignjax.rewards.worth import checked, worth
from alignjax.sampling.generate import generate
from alignjax.sampling.queue import generate_queue
from alignjax.system import ranges
from alignjax.system.sharding import constrain
from alignjax.types import Batch, HParams, Params, Trees

ENSEMBLES = ("mean", "min", "lower")
MODELS = {"reward_model": "scalar", "domain": "scalar"}
IN_GRAPH = "reward_model"
Heads = TypeVar("Heads", jax.Array, np.ndarray)


def check(options: SamplingOptions, compared: str = "") -> None:
  """Raises InputError where an option has no meaning.

  Args:
    options: of an algorithm that samples.
    compared: what a prompt's completions are, such as "a pair", which needs two; "" where each is for itself.
  """
  one_of("ensemble", options.ensemble, ENSEMBLES)
  step_reward.check(options.step_reward, options.reward_model, options.domain, compared)
  if compared and options.num_generations < 2:
    raise InputError(f"algorithm.num_generations={options.num_generations}: {compared} needs at least 2")
  wanted = weights(options)
  if not any(wanted.values()):
    raise InputError(f"algorithm.rewards={options.rewards!r}: nothing to learn from; give a reward a weight")
  if (IN_GRAPH in wanted) != bool(options.reward_model):
    raise InputError(
      f"algorithm.rewards={options.rewards!r} with algorithm.reward_model={options.reward_model!r}: name the run of a "
      "reward model, or rewards without it (rewards=gsm8k)"
    )
  if options.domain and not options.reward_model:
    raise InputError(f"algorithm.domain={options.domain}: is a reward model's; name its run in algorithm.reward_model")


def models(parts: Parts) -> dict[str, Model]:
  """Returns the models of the parts that score completions: the reward model, and its domain."""
  scoring = dict(parts.models)
  if "domain" in scoring:
    scoring["domain"] = reward_domain.of(scoring["domain"])
  return scoring


def weights(options: SamplingOptions) -> dict[str, float]:
  """Parses `options.rewards` into {name: weight}, the reward model's first; 0 where it is logged and not learned from.

  Raises:
    InputError: as `rewards.weights`, or a weight is no finite number.
  """
  terms = options.rewards.split("+")
  weight_of: dict[str, float] = {}
  for written in (term.partition(":")[2] for term in terms if term.partition(":")[0] == IN_GRAPH):
    try:
      weight_of[IN_GRAPH] = float(written or 1)
    except ValueError as error:
      remedy = f"write {IN_GRAPH}:0.5, and give a module of your own another name"
      raise InputError(f"algorithm.rewards={options.rewards!r}: {written!r} is no number; {remedy}") from error
  weight_of |= rewards.weights(_host_spec(options))
  for name, weight in weight_of.items():
    ranges.check(f"algorithm.rewards={options.rewards!r}: the weight of {name}", weight, ranges.Finite)
  return weight_of


def host_rewards(options: SamplingOptions) -> dict[str, Reward]:
  """Makes the rewards that are Python functions, by name; the reward model's is not among them.

  Raises:
    InputError: as `rewards.make`.
  """
  return rewards.make(_host_spec(options), **options.reward_settings)


def _host_spec(options: SamplingOptions) -> str:
  """Returns the part of `rewards` that names Python functions."""
  return "+".join(term for term in options.rewards.split("+") if term.partition(":")[0] != IN_GRAPH)


def support(special: Special, options: SamplingOptions) -> Support:
  """Returns the tokens that may be sampled, and that the trainer scores; a pad that also ends completions is one."""
  excluded = None if special.pad_id == special.stop_id else special.pad_id
  return Support(excluded, options.top_k or None, None if options.top_p == 1 else options.top_p)


def sample(
  model: Model,
  params: Params,
  batch: Batch,
  key: jax.Array,
  hparams: HParams,
  special: Special,
  options: SamplingOptions,
  first: int = 0,
) -> Batch:
  """Samples `num_generations` completions for each prompt of a batch, as rows with `old_logps`, which sampled them.

  Args:
    model, params: of the policy.
    batch: prompts [P, data.row_length], one in a row.
    key: of the iteration.
    hparams: `temperature` is read.
    special: the tokens that end completions and fill up rows.
    options: `num_generations`, `max_new_tokens`, `slots`, `top_k` and `top_p` are read.
    first: the number of a prompt's first completion: another one, another completion.
  """
  G, N, rule = options.num_generations, options.max_new_tokens, support(special, options)

  def repeat(x):
    return jnp.repeat(x, G, axis=0)

  prompts = {name: repeat(x) for name, x in batch.items() if x.ndim}
  rows = jnp.arange(len(prompts["tokens"]))
  arguments: dict[str, Any] = dict(
    prompts=prompts["tokens"],
    prompt_lengths=prompts["segment_ids"].sum(axis=1),
    key=key,
    prompt_ids=rows // G,  # a record may come twice in a batch: the key has the step, the row the rest
    sample_ids=first + rows % G,
    max_new_tokens=N,
    stop_id=special.stop_id,
    pad_id=rule.excluded,
    temperature=hparams["temperature"],
    top_k=rule.top_k,
    top_p=rule.top_p,
  )
  scalars = {name: x for name, x in batch.items() if not x.ndim}
  if options.slots:
    samples, occupancy = generate_queue(model, params, slots=options.slots, **arguments)
    scalars["occupancy"] = occupancy.share
  else:
    samples = generate(model, params, **arguments)

  def joined(x, y):
    return jnp.concatenate([x, y.astype(x.dtype)], axis=1)

  mask = samples.mask * prompts["example_mask"]  # a row without a prompt has no completion
  segment_ids = joined(prompts["segment_ids"], mask)
  columns = {
    "tokens": joined(prompts["tokens"], samples.tokens),
    "segment_ids": segment_ids,
    "positions": jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0) * segment_ids,
    "loss_mask": joined(prompts["loss_mask"] * 0, mask),
    "old_logps": joined(jnp.zeros(prompts["tokens"].shape, samples.logps.dtype), samples.logps * mask),
    "lengths": mask.sum(axis=1),
    "finished": samples.finished.astype(jnp.float32),
  }
  return prompts | columns | scalars


def sample_against(
  policy: tuple[Model, Params],
  other: tuple[Model, Params],
  batch: Batch,
  key: jax.Array,
  hparams: HParams,
  special: Special,
  options: SamplingOptions,
) -> Batch:
  """Samples as `sample`, but the last completion of each prompt is of another model: `from_other` [B] is 1 there.

  Args:
    policy, other: (model, params) of the first num_generations - 1 completions, and of the last.
  """
  G = options.num_generations

  def draw(who: tuple[Model, Params], count: int, first: int) -> Batch:
    model, params = who
    counted = dataclasses.replace(options, num_generations=count)
    return sample(model, params, batch, key, hparams, special, counted, first=first)

  mine = draw(policy, G - 1, 0)
  others = draw(other, 1, G - 1)
  mine["from_other"] = jnp.zeros(len(mine["tokens"]))
  others["from_other"] = jnp.ones(len(others["tokens"]))

  def join(x, last):
    grouped = jnp.concatenate([x.reshape(-1, G - 1, *x.shape[1:]), last[:, None]], axis=1)
    return constrain(grouped.reshape(-1, *x.shape[1:]), "batch", *(None,) * (x.ndim - 1))

  return {name: join(x, others[name]) if x.ndim else x for name, x in mine.items()}


def completion_scores(
  model: Model, params: Params, batch: Batch, hparams: HParams, special: Special, options: SamplingOptions, **also: bool
) -> tuple[TokenScores, jax.Array]:
  """Computes the scores [B, T] of the completions' tokens under the sampler's distribution, and the states [B, T, D].

  Scores are 0 off the loss mask, and in the columns of the prompt.

  Args:
    model, params: policy or reference.
    batch: rows of `sample`.
    hparams: `temperature` is read.
    special, options: of the sampler.
    **also: of `losses.logps.token_scores`, such as entropy=True.
  """
  N = options.max_new_tokens
  hidden, _ = model.forward(params, batch["tokens"], Segments(batch["segment_ids"], most=1), batch["positions"])
  prompt_columns = batch["tokens"].shape[1] - N
  scores = token_scores(
    hidden[:, prompt_columns - 1 : -1],
    model.unembedding(params),
    batch["tokens"][:, prompt_columns:],
    temperature=hparams["temperature"],
    support=support(special, options),
    **also,
  )
  mask = batch["loss_mask"][:, prompt_columns:]

  def widen(x):
    return jnp.pad(jnp.where(mask > 0, x, 0.0), ((0, 0), (prompt_columns, 0)))

  return TokenScores(*map(widen, scores)), hidden


def score(models: Mapping[str, Model], trees: Trees, batch: Batch, special: Special, options: SamplingOptions) -> Batch:
  """Computes columns with what the completions are worth.

  - raw_scores [B]: the weighted sum of the rewards that apply; 0 where none does.
  - scores [B]: the same less the penalty of a missing end. What else shapes scores is taken off these, before anything
    is made of them.
  - weights [B, 1]: the record's; 0 where none does or one failed, and so is the row's loss_mask: it counts for nothing.
  - scored, prompted [B]: these weights, for means of what is known before the update; and the record's own.
  - failed [B]: 1 where a reward that counts gave no number, or the sum is not finite or beyond `LARGEST`.
  - reward/NAME [B]: each alone, NaN where it does not apply.
  - steps [B], step_scores [B, T]: of a process reward model, how many steps, and what of the score each is paid.
  - domain/NAME [B]: where they lie in the reward model's domain, where there is one.

  Args:
    models: of `models`.
    trees: `others` has the parameters of these models; hparams must be there.
    batch: rows of `sample`, with "host_rewards" [B, R] of the Python functions, in the order of `weights`, if there are
      any, and "host_failed" [B] (0 if absent).
    special: `stop_id` and `step_ends` are read, for step_reward alone.
    options: of an algorithm that samples.
  """
  hparams = trees.hparams
  assert hparams is not None
  wanted = weights(options)
  values: dict[str, jax.Array] = {}
  extra: Batch = {}
  if options.step_reward:
    logits = step_reward.scores(models[IN_GRAPH], trees.others[IN_GRAPH], batch)
    ends = step_reward.ends(batch["tokens"], batch["loss_mask"], special.stop_id, special.step_ends)
    values[IN_GRAPH] = step_reward.together(logits, ends, options.step_reward)
    extra["steps"] = ends.sum(axis=1).astype(jnp.float32)
    if options.step_reward == step_reward.EACH:
      extra["step_scores"] = wanted[IN_GRAPH] * jnp.where(ends, jax.nn.sigmoid(logits), 0.0)
  elif IN_GRAPH in wanted:
    features, heads = (x[:, 0] for x in last_states(models[IN_GRAPH], trees.others[IN_GRAPH], batch, 1))
    values[IN_GRAPH] = pooled(heads, options.ensemble, hparams["ensemble_k"])
    if "domain" in models:
      extra = reward_domain.place(trees.others["domain"], features, heads.mean(axis=-1))
  exists = batch["example_mask"][:, 0] > 0
  failed = batch.get("host_failed", jnp.zeros(len(exists))) > 0
  if IN_GRAPH in values:  # a Python function's are looked at where it is called
    values[IN_GRAPH], unusable = checked(values[IN_GRAPH])
    failed |= unusable & (wanted[IN_GRAPH] != 0)
  others = [name for name in wanted if name != IN_GRAPH]
  values |= {name: batch["host_rewards"][:, column] for column, name in enumerate(others)}
  scores, counts, failed = worth(values, wanted, failed)
  failed &= exists
  scored = counts & exists
  counted = jnp.where(scored, batch["weights"][:, 0], 0.0)
  penalty = hparams["missing_eos_penalty"] * (1 - batch["finished"])
  return {
    "raw_scores": jnp.where(scored, scores, 0.0),
    "scores": jnp.where(scored, scores - penalty, 0.0),
    "weights": counted[:, None],
    "scored": counted,
    "prompted": batch["weights"][:, 0] * exists,
    "failed": failed.astype(jnp.float32),
    "loss_mask": batch["loss_mask"] * (counted > 0)[:, None],
    **{f"reward/{name}": value for name, value in values.items()},
    **extra,
  }


def pooled(heads: Heads, ensemble: str, k: float | jax.Array = 1.0) -> Heads:
  """Pools the rewards [B, K] of an ensemble's heads to one [B], of NumPy or JAX alike.

  Args:
    ensemble: "mean", "min" or "lower" (mean - k std).
    k: standard deviations that "lower" takes off.

  Source: Coste et al. 2024 (arXiv:2310.02743): "min" is worst-case optimisation, "lower" uncertainty-weighted.
  """
  mean = heads.mean(axis=-1)
  return {"mean": mean, "min": heads.min(axis=-1), "lower": mean - k * heads.std(axis=-1)}[ensemble]
