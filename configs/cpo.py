"""Contrastive preference optimisation on HH-RLHF: configs/dpo.py with the likelihood in the reference's place.

Xu et al. 2024 (arXiv:2401.08417).

  alignjax train --config configs/cpo.py --workdir runs/hh/cpo              # after the two commands of configs/sft.py
  alignjax evaluate --workdir runs/hh/cpo

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
      loss="cpo",
      beta=0.1,
      label_smoothing=0.0,
      nll_weight=1.0,  # of -log p(chosen) per token
    )
  )
  return c.lock()
