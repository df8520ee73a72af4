"""Kahneman-Tversky optimisation on HH-RLHF: configs/dpo.py's pairs, each taken apart into two labelled completions.

Ethayarajh et al. 2024 (arXiv:2402.01306). Records {"prompt", "completion", "label"} serve as well as pairs. The weights
suit as many desirable as undesirable examples; the paper wants their weighted numbers within 1:1 and 4:3.

  alignjax train --config configs/kto.py --workdir runs/hh/kto              # after the two commands of configs/sft.py
  alignjax evaluate --workdir runs/hh/kto

`:smoke` takes six steps of a toy model on any machine.
"""

import dpo
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring claims; variant "smoke" is its smallest."""
  c = dpo.get_config(variant).unlock()
  c.algorithm = ConfigDict(
    dict(
      name="unpaired",
      loss="kto",  # or apo_zero_unpaired, bco
      beta=0.1,  # strength of the pull towards the reference
      desirable_weight=1.0,
      undesirable_weight=1.0,
    )
  )
  return c.lock()
