"""Algorithms by name."""

from alignjax.algorithms import (
  distillation,
  grpo,
  nash_md,
  online_preference,
  ppo,
  preference,
  process_reward,
  reward,
  sft,
  unpaired,
)
from alignjax.algorithms.algorithm import Algorithm

ALGORITHMS = {
  "sft": sft,
  "distillation": distillation,
  "reward": reward,
  "process_reward": process_reward,
  "preference": preference,
  "unpaired": unpaired,
  "ppo": ppo,
  "grpo": grpo,
  "online_preference": online_preference,
  "nash_md": nash_md,
}

__all__ = ["ALGORITHMS", "Algorithm", *ALGORITHMS]
