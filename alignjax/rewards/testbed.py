"""The testbed's rewards, computed from prompt and completion alone."""

from alignjax.environments.testbed import gold
from alignjax.rewards.protocol import Reward, question


def testbed_gold() -> Reward:
  """The gold reward of a completion. A monitor: after training on it, nothing would be left to measure."""
  return lambda prompts, completions, token_ids, columns: [
    gold.reward(question(prompt), text).total for prompt, text in zip(prompts, completions, strict=True)
  ]


def testbed_answer() -> Reward:
  """1 if a sum or a question of fact is answered rightly, 0 if not, None for prompts of other families."""
  return lambda prompts, completions, token_ids, columns: [
    gold.capability(question(prompt), text) for prompt, text in zip(prompts, completions, strict=True)
  ]
