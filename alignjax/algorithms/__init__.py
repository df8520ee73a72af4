"""Algorithms by name."""

from alignjax.algorithms import distillation, preference, reward, sft, unpaired
from alignjax.algorithms.algorithm import Algorithm

ALGORITHMS = {
  "sft": sft,
  "distillation": distillation,
  "reward": reward,
  "preference": preference,
  "unpaired": unpaired,
}

__all__ = ["ALGORITHMS", "Algorithm", "distillation", "preference", "reward", "sft", "unpaired"]
