"""Algorithms by name."""

from alignjax.algorithms import preference, process_reward, reward, sft, unpaired
from alignjax.algorithms.algorithm import Algorithm

ALGORITHMS = {
  "sft": sft,
  "reward": reward,
  "preference": preference,
  "unpaired": unpaired,
  "process_reward": process_reward,
}

__all__ = ["ALGORITHMS", "Algorithm", "preference", "process_reward", "reward", "sft", "unpaired"]
