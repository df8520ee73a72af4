"""Proximal policy optimisation with four models: policy, frozen reference, reward model and critic, on one mesh.

One iteration: every prompt of the batch gets completions; the reward model (or Python functions) scores them; each
token pays for its distance from the reference; generalised advantage estimation spreads the score over the tokens; and
`epochs` passes over the completions, in `minibatches` parts each, improve policy and critic.

Source: Schulman et al. 2017 (arXiv:1707.06347); Stiennon et al. 2020 (arXiv:2009.01325); Huang et al. 2024, the details
that matter (arXiv:2403.17031)
"""

import dataclasses
import functools
from typing import Annotated

import flax.struct
import jax
import jax.numpy as jnp

from alignjax.algorithms import policy_update, rollout
from alignjax.algorithms.algorithm import Algorithm, First, Parts, Passes, one_of
from alignjax.algorithms.online_rows import Learned, Outcome, Rollout
from alignjax.algorithms.policy_update import Bounds, PassesOptions, PassesTraced, Settled
from alignjax.algorithms.rollout import completion_scores
from alignjax.algorithms.step_reward import EACH
from alignjax.errors import InputError
from alignjax.losses import policy
from alignjax.losses.advantages import centred, gae, masked_mean, token_rewards, whiten
from alignjax.losses.aggregation import divisor
from alignjax.losses.kl import sampled_kl
from alignjax.losses.objective import Family, Term
from alignjax.losses.value import ppo_value_loss
from alignjax.model import critic
from alignjax.model.attention.form import Segments
from alignjax.model.decoder import Model
from alignjax.system.microbatch import map_over_microbatches
from alignjax.system.ranges import Count, NonNegative, Positive, Share, Whole
from alignjax.types import HParams, Mean, Scalars

FAMILY = Family({"ppo": policy.LOSSES["ppo"]}, adopt=policy.adopt, argument="tokens")


@dataclasses.dataclass(frozen=True)
class PpoOptions(PassesOptions):
  """Static settings of PPO."""

  epochs: Count = 4  # passes over an iteration's completions
  minibatches: Count = 4  # parts of a pass, an optimizer step each
  critic: str = "own"  # "own": a trunk of its own, which begins as the reward model's; "shared": a head on the policy's
  kl_in: str = "reward"  # where the KL is paid: "reward" of each token, or "loss"
  kl_controller: str = "fixed"  # "adaptive": kl_coef moves so that the KL of a completion nears kl_target
  normalise_rewards: bool = False  # scores by running mean and deviation
  whiten_rewards: bool = False  # token rewards to unit variance, their mean kept
  value_warmup: Whole = 0  # iterations that train the critic alone; of a shared one the head


@dataclasses.dataclass(frozen=True)
class PpoTraced(PassesTraced):
  """Traced hyper-parameters of PPO.

  kl_coef is the price of a nat of KL, which the adaptive controller scales; gamma and lam are those of `gae`, and
  value_coef is the weight of the critic's loss.
  """

  kl_coef: NonNegative = 0.05
  kl_target: Positive = 6.0  # nats a completion, of the adaptive controller
  kl_horizon: Positive = 10000.0  # completions, of the adaptive controller
  gamma: Share = 1.0
  lam: Share = 0.95
  epsilon_value: Positive = 0.2  # a value counts up to this far from the one before the iteration
  value_coef: NonNegative = 0.1
  reward_clip: Annotated[NonNegative, "0 cuts none"] = 0.0  # scores beyond this are cut


@flax.struct.dataclass(kw_only=True)
class PpoRows(Learned):
  """Rows of completions with what the critic says of their tokens.

  Attributes:
    values, returns: [B, T], before the iteration.
    kl: [B], of the completion, from the reference, in nats.
    paid: [B], what the completion pays for it.
  """

  values: jax.Array
  returns: jax.Array
  kl: jax.Array
  paid: jax.Array


