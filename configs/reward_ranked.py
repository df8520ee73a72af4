"""A reward model of rankings in the built-in world: configs/reward.py with Plackett-Luce over four responses.

Plackett 1975, ties by Efron 1977 (docs/objectives.md). Rankings are by the gold reward, so there is no noise in them.

  alignjax data testbed --out runs/world --ranked 4000
  alignjax data tokenizer --input runs/world/text.txt --vocab 512 --out runs/world/tokenizer.model
  alignjax train --config configs/reward_ranked.py --workdir runs/world/reward_ranked
  alignjax evaluate --workdir runs/world/reward_ranked

What it reaches has not been measured. `:smoke` takes six steps of a toy model on any machine.
"""

import reward
import shared
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring claims; variant "smoke" is its smallest."""
  c = reward.get_config(variant).unlock()
  c.algorithm.loss = "plackett_luce"
  c.data.update(train="runs/world/ranked.jsonl", tokenizer="runs/world/tokenizer.model", rows=16, row_length=512)
  c.run.update(steps=200, init="")
  if variant == "smoke":
    shared.shrink(c, "ranked.jsonl")
    c.data.update(holdout=0.2, row_length=256)
  return c.lock()
