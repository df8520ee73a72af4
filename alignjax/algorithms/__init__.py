"""Algorithms by name."""

from alignjax.algorithms import preference, reward, sft, unpaired
from alignjax.algorithms.algorithm import Algorithm

ALGORITHMS = {"sft": sft, "reward": reward, "preference": preference, "unpaired": unpaired}

__all__ = ["ALGORITHMS", "Algorithm", "preference", "reward", "sft", "unpaired"]
