"""Rewards that run on the host: Python functions of prompts and completions. NumPy; no JAX.

Reading order: protocol (the interface of a reward), scoring (runs rewards), spec (names in a configuration), answer (an
example). Another reward is another function, with its name in `spec`. It may import `environments` (the testbed's gold)
and `system`.
"""

from alignjax.rewards.protocol import Failure, Reward, Scores, require
from alignjax.rewards.sandbox.isolation import isolated
from alignjax.rewards.scoring import score
from alignjax.rewards.spec import MONITORS, REWARDS, make, options, weights

judge = score  # its name until models and people could be judges

__all__ = [
  "MONITORS",
  "REWARDS",
  "Failure",
  "Reward",
  "Scores",
  "isolated",
  "make",
  "options",
  "require",
  "score",
  "weights",
]
