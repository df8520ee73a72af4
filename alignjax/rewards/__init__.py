"""Rewards that run on the host: Python functions of prompts and completions. NumPy; no JAX.

Reading order: protocol (what a reward is), judge (runs them), spec (names in a configuration), answer (an example).
"""

from alignjax.rewards.ensemble import pooled
from alignjax.rewards.isolation import isolated
from alignjax.rewards.judge import judge
from alignjax.rewards.protocol import Failure, Reward, Scores, require
from alignjax.rewards.spec import MONITORS, REWARDS, make, options, weights

__all__ = [
  "MONITORS",
  "REWARDS",
  "Failure",
  "Reward",
  "Scores",
  "isolated",
  "judge",
  "make",
  "options",
  "pooled",
  "require",
  "weights",
]
