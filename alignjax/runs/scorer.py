"""Scores completions outside of training, with the rewards that `algorithm.rewards` can name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from alignjax import rewards
from alignjax.algorithms import rollout
from alignjax.algorithms import step_reward as steps
from alignjax.algorithms.algorithm import Special
from alignjax.algorithms.sampling_options import SamplingOptions
from alignjax.data.field import Dialogue, columns
from alignjax.data.source import Record
from alignjax.data.tokenizer import Tokenizer
from alignjax.data.transform import step_ends
from alignjax.errors import InputError
from alignjax.rewards.worth import checked, worth
from alignjax.runs import run
from alignjax.runs.rescore import completion_rewards, completion_steps
from alignjax.sampling.generate import Completion
from alignjax.system import hosts
from alignjax.system.fingerprint import digest, table

REWARD = rollout.IN_GRAPH


class Drawn(NamedTuple):
  """A completion and its prompt.

  Attributes:
    record: of the prompt, as it is on disk.
    prompt: its messages.
    prompt_ids: the rendered messages, up to the start of the completion.
    completion: sampled from a policy.
  """

  record: Record
  prompt: Dialogue
  prompt_ids: list[int]
  completion: Completion


class Worth(NamedTuple):
  """Scores of n completions.

  Attributes:
    scores: float64 [n], the weighted sum of the rewards that apply; NaN where none applies or one has failed.
    each: float64 [n] of each reward by name, also of those with weight 0; NaN where it does not apply.
    failed: bool [n], True where a reward with a weight failed.
  """

  scores: np.ndarray
  each: dict[str, np.ndarray]
  failed: np.ndarray


class Scorer(NamedTuple):
  """Scores completions.

  Attributes:
    score: list of Drawn -> Worth.
    identity: JSON: everything that the scores depend on.
  """

  score: Callable[[Sequence[Drawn]], Worth]
  identity: dict[str, Any]


def settings(
  reward: str,
  reward_model: str = "",
  reward_settings: Mapping[str, Any] | None = None,
  step_reward: str = "",
  flag: str = "reward",
) -> SamplingOptions:
  """Returns options that name rewards; how completions are sampled is left at its default.

  Args:
    reward: the run of a reward model, or names and weights: "gsm8k+length:0.1".
    reward_model: the run that "reward_model" in `reward` means; ignored if `reward` is a run itself.
    reward_settings: keywords of rewards that are Python functions.
    step_reward: how a process reward model's step rewards are combined; "": it is no process reward model.
    flag: the name of `reward` in errors.

  Raises:
    InputError: the reward is empty or no text, or its settings are no mapping.
  """
  if not isinstance(reward, str) or not reward:
    raise InputError(f"{flag}={reward!r}: name a reward, such as gsm8k or length:0.1, or the run of a reward model")
  if not isinstance(reward_settings or {}, Mapping):
    raise InputError(f"reward_settings={reward_settings!r}: give a mapping of a reward's keywords")
  if (epath.Path(reward).expanduser() / "config.json").exists():
    reward_model = reward
    reward = REWARD
  return SamplingOptions(
    rewards=reward,
    reward_model=reward_model,
    reward_settings=dict(reward_settings or {}),
    step_reward=step_reward,
  )


def recorded(options: SamplingOptions | None) -> dict[str, Any]:
  """Returns the options of `settings` as JSON, for a record of who scores; {} for None."""
  if options is None:
    return {}
  record = {name: getattr(options, name) for name in ("rewards", "reward_model", "reward_settings")}
  return record | ({"step_reward": options.step_reward} if options.step_reward else {})


def check(options: SamplingOptions) -> dict[str, rewards.Reward]:
  """Checks the options that `settings` returns, without loading a model; returns the rewards that are Python functions.

  Raises:
    InputError: an unknown or contradictory reward, or one that lacks something, such as a library.
  """
  rollout.check(options)
  steps.check(options.step_reward, options.reward_model, options.domain, one_number="a choice among completions")
  return rollout.host_rewards(options)


def make_scorer(options: SamplingOptions, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Scorer:
  """Makes the scorer of the rewards that options name; several heads of a reward model are combined by `ensemble`.

  Args:
    options: such as `settings` returns.
    tokenizer: of the policy; a reward model must have the same.
    mesh: where the reward model's parameters are.

  Raises:
    InputError: a reward is unknown or lacks something, or the reward model is a policy, has another tokenizer, or is
      not of the kind that `step_reward` asks for.
  """
  functions = check(options)
  weights = rollout.weights(options)
  has_weight = np.array([weights[name] != 0 for name in functions])
  identity: dict[str, Any] = {name: getattr(options, name) for name in ("rewards", "reward_settings", "ensemble")}
  reward_model = None
  special = None
  if options.reward_model:
    reward_model = _load_reward_model(options, tokenizer)
    if options.step_reward:
      separator = reward_model.config.data.step_separator
      special = Special(tokenizer.stop_id, tokenizer.pad_id, step_ends(tokenizer, separator))
      identity |= {"step_reward": options.step_reward, "step_separator": separator}
    identity["reward_model"] = digest(table({"params": reward_model.params}))

  def score(drawn: Sequence[Drawn]) -> Worth:
    each: dict[str, np.ndarray] = {}
    failed = np.zeros(len(drawn), bool)
    if reward_model:
      each[REWARD], unusable = checked(_model_rewards(reward_model, options, special, mesh, drawn))
      failed |= unusable & (weights[REWARD] != 0)
    if functions:
      values, failures = _function_rewards(functions, drawn)
      each |= dict(zip(functions, values.T, strict=True))
      failed |= (failures & has_weight).any(axis=1)
    scores, counts, failed = worth(each, weights, failed)
    return Worth(np.where(counts, scores, np.nan), each, failed)

  return Scorer(score, identity)


def _load_reward_model(options: SamplingOptions, tokenizer: Tokenizer) -> run.Run:
  """Loads the reward model that options name; errors as in `make_scorer`."""
  reward_model = run.load(options.reward_model)
  if reward_model.model.config.head != "scalar":
    raise InputError(f"{options.reward_model}: is a policy and no reward model; name another run")
  if reward_model.tokenizer.fingerprint != tokenizer.fingerprint:
    raise InputError(f"{options.reward_model}: its tokenizer is not the policy's; train one with that tokenizer")
  steps.check_model(options.reward_model, reward_model.config.algorithm.name, options.step_reward)
  return reward_model


def _model_rewards(
  reward_model: run.Run,
  options: SamplingOptions,
  special: Special | None,
  mesh: jax.sharding.Mesh,
  drawn: Sequence[Drawn],
) -> np.ndarray:
  """Scores completions by a reward model, float64 [n]; by their steps if `special` tokens delimit these."""
  prompts = [item.prompt_ids for item in drawn]
  completions = [item.completion.tokens for item in drawn]
  with jax.set_mesh(mesh):
    if special:
      by_steps = completion_steps(
        reward_model.model, reward_model.params, prompts, completions, special, options.step_reward
      )
      return np.asarray(by_steps, np.float64)
    by_head = completion_rewards(reward_model.model, reward_model.params, prompts, completions)
  return np.asarray(rollout.pooled(by_head, options.ensemble), np.float64)


def _function_rewards(functions: Mapping[str, rewards.Reward], drawn: Sequence[Drawn]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the rewards of completions by Python functions, float64 [n, R], and where they failed, bool [n, R].

  If there are several processes, the first alone calls the functions, and sends the rewards to the others.
  """
  shape = (len(drawn), len(functions))
  values = np.zeros(shape)
  failures = np.zeros(shape, bool)
  if jax.process_index() == 0:
    scores = rewards.score(
      functions,
      [item.prompt for item in drawn],
      [item.completion.text for item in drawn],
      [item.completion.tokens for item in drawn],
      columns([item.record for item in drawn]),
    )
    values = scores.values.astype(np.float64)
    failures = scores.failed
  return hosts.first(values), hosts.first(failures)