RUNNING = {
  "iteration": 0.0,
  "kl_factor": 1.0,
  "score_count": 0.0,  # the sum of the weights of all scores so far
  "score_squares": 0.0,  # of the weights' squares
  "score_mean": 0.0,
  "score_m2": 0.0,  # the weighted sum of squared deviations
}
SINCE = {"score_squares": "score_count"}  # equal where weights are 0 and 1, which the deviation took them for


def check(terms: tuple[Term, ...], options: PpoOptions) -> None:
  """Raises InputError where an option is unknown, or has no meaning with another; `terms` is unused."""
  del terms
  one_of("critic", options.critic, critic.KINDS)
  one_of("kl_in", options.kl_in, ("reward", "loss"))
  policy_update.kl_estimator(options.kl_estimator, options.kl_in)
  one_of("kl_controller", options.kl_controller, ("fixed", "adaptive"))
  if options.step_reward == EACH and options.normalise_rewards:
    raise InputError(f"algorithm.normalise_rewards: is of one score a completion, and step_reward={EACH} pays many")
  policy_update.check(options)


def adapt(model: Model, options: PpoOptions) -> Model:
  """Returns the policy's model with a critic of the kind `options.critic`: the entry "value" of its parameters."""
  return critic.attach(model, options.critic)


def make(model: Model, terms: tuple[Term, ...], options: PpoOptions, parts: Parts) -> Algorithm:
  """Makes PPO of `model`, a policy with a critic (`adapt`); its parameters without "value" are the reference's.

  Args:
    terms: the objective; only the first is read.
    options: as `check` accepts them.
    parts: `models` has the reward model and its domain, `special` the tokens that end completions.

  Raises:
    InputError: rewards that cannot be had, or a user's loss that fails.
  """
  rollout.check(options)
  policy_update.check_own(terms)
  objective = terms[0].objective
  special = parts.special
  models = rollout.models(parts)
  shared = options.critic == "shared"
  in_loss = options.kl_in == "loss"
  rescores = policy_update.rescores(model.config.dtype, options)

  def sample(trees, batch, key):
    return rollout.sample(model, trees.policy, batch, key, trees.hparams, special, options)

  def prepare(trees, batch, key):
    del key
    hp, policy = trees.hparams, trees.policy

    def look(part):
      """Returns the outcome of rows, the reference's log-probs, the critic's values and, if asked for, own scores."""
      texts = part.texts
      reference, _ = completion_scores(model, trees.reference, texts, hp, special, options)
      own = hidden = None
      if rescores:
        own, hidden = completion_scores(model, policy, texts, hp, special, options, entropy=True)
      elif shared:
        ids = Segments(texts["segment_ids"], most=1)
        hidden = model.forward(policy, texts["tokens"], ids, texts["positions"])[0]
      values = critic.values(model, policy, texts, hidden)
      return rollout.score(models, trees, part, special, options), reference.logps, values, own

    pieces = parts.microbatches
    if rescores:
      pieces = policy_update.parts_of(batch.size, pieces, options.minibatches)
    outcome, reference_logps, values, own = map_over_microbatches(look, batch.rows, pieces)
    sampled = batch.rows.counting(outcome.weights)
    settled = Settled(sampled.logps)
    if rescores:
      settled = policy_update.settle(sampled, own, model.config, hp, options)
    running = batch.running
    kl_coef = hp["kl_coef"] * running["kl_factor"]
    warm = (running["iteration"] >= options.value_warmup).astype(jnp.float32)
    scores, statistics = shaped_scores(outcome, running, hp, options.normalise_rewards)
    told = jnp.broadcast_to(statistics["score_m2"] > 0, scores.shape).astype(jnp.float32)
    rows = learned_rows(sampled, outcome, scores, told, settled, reference_logps, values, kl_coef, hp, options)
    statistics["iteration"] = running["iteration"] + 1
    if options.kl_controller == "adaptive":
      step = kl_step(rows.kl, rows.outcome.weights, hp)
      statistics["kl_factor"] = running["kl_factor"] * jnp.where(warm > 0, step, 1.0)
    totals = settled.totals | {"kl_coef": kl_coef, "warm": warm}
    return batch.replace(rows=rows).updated(totals=totals, running=statistics)

  def loss_fn(params, batch, hp):
    rows: PpoRows = batch.rows
    warm, kl_coef, mask = batch.totals["warm"], batch.totals["kl_coef"], rows.texts["loss_mask"]
    scores, hidden = completion_scores(
      model, params, rows.texts, hp, special, options, entropy=True, entropy_gradient=True
    )
    if options.value_warmup and options.critic == "shared":
      hidden = jax.lax.stop_gradient(hidden) + warm * (hidden - jax.lax.stop_gradient(hidden))
    values = critic.values(model, params, rows.texts, hidden)
    mean = functools.partial(policy_update.token_mean, batch=batch)
    policy_loss, metrics = policy_update.policy_loss(objective, scores, batch, hp, options)
    value = ppo_value_loss(values, rows.values, rows.returns, mask, epsilon=hp["epsilon_value"])
    value_loss = mean(value.losses)
    total = policy_loss - hp["entropy_coef"] * policy_update.entropy(scores, batch)
    if in_loss:
      total += kl_coef * policy_update.kl_loss(scores, objective, batch, options)
    metrics |= policy_update.metrics(batch) | {"loss/policy": policy_loss, "loss/value": value_loss}
    of_rows = {
      "objective/kl": rows.kl,
      "objective/kl_coef": jnp.broadcast_to(kl_coef, rows.kl.shape),
      "objective/non_score_reward": -rows.paid,
      "objective/rlhf_reward": rows.outcome.scores - rows.paid,
      "objective/entropy": -jnp.sum(rows.old_logps * mask, axis=1),
    }
    of_tokens = {
      "val/clipfrac": value.clipped,
      "val/mean": values,
      "val/error": jnp.square(rows.returns - values),
    }
    metrics |= policy_update.scored_means(of_rows, batch)
    learned = policy_update.learned(batch)
    metrics |= {name: Mean(mean(x), learned) for name, x in of_tokens.items()}
    return warm * total + hp["value_coef"] * value_loss, metrics

  def is_warm(running):
    return running["iteration"] > options.value_warmup

  def start(params, constant):
    return critic.start(options.critic, params, constant.get("reward_model", constant["reference"]))

  tolerated = policy_update.tolerated(model.config.dtype, options, options)
  return Algorithm(
    prepare,
    loss_fn,
    count="num_examples",
    reads=("reference", *models),
    reads_policy=True,
    running=RUNNING,
    models=models | {"reference": critic.policy_of(model)},
    finish=functools.partial(policy_update.finish, tolerated=tolerated),
    rollout=sample,
    counts=policy_update.counts,
    passes=Passes(options.epochs, options.minibatches, ("policy/approxkl", "target_kl"), policy_update.FIRST),
    first=First(("value",), is_warm) if options.value_warmup else None,
    since=SINCE,
    start=start,
  )


