"""What online algorithms share: completions of the policy as rows to learn from, and what they are worth.

A row is [pads | prompt | completion | pads]: T = data.row_length + max_new_tokens columns. The completions of a prompt
are neighbours, B = data.rows * num_generations rows in all. Everything that is per token is [B, T], belongs to the
token in its column, and is 0 where `loss_mask` is.
"""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from alignjax import rewards
from alignjax.algorithms import reward_domain, step_reward
from alignjax.algorithms.algorithm import one_of
from alignjax.algorithms.reward import last_states
from alignjax.errors import InputError
from alignjax.losses.logps import TokenScores, token_scores
from alignjax.losses.support import Support
from alignjax.model.attention.form import Segments
from alignjax.model.decoder import Model
from alignjax.rewards import Reward
from alignjax.rewards.protocol import LARGEST
from alignjax.sampling.generate import generate
from alignjax.sampling.queue import generate_queue
from alignjax.system import ranges
from alignjax.system.ranges import Count, NonNegative, Positive, ShareAboveZero, Whole
from alignjax.system.sharding import constrain
from alignjax.types import Batch, HParams, Params

OPTIONS: dict[str, Any] = {
  "num_generations": 1,  # completions of each prompt
  "max_new_tokens": 64,  # N, of a completion
  "slots": 0,  # rows decoded at a time, which take the next prompt as they fall free; 0: all rows
  "top_k": 0,  # the sampler keeps the k best tokens; 0: all
  "top_p": 1.0,  # then the fewest that hold this share of what is left; 1: all
  "rewards": "reward_model",  # names and weights, "gsm8k+length:0.1", of weight 0 to be logged alone: docs/rewards.md
  "reward_settings": {},  # keywords of those that are Python functions
  "reward_model": "",  # run directory of the reward model that "reward_model" in `rewards` means
  "step_reward": "",  # of a process reward model: what its steps come to, one of step_reward.KINDS
  "domain": "",  # directory of `alignjax domain`: logs how many completions lie outside the reward model's data
  "ensemble": "mean",  # how its heads, where it has several, make one reward: "mean", "min", "lower" (mean - k std)
}
HPARAMS = {
  "temperature": 1.0,  # divides the logits, of the sampler and of the trainer alike
  "missing_eos_penalty": 0.0,  # taken off the reward of a completion that did not end by itself
  "ensemble_k": 1.0,  # deviations of an ensemble's heads that "lower" takes off their mean
}
RANGES = {
  "num_generations": Count,
  "max_new_tokens": Count,
  "slots": Whole,
  "top_k": Whole,
  "top_p": ShareAboveZero,
  "temperature": Annotated[Positive, "0, the likeliest token, has no probabilities to learn from"],
  "missing_eos_penalty": NonNegative,
  "ensemble_k": NonNegative,
}
ENSEMBLES = ("mean", "min", "lower")
MODELS = {"reward_model": "scalar", "domain": "scalar"}
IN_GRAPH = "reward_model"


class Special(NamedTuple):
  """Token ids that an online algorithm knows: the one that ends a completion, the one that is never sampled, and the
  sequences that end a step of an answer.
  """

  stop_id: int
  pad_id: int
  step_ends: tuple[tuple[int, ...], ...] = ()


ENDLESS = Special(stop_id=-1, pad_id=0)  # of no tokenizer: nothing ends a completion


def check(o: Mapping[str, Any], compared: str = "") -> None:
  """Raises InputError where an option has no meaning; `compared` is what a prompt's completions are, such as "a pair"
  ("" where each is for itself).
  """
  one_of("ensemble", o["ensemble"], ENSEMBLES)
  ranges.check_all("algorithm", o, RANGES)
  step_reward.check(o, compared)
  if compared and o["num_generations"] < 2:
    raise InputError(f"algorithm.num_generations={o['num_generations']}: {compared} needs at least 2")
  wanted = weights(o)
  if not any(wanted.values()):
    raise InputError(f"algorithm.rewards={o['rewards']!r}: nothing to learn from; give a reward a weight")
  if (IN_GRAPH in wanted) != bool(o["reward_model"]):
    raise InputError(
      f"algorithm.rewards={o['rewards']!r} with algorithm.reward_model={o['reward_model']!r}: name the run of a reward "
      "model, or rewards without it (rewards=gsm8k)"
    )
  if o["domain"] and not o["reward_model"]:
    raise InputError(f"algorithm.domain={o['domain']}: is a reward model's; name its run in algorithm.reward_model")


def models(o: Mapping[str, Any]) -> dict[str, Model]:
  """The models that the options hold: the reward model, and its domain."""
  found = {name: o[name] for name in MODELS if o[name]}
  return found | ({"domain": reward_domain.of(found["domain"])} if "domain" in found else {})


