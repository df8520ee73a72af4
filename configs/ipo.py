"""Identity preference optimisation on HH-RLHF: configs/dpo.py with a squared loss, whose margins have a goal.

Azar et al. 2023 (arXiv:2310.12036). The margin per token is driven to 1 / (2 beta) and no further.

  alignjax train --config configs/ipo.py --workdir runs/hh/ipo              # after the two commands of configs/sft.py
  alignjax evaluate --workdir runs/hh/ipo

`:smoke` takes six steps of a toy model on any machine.
"""

import dpo
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring claims; variant "smoke" is its smallest."""
  c = dpo.get_config(variant).unlock()
  c.algorithm = ConfigDict(
    dict(
      name="preference",
      loss="ipo",
      beta=0.1,  # the paper's tau
      length_power=1.0,  # averages per token; 0.0: sums, as in the paper
    )
  )
  return c.lock()
