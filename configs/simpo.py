"""SimPO on HH-RLHF: configs/dpo.py without a reference, on log-probabilities per token.

Meng et al. 2024 (arXiv:2405.14734), beta and gamma of its Mistral-Base runs.

  alignjax train --config configs/simpo.py --workdir runs/hh/simpo          # after the two commands of configs/sft.py
  alignjax evaluate --workdir runs/hh/simpo

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
      loss="simpo",
      beta=2.0,
      gamma=1.0,  # the margin to be won, in units of beta times log-probability per token
      label_smoothing=0.0,
    )
  )
  return c.lock()
