"""The testbed's rewards, computed from prompt and completion alone."""

from alignjax.environments.testbed import gold
from alignjax.rewards.protocol import Reward, question


def testbed_gold() -> Reward:
  """The gold reward: what a completion is truly worth. A monitor: training on it would leave nothing to measure."""
  return lambda prompts, completions, token_ids, columns: [
    gold.reward(question(prompt), text).total for prompt, text in zip(prompts, completions, strict=True)
  ]


def testbed_answer() -> Reward:
  """1 where a sum or a question of fact is answered rightly, 0 where not, None for prompts of other families."""
  return lambda prompts, completions, token_ids, columns: [
    gold.capability(question(prompt), text) for prompt, text in zip(prompts, completions, strict=True)
  ]
