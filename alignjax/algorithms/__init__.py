"""Algorithms by name."""

from alignjax.algorithms import distillation, preference, reward, sft
from alignjax.algorithms.algorithm import Algorithm

ALGORITHMS = {"sft": sft, "reward": reward, "preference": preference, "distillation": distillation}

__all__ = ["ALGORITHMS", "Algorithm", "distillation", "preference", "reward", "sft"]