def weights(o: Mapping[str, Any]) -> dict[str, float]:
  """The weight of each reward, the reward model's first; 0 where it is logged and not learned from.

  Raises:
    InputError: as `rewards.weights`.
  """
  terms = o["rewards"].split("+")
  found: dict[str, float] = {}
  for weight in (term.partition(":")[2] for term in terms if term.partition(":")[0] == IN_GRAPH):
    try:
      found[IN_GRAPH] = float(weight or 1)
    except ValueError as error:
      raise InputError(f"algorithm.rewards={o['rewards']!r}: {weight!r} is no number") from error
  found |= rewards.weights(_host_spec(o))
  for name, weight in found.items():
    ranges.check(f"algorithm.rewards={o['rewards']!r}: the weight of {name}", weight, ranges.Finite)
  return found


def host_rewards(o: Mapping[str, Any]) -> dict[str, Reward]:
  """The rewards that are Python functions, by name.

  Raises:
    InputError: as `rewards.make`.
  """
  return rewards.make(_host_spec(o), **o["reward_settings"])


def _host_spec(o: Mapping[str, Any]) -> str:
  """The part of `rewards` that names Python functions."""
  return "+".join(term for term in o["rewards"].split("+") if term.partition(":")[0] != IN_GRAPH)


def support(special: Special, o: Mapping[str, Any]) -> Support:
  """The tokens that may be sampled; the trainer scores the same. A pad that also ends completions is one of them."""
  excluded = None if special.pad_id == special.stop_id else special.pad_id
  return Support(excluded, o["top_k"] or None, None if o["top_p"] == 1 else o["top_p"])


def sample(
  model: Model,
  params: Params,
  batch: Batch,
  key: jax.Array,
  hparams: HParams,
  special: Special,
  o: Mapping[str, Any],
  first: int = 0,
) -> Batch:
  """Rows of `num_generations` completions for each prompt of a batch, and `old_logps`, which sampled them.

  `first` is the number of a prompt's first completion: another one, another completion.
  """
  G, N, rule = o["num_generations"], o["max_new_tokens"], support(special, o)
  repeat = lambda x: jnp.repeat(x, G, axis=0)
  prompts = {name: repeat(x) for name, x in batch.items() if x.ndim}
  rows = jnp.arange(len(prompts["tokens"]))
  draw = functools.partial(generate_queue, slots=o["slots"]) if o["slots"] else generate
  samples = draw(
    model,
    params,
    prompts["tokens"],
    prompts["segment_ids"].sum(axis=1),
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
  if o["slots"]:
    samples, occupancy = samples
    scalars["occupancy"] = occupancy.share
  beside = lambda x, y: jnp.concatenate([x, y.astype(x.dtype)], axis=1)
  mask = samples.mask * prompts["example_mask"]  # a row without a prompt has no completion
  segment_ids = beside(prompts["segment_ids"], mask)
  columns = {
    "tokens": beside(prompts["tokens"], samples.tokens),
    "segment_ids": segment_ids,
    "positions": jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0) * segment_ids,
    "loss_mask": beside(prompts["loss_mask"] * 0, mask),
    "old_logps": beside(jnp.zeros(prompts["tokens"].shape, samples.logps.dtype), samples.logps * mask),
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
  o: Mapping[str, Any],
) -> Batch:
  """As `sample`, but the last completion of each prompt is another's: `from_other` [B] is 1 there."""
  G = o["num_generations"]
  draw = lambda who, count, first: sample(
    *who, batch, key, hparams, special, {**o, "num_generations": count}, first=first
  )
  mine, others = draw(policy, G - 1, 0), draw(other, 1, G - 1)
  mine["from_other"] = jnp.zeros(len(mine["tokens"]))
  others["from_other"] = jnp.ones(len(others["tokens"]))

  def join(x, last):
    grouped = jnp.concatenate([x.reshape(-1, G - 1, *x.shape[1:]), last[:, None]], axis=1)
    return constrain(grouped.reshape(-1, *x.shape[1:]), "batch", *(None,) * (x.ndim - 1))

  return {name: join(x, others[name]) if x.ndim else x for name, x in mine.items()}


