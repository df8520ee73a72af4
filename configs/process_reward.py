"""A process reward model in the built-in world: is a sum right, each time that an answer says it?

Lightman et al. 2023 (arXiv:2305.20050).

  alignjax data testbed --out runs/world --stepwise 4000
  alignjax data tokenizer --input runs/world/text.txt --vocab 512 --out runs/world/tokenizer.model
  alignjax train --config configs/process_reward.py --workdir runs/world/process_reward
  alignjax evaluate --workdir runs/world/process_reward

What it reaches has not been measured. `:smoke` takes six steps of a toy model on any machine.
"""

import reward
import shared
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring claims; variant "smoke" is its smallest."""
  c = reward.get_config(variant).unlock()
  c.algorithm = ConfigDict(dict(name="process_reward"))
  c.data.update(train="runs/world/stepwise.jsonl", tokenizer="runs/world/tokenizer.model", rows=16, row_length=512)
  c.data.update(step_separator="\n")  # after each step, whose label is learned at its last token
  c.run.update(steps=200, init="")
  if variant == "smoke":
    shared.shrink(c, "stepwise.jsonl")
    c.data.update(holdout=0.2)
  return c.lock()
