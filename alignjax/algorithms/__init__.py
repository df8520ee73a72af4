"""Algorithms by name."""

from alignjax.algorithms import distillation, preference, process_reward, reward, sft, unpaired
from alignjax.algorithms.algorithm import Algorithm

ALGORITHMS = {
  "sft": sft,
  "distillation": distillation,
  "reward": reward,
  "process_reward": process_reward,
  "preference": preference,
  "unpaired": unpaired,
}

__all__ = ["ALGORITHMS", "Algorithm", "distillation", "preference", "process_reward", "reward", "sft", "unpaired"]
