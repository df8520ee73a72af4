"""Shared rollouts of online algorithms: completions of the policy as rows to learn from, and their worth.

A row is [pads | prompt | completion | pads]: T = data.row_length + max_new_tokens columns. The completions of a prompt
are neighbours, B = data.rows * num_generations rows in all. Everything that is per token is [B, T], belongs to the
token in its column, and is 0 where `loss_mask` is.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import rewards
from alignjax.algorithms import reward_domain, step_reward
from alignjax.algorithms.algorithm import Parts, Recipe, Special, one_of
from alignjax.algorithms.online_rows import Outcome, Rollout
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
from alignjax.types import Batch, HParams, Params, Rows, Trees

ENSEMBLES = ("mean", "min", "lower")
MODELS = {"reward_model": "scalar", "domain": "scalar"}
IN_GRAPH = "reward_model"
Heads = TypeVar("Heads", jax.Array, np.ndarray)
# Of an algorithm that samples: it learns from prompts.
recipe = functools.partial(Recipe, records=lambda terms, options: "prompt", models=MODELS, online=True)


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
  """Samples `num_generations` completions for each prompt of a batch: a batch whose rows are a `Rollout`.

  With `slots`, its totals have "occupancy", the share of the slots that were busy.

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

  prompts = {name: repeat(x) for name, x in batch.rows.items()}
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
  if options.slots:
    samples, occupancy = generate_queue(model, params, slots=options.slots, **arguments)
    batch = batch.updated(totals={"occupancy": occupancy.share})
  else:
    samples = generate(model, params, **arguments)

  def joined(x, y):
    return jnp.concatenate([x, y.astype(x.dtype)], axis=1)

  mask = samples.mask * prompts["example_mask"]  # a row without a prompt has no completion
  segment_ids = joined(prompts["segment_ids"], mask)
  texts = {
    "tokens": joined(prompts["tokens"], samples.tokens),
    "segment_ids": segment_ids,
    "positions": jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0) * segment_ids,
    "loss_mask": joined(prompts["loss_mask"] * 0, mask),
  }
  found = Rollout(
    texts=prompts | texts,
    logps=joined(jnp.zeros(prompts["tokens"].shape, samples.logps.dtype), samples.logps * mask),
    lengths=mask.sum(axis=1),
    finished=samples.finished.astype(jnp.float32),
  )
  return dataclasses.replace(batch, rows=found)


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
    drawn = sample(model, params, batch, key, hparams, special, counted, first=first)
    from_other = jnp.full(drawn.size, who is other, jnp.float32)
    return dataclasses.replace(drawn, rows=drawn.rows.replace(from_other=from_other))

  mine = draw(policy, G - 1, 0)
  others = draw(other, 1, G - 1)

  def join(x, last):
    grouped = jnp.concatenate([x.reshape(-1, G - 1, *x.shape[1:]), last[:, None]], axis=1)
    return constrain(grouped.reshape(-1, *x.shape[1:]), "batch", *(None,) * (x.ndim - 1))

  return dataclasses.replace(mine, rows=jax.tree.map(join, mine.rows, others.rows))


def completion_scores(
  model: Model, params: Params, texts: Rows, hparams: HParams, special: Special, options: SamplingOptions, **also: bool
) -> tuple[TokenScores, jax.Array]:
  """Computes the scores [B, T] of the completions' tokens under the sampler's distribution, and the states [B, T, D].

  Scores are 0 off the loss mask, and in the columns of the prompt.

  Args:
    model, params: policy or reference.
    texts: of a `Rollout`.
    hparams: `temperature` is read.
    special, options: of the sampler.
    **also: of `losses.logps.token_scores`, such as entropy=True.
  """
  N = options.max_new_tokens
  hidden, _ = model.forward(params, texts["tokens"], Segments(texts["segment_ids"], most=1), texts["positions"])
  prompt_columns = texts["tokens"].shape[1] - N
  scores = token_scores(
    hidden[:, prompt_columns - 1 : -1],
    model.unembedding(params),
    texts["tokens"][:, prompt_columns:],
    temperature=hparams["temperature"],
    support=support(special, options),
    **also,
  )
  mask = texts["loss_mask"][:, prompt_columns:]

  def widen(x):
    return jnp.pad(jnp.where(mask > 0, x, 0.0), ((0, 0), (prompt_columns, 0)))

  return TokenScores(*map(widen, scores)), hidden


