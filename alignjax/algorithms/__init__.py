"""Algorithms by name, and what they share: each is `prepare` (no gradient) and `loss` (gradient).

Another algorithm comes in as a module with its options, and an entry of `ALGORITHMS`.
It may import `sampling`, `rewards` and the rooms below; it knows no optimizer, no run and no config.
"""

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
