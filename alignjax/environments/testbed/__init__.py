"""A small assistant's world with a known gold reward: data to train on, and exact answers.

Reading order: world and phrasing (prompts), behaviour (responses), gold (their worth), annotator
(who prefers what), write (files).
"""

from alignjax.environments.testbed.annotator import (
  POPULATIONS,
  Annotator,
  bayes_accuracy,
  noisier,
  preference_probability,
  spammed,
)
from alignjax.environments.testbed.gold import PROBES, WEIGHTS, GoldReward, capability, rate, reward
from alignjax.environments.testbed.write import write

__all__ = [
  "POPULATIONS",
  "PROBES",
  "WEIGHTS",
  "Annotator",
  "GoldReward",
  "bayes_accuracy",
  "capability",
  "noisier",
  "preference_probability",
  "rate",
  "reward",
  "spammed",
  "write",
]
