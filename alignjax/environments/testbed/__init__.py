"""A small assistant's world with a known gold reward: data to train on, and exact answers.

Reading order: world and phrasing (prompts), behaviour (responses), gold (their worth),
annotator (who prefers what), judge (models that do, with biases),
write (files).
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
from alignjax.environments.testbed.judge import AUTHORS, JUDGES, SimulatedJudge, author
from alignjax.environments.testbed.write import write

__all__ = [
  "AUTHORS",
  "JUDGES",
  "POPULATIONS",
  "PROBES",
  "WEIGHTS",
  "Annotator",
  "GoldReward",
  "SimulatedJudge",
  "author",
  "bayes_accuracy",
  "capability",
  "noisier",
  "preference_probability",
  "rate",
  "reward",
  "spammed",
  "write",
]
