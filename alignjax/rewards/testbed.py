"""The testbed's rewards, computed from prompt and completion alone."""

from alignjax.environments.testbed import gold
from alignjax.rewards.protocol import Reward, question


def testbed_gold() -> Reward:
  """Makes a monitor: the gold reward of a completion. After training on it, nothing would be left to measure.

  A prompt that is not the testbed's fails.
  """
  return lambda prompts, completions, token_ids, columns: [
    gold.reward(question(prompt), text).total for prompt, text in zip(prompts, completions, strict=True)
  ]


def testbed_answer() -> Reward:
  """Makes a reward: 1 if a sum or a question of fact is answered rightly, 0 if not, None for prompts of other families.

  A prompt that is not the testbed's fails.
  """
  return lambda prompts, completions, token_ids, columns: [
    gold.capability(question(prompt), text) for prompt, text in zip(prompts, completions, strict=True)
  ]
