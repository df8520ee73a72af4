"""ORPO on HH-RLHF: supervised fine-tuning and preferences in one stage, without a reference and without an SFT run.

Hong et al. 2024 (arXiv:2403.07691). Most of the loss is likelihood, so the learning rate is that of configs/sft.py.

  alignjax data tokenizer --input $ALIGNJAX_DATA/hh-rlhf/harmless.jsonl.gz --vocab 4096 --out runs/hh/tokenizer.model
  alignjax train --config configs/orpo.py --workdir runs/hh/orpo

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
      loss="orpo",
      beta=0.1,  # the paper's lambda: weight of the odds ratio
    )
  )
  c.optimizer.learning_rate = 1e-3
  c.run.init = ""
  return c.lock()
