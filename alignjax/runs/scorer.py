"""What completions are worth, outside of a training loop: the rewards that `algorithm.rewards` names."""

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
  """A completion, and what it answers.

  Attributes:
    record: the prompt's, as it is on disk.
    prompt: its messages.
    prompt_ids: these rendered, ready for a completion.
    completion: what a policy wrote.
  """

  record: Record
  prompt: Dialogue
  prompt_ids: list[int]
  completion: Completion


class Worth(NamedTuple):
  """What n completions are worth.

  Attributes:
    scores: float64 [n], the weighted sum of the rewards that apply; NaN where none does or one has failed.
    each: float64 [n] of each reward by name, those of weight 0 too; NaN where it does not apply.
    failed: bool [n], where a reward that counts gave no number.
  """

  scores: np.ndarray
  each: dict[str, np.ndarray]
  failed: np.ndarray


class Scorer(NamedTuple):
  """Rewards, ready to reward_model.

  Attributes:
    score: list of Drawn -> Worth.
    identity: JSON: all that decides the numbers.
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
  """Options that say what completions are worth; how they are sampled is left at its default.

  Args:
    reward: the run of a reward model, or names and weights: "gsm8k+length:0.1".
    reward_model: the run that "reward_model" in `reward` means.
    reward_settings: keywords of rewards that are Python functions.
    step_reward: of a process reward model, what its steps come to.
    flag: what names `reward`, for the error.

  Raises:
    InputError: the reward is empty or no text, or its settings are no mapping.
  """
  if not isinstance(reward, str) or not reward:
    raise InputError(f"{flag}={reward!r}: name a reward, such as gsm8k or length:0.1, or the run of a reward model")
  if not isinstance(reward_settings or {}, Mapping):
    raise InputError(f"reward_settings={reward_settings!r}: give a mapping of a reward's keywords")
  if (epath.Path(reward).expanduser() / "config.json").exists():
    reward, reward_model = REWARD, reward
  return SamplingOptions(
    rewards=reward,
    reward_model=reward_model,
    reward_settings=dict(reward_settings or {}),
    step_reward=step_reward,
  )


def recorded(options: SamplingOptions | None) -> dict[str, Any]:
  """The options of `settings` as JSON, for a record of who scores; {} for None."""
  if options is None:
    return {}
  record = {name: getattr(options, name) for name in ("rewards", "reward_model", "reward_settings")}
  return record | ({"step_reward": options.step_reward} if options.step_reward else {})


def check(options: SamplingOptions) -> dict[str, rewards.Reward]:
  """The Python functions among rewards, such as `settings` gives, by name; no model is loaded.

  Raises:
    InputError: the rewards mean nothing, or a function cannot be had.
  """
  rollout.check(options)
  steps.check(options.step_reward, options.reward_model, options.domain, one_number="a choice among completions")
  return rollout.host_rewards(options)


def make_scorer(options: SamplingOptions, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Scorer:
  """The rewards that options name; several heads of a reward model are one by `ensemble`.

  Args:
    options: such as `settings` gives.
    tokenizer: of the policy; a reward model must have the same.
    mesh: where the reward model's parameters are.

  Raises:
    InputError: a reward is unknown or lacks something, or the reward model is none, has another tokenizer, or is not of
      the kind that `step_reward` asks for.
  """
  functions = check(options)
  weights = rollout.weights(options)
  identity: dict[str, Any] = {name: getattr(options, name) for name in ("rewards", "reward_settings", "ensemble")}
  if options.reward_model:
    reward_model = run.load(options.reward_model)
    if reward_model.model.config.head != "scalar":
      raise InputError(f"{options.reward_model}: is a policy and no reward model; name another run")
    if reward_model.tokenizer.fingerprint != tokenizer.fingerprint:
      raise InputError(f"{options.reward_model}: its tokenizer is not the policy's; train one with that tokenizer")
    steps.check_model(options.reward_model, reward_model.config.algorithm.name, options.step_reward)
    if options.step_reward:
      separator = reward_model.config.data.step_separator
      special = Special(tokenizer.stop_id, tokenizer.pad_id, step_ends(tokenizer, separator))
      identity |= {"step_reward": options.step_reward, "step_separator": separator}
    identity["reward_model"] = digest(table({"params": reward_model.params}))

  def of_functions(drawn: Sequence[Drawn]) -> tuple[np.ndarray, np.ndarray]:
    """Values [n, R] of the Python functions and where they failed; of several processes the first one asks them."""
    shape = (len(drawn), len(functions))
    values, failures = np.zeros(shape), np.zeros(shape, bool)
    if jax.process_index() == 0:
      prompts, texts = [one.prompt for one in drawn], [one.completion.text for one in drawn]
      ids, records = [one.completion.tokens for one in drawn], [one.record for one in drawn]
      scores = rewards.score(functions, prompts, texts, ids, columns(records))
      values, failures = scores.values.astype(np.float64), scores.failed
    return hosts.first(values), hosts.first(failures)

  def score(drawn: Sequence[Drawn]) -> Worth:
    ids = [one.completion.tokens for one in drawn]
    each, failed = {}, np.zeros(len(drawn), bool)
    if options.step_reward:
      texts = [one.prompt_ids for one in drawn], ids
      with jax.set_mesh(mesh):
        found = completion_steps(reward_model.model, reward_model.params, *texts, special, options.step_reward)
      each[REWARD] = np.asarray(found, np.float64)
    elif options.reward_model:
      with jax.set_mesh(mesh):
        heads = completion_rewards(reward_model.model, reward_model.params, [one.prompt_ids for one in drawn], ids)
      each[REWARD] = np.asarray(rollout.pooled(heads, options.ensemble), np.float64)
    if functions:
      values, failures = of_functions(drawn)
      each |= dict(zip(functions, values.T, strict=True))
      failed = (failures & np.array([weights[name] != 0 for name in functions])).any(axis=1)
    if REWARD in each:
      each[REWARD], unusable = checked(each[REWARD])
      failed = failed | (unusable & (weights[REWARD] != 0))
    scores, counts, failed = worth(each, weights, failed)
    return Worth(np.where(counts, scores, np.nan), each, failed)

  return Scorer(score, identity)
