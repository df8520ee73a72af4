"""Algorithms by name."""

from alignjax.algorithms import preference, reward, sft
from alignjax.algorithms.algorithm import Algorithm

ALGORITHMS = {"sft": sft, "reward": reward, "preference": preference}

__all__ = ["ALGORITHMS", "Algorithm", "preference", "reward", "sft"]