def score(
  models: Mapping[str, Model], trees: Trees, rollout: Rollout, special: Special, options: SamplingOptions
) -> Outcome:
  """Computes what completions are worth; `Rollout.counting` takes the weights of the outcome.

  Args:
    models: of `models`.
    trees: `others` has the parameters of these models; hparams must be there.
    rollout: with the rewards of the Python functions, if there are any.
    special: `stop_id` and `step_ends` are read, for step_reward alone.
    options: of an algorithm that samples.
  """
  hparams = trees.hparams
  assert hparams is not None
  wanted, texts = weights(options), rollout.texts
  values: dict[str, jax.Array] = {}
  domain: dict[str, jax.Array] = {}
  steps = step_scores = None
  if options.step_reward:
    logits = step_reward.scores(models[IN_GRAPH], trees.others[IN_GRAPH], texts)
    ends = step_reward.ends(texts["tokens"], texts["loss_mask"], special.stop_id, special.step_ends)
    values[IN_GRAPH] = step_reward.together(logits, ends, options.step_reward)
    steps = ends.sum(axis=1).astype(jnp.float32)
    if options.step_reward == step_reward.EACH:
      step_scores = wanted[IN_GRAPH] * jnp.where(ends, jax.nn.sigmoid(logits), 0.0)
  elif IN_GRAPH in wanted:
    features, heads = (x[:, 0] for x in last_states(models[IN_GRAPH], trees.others[IN_GRAPH], texts, 1))
    values[IN_GRAPH] = pooled(heads, options.ensemble, hparams["ensemble_k"])
    if "domain" in models:
      domain = reward_domain.place(trees.others["domain"], features, heads.mean(axis=-1))
  exists = texts["example_mask"][:, 0] > 0
  failed = jnp.zeros(len(exists), bool)
  if IN_GRAPH in values:  # a Python function's are looked at where it is called
    values[IN_GRAPH], unusable = checked(values[IN_GRAPH])
    failed |= unusable & (wanted[IN_GRAPH] != 0)
  if rollout.host is not None:
    failed |= rollout.host.failed > 0
    functions = [name for name in wanted if name != IN_GRAPH]
    values |= {name: rollout.host.values[:, column] for column, name in enumerate(functions)}
  scores, counts, failed = worth(values, wanted, failed)
  scored = counts & exists
  penalty = hparams["missing_eos_penalty"] * (1 - rollout.finished)
  return Outcome(
    raw_scores=jnp.where(scored, scores, 0.0),
    scores=jnp.where(scored, scores - penalty, 0.0),
    weights=jnp.where(scored, texts["weights"][:, 0], 0.0),
    prompted=texts["weights"][:, 0] * exists,
    failed=(failed & exists).astype(jnp.float32),
    lengths=rollout.lengths,
    finished=rollout.finished,
    each=values,
    domain=domain,
    steps=steps,
    step_scores=step_scores,
  )


def pooled(heads: Heads, ensemble: str, k: float | jax.Array = 1.0) -> Heads:
  """Pools the rewards [B, K] of an ensemble's heads to one [B], of NumPy or JAX alike.

  Args:
    ensemble: "mean", "min" or "lower" (mean - k std).
    k: standard deviations that "lower" takes off.

  Source: Coste et al. 2024 (arXiv:2310.02743): "min" is worst-case optimisation, "lower" uncertainty-weighted.
  """
  mean = heads.mean(axis=-1)
  return {"mean": mean, "min": heads.min(axis=-1), "lower": mean - k * heads.std(axis=-1)}[ensemble]