def completion_scores(
  model: Model, params: Params, batch: Batch, hparams: HParams, special: Special, o: Mapping[str, Any], **also: bool
) -> tuple[TokenScores, jax.Array]:
  """Scores [B, T] of the completions' tokens under the sampler's distribution, and the states [B, T, D]."""
  N = o["max_new_tokens"]
  hidden, _ = model.forward(params, batch["tokens"], Segments(batch["segment_ids"], most=1), batch["positions"])
  before = batch["tokens"].shape[1] - N
  found = token_scores(
    hidden[:, before - 1 : -1],
    model.unembedding(params),
    batch["tokens"][:, before:],
    temperature=hparams["temperature"],
    support=support(special, o),
    **also,
  )
  mask = batch["loss_mask"][:, before:]
  widen = lambda x: jnp.pad(jnp.where(mask > 0, x, 0.0), ((0, 0), (before, 0)))
  return TokenScores(*map(widen, found)), hidden


def judge(
  models: Mapping[str, Model], frozen: Mapping[str, Params], batch: Batch, special: Special, o: Mapping[str, Any]
) -> Batch:
  """Columns with what the completions are worth.

  - raw_scores [B]: the weighted sum of the rewards that apply; 0 where none does.
  - scores [B]: the same less the penalty of a missing end. What else shapes scores is taken off these, before anything
    is made of them.
  - weights [B, 1]: the record's; 0 where none does or one failed, and so is the row's loss_mask: it counts for nothing.
  - judged, prompted [B]: these weights, for means of what is known before the update; and the record's own.
  - failed [B]: 1 where a reward that counts could not judge, or the sum is not finite or beyond `LARGEST`.
  - reward/NAME [B]: each alone, NaN where it does not apply.
  - steps [B], step_scores [B, T]: of a process reward model, how many steps, and what of the score each is paid.
  - domain/NAME [B]: where they lie in the reward model's domain, where there is one.
  """
  wanted = weights(o)
  found: dict[str, jax.Array] = {}
  also: Batch = {}
  if o["step_reward"]:
    logits = step_reward.scores(models[IN_GRAPH], frozen[IN_GRAPH], batch)
    ends = step_reward.ends(batch["tokens"], batch["loss_mask"], special.stop_id, special.step_ends)
    found[IN_GRAPH] = step_reward.together(logits, ends, o["step_reward"])
    also["steps"] = ends.sum(axis=1).astype(jnp.float32)
    if o["step_reward"] == step_reward.EACH:
      also["step_scores"] = wanted[IN_GRAPH] * jnp.where(ends, jax.nn.sigmoid(logits), 0.0)
  elif IN_GRAPH in wanted:
    features, heads = (x[:, 0] for x in last_states(models[IN_GRAPH], frozen[IN_GRAPH], batch, 1))
    found[IN_GRAPH] = pooled(heads, o["ensemble"], frozen["hparams"]["ensemble_k"])
    if "domain" in models:
      also = reward_domain.place(frozen["domain"], features, heads.mean(axis=-1))
  there = batch["example_mask"][:, 0] > 0
  failed = batch.get("host_failed", jnp.zeros(len(there))) > 0
  if IN_GRAPH in found:  # a Python function's are looked at where it is called
    usable = jnp.abs(found[IN_GRAPH]) <= LARGEST
    failed |= ~usable & (wanted[IN_GRAPH] != 0)
    found[IN_GRAPH] = jnp.where(usable, found[IN_GRAPH], jnp.nan)
  others = [name for name in wanted if name != IN_GRAPH]
  found |= {name: batch["host_rewards"][:, column] for column, name in enumerate(others)}
  each = jnp.stack([found[name] for name, weight in wanted.items() if weight], axis=-1)
  applies = ~jnp.isnan(each)
  scores = jnp.sum(jnp.where(applies, each, 0.0) * jnp.array([w for w in wanted.values() if w]), axis=-1)
  failed = (failed | ~(jnp.abs(scores) <= LARGEST)) & there
  scored = applies.any(axis=-1) & there & ~failed
  counted = jnp.where(scored, batch["weights"][:, 0], 0.0)
  penalty = frozen["hparams"]["missing_eos_penalty"] * (1 - batch["finished"])
  return {
    "raw_scores": jnp.where(scored, scores, 0.0),
    "scores": jnp.where(scored, scores - penalty, 0.0),
    "weights": counted[:, None],
    "judged": counted,
    "prompted": batch["weights"][:, 0] * there,
    "failed": failed.astype(jnp.float32),
    "loss_mask": batch["loss_mask"] * (counted > 0)[:, None],
    **{f"reward/{name}": value for name, value in found.items()},
    **also,
  }


def pooled(heads: jax.Array, ensemble: str, k: float | jax.Array = 1.0) -> jax.Array:
  """One reward [B] of the heads' [B, K].

  Source: Coste et al. 2024 (arXiv:2310.02743): "min" is worst-case optimisation, "lower" uncertainty-weighted.
  """
  mean = heads.mean(axis=-1)
  return {"mean": mean, "min": heads.min(axis=-1), "lower": mean - k * heads.std(axis=-1)}[ensemble]
