"""Settings of all algorithms that learn from their own completions."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from alignjax.algorithms.algorithm import Options, Traced
from alignjax.system.ranges import Count, NonNegative, Positive, ShareAboveZero, Whole


@dataclasses.dataclass(frozen=True)
class SamplingOptions(Options):
  """Static settings of all algorithms that sample."""

  num_generations: Count = 1  # completions of each prompt
  max_new_tokens: Count = 64  # N, of a completion
  slots: Whole = 0  # rows decoded at a time, which take the next prompt as they fall free; 0: all rows
  top_k: Whole = 0  # the sampler keeps the k best tokens; 0: all
  top_p: ShareAboveZero = 1.0  # then the fewest that hold this share of what is left; 1: all
  rewards: str = "reward_model"  # names and weights, "gsm8k+length:0.1"; weight 0: logged alone; see docs/rewards.md
  reward_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # of Python functions
  reward_model: str = ""  # run directory of the reward model that "reward_model" in `rewards` means
  step_reward: str = ""  # of a process reward model: what its steps come to, one of step_reward.KINDS
  domain: str = ""  # directory of `alignjax domain`: logs how many completions lie outside the reward model's data
  ensemble: str = "mean"  # how its heads, where it has several, make one reward: "mean", "min", "lower" (mean - k std)


@dataclasses.dataclass(frozen=True)
class SamplingTraced(Traced):
  """Traced hyper-parameters of all algorithms that sample."""

  # Divides the logits, of the sampler and of the trainer alike.
  temperature: Annotated[Positive, "0, the likeliest token, has no probabilities to learn from"] = 1.0
  missing_eos_penalty: NonNegative = 0.0  # taken off the reward of a completion that did not end by itself
  ensemble_k: NonNegative = 1.0  # deviations of an ensemble's heads that "lower" takes off their mean