def learned_rows(
  sampled: Rollout,
  outcome: Outcome,
  scores: jax.Array,
  told: jax.Array,
  settled: Settled,
  reference_logps: jax.Array,
  values: jax.Array,
  kl_coef: jax.Array,
  hparams: HParams,
  options: PpoOptions,
) -> PpoRows:
  """Returns the rows to learn from, with their advantages and returns: each token is paid, and GAE spreads the pay.

  Args:
    sampled: counting as the outcome says.
    outcome: of the completions.
    scores, told: [B], of `shaped_scores`, and whether they say something.
    settled: the old log-probs.
    reference_logps, values: [B, T].
    kl_coef: the price of a nat of KL.
    hparams: `gamma` and `lam` are read.
    options: of the algorithm.
  """
  mask = sampled.texts["loss_mask"]
  weights = mask * sampled.texts["weights"]
  log_ratios = (settled.old_logps - reference_logps) * mask
  paid = sampled_kl(policy_update.kl_estimator(options.kl_estimator, options.kl_in), log_ratios) * mask
  steps = jnp.zeros_like(mask)
  if outcome.step_scores is not None:
    steps = outcome.step_scores * mask
  price = kl_coef
  if options.kl_in == "loss":
    price = jnp.float32(0.0)
  # At the last token is paid what the steps do not add up to: other rewards, the penalty of a missing end, the clip.
  rewards = steps + token_rewards(scores - steps.sum(axis=1), paid, mask, kl_coef=price)
  if options.whiten_rewards:
    rewards = whiten(rewards, weights, shift_mean=False) * mask
  values = values * mask
  advantages, returns = gae(rewards, values, mask, gamma=hparams["gamma"], lam=hparams["lam"])
  return PpoRows(
    texts=sampled.texts,
    outcome=outcome,
    told=told,
    sampler_logps=sampled.logps,
    old_logps=settled.old_logps,
    reference_logps=reference_logps,
    advantages=whiten(advantages, weights) * mask,
    correction=settled.correction,
    values=values,
    returns=returns,
    kl=log_ratios.sum(axis=1),
    paid=paid.sum(axis=1) * kl_coef,
  )


def shaped_scores(outcome: Outcome, running: Scalars, hparams: HParams, normalise: bool) -> tuple[jax.Array, Scalars]:
  """Returns scores [B] as the tokens are paid, and the running statistics with these rows in.

  Scores are normalised by the statistics if asked for, then clipped. They count by the weights of their records, in any
  unit; equal scores are exactly 0 when normalised. A row without weight gets 0.

  Args:
    outcome: scores and weights [B] are read.
    running: the statistics in `RUNNING`.
    hparams: `reward_clip` is read; 0 clips nothing.
    normalise: whether to divide by the running deviation, less the mean, of these rows too.
  """
  scores, weights = outcome.scores, outcome.weights
  count, mean, m2 = (running[name] for name in ("score_count", "score_mean", "score_m2"))
  # Chan et al. 1979: two groups' means and sums of squares are put together.
  here = weights.sum()
  total, delta = count + here, masked_mean(scores, weights) - mean
  share = here / divisor(total)
  mean = mean + jnp.where(here > 0, delta, 0) * share
  m2 = m2 + jnp.sum(weights * jnp.square(centred(scores, weights))) + jnp.square(delta) * count * share
  squares = running["score_squares"] + jnp.sum(jnp.square(weights))
  statistics = {"score_count": total, "score_squares": squares, "score_mean": mean, "score_m2": m2}
  if normalise:
    free = total - squares / divisor(total)  # of 0 and 1, their number less 1
    variance = jnp.where(free > 0, m2 / divisor(free), 0)
    scores = (scores - mean) * jax.lax.rsqrt(variance + 1e-8)
  limit = jnp.where(hparams["reward_clip"] > 0, hparams["reward_clip"], jnp.inf)
  return jnp.clip(scores, -limit, limit) * (weights > 0), statistics


def kl_step(kl: jax.Array, weights: jax.Array, hparams: HParams) -> jax.Array:
  """Returns the factor by which the KL coefficient changes after these rows; it moves the KL towards `kl_target`.

  Args:
    kl: [B], of each completion, in nats.
    weights: [B], of the rows.
    hparams: `kl_target` (nats a completion) and `kl_horizon` (completions) are read.

  Source: Ziegler et al. 2019, section 2.2 (arXiv:1909.08593)
  """
  error = jnp.clip(masked_mean(kl, weights) / hparams["kl_target"] - 1, -0.2, 0.2)
  return 1 + error * jnp.sum(weights > 0) / hparams["kl_horizon"]


RECIPE = rollout.recipe(
  options=PpoOptions,
  family=FAMILY,
  make=make,
  traced=(PpoTraced, Bounds),
  more_traced=lambda terms, options: policy_update.bounds(options),
  check=check,
  adapt=adapt,
)
