"""Distillation of a fine-tuned model into a smaller one on HH-RLHF (harmless): generalized Jensen-Shannon divergence.

Agarwal et al. 2024 (arXiv:2306.13649), off-policy: on the data's own answers. The teacher is the run of configs/sft.py.

  alignjax train --config configs/gkd.py --workdir runs/hh/gkd              # after the two commands of configs/sft.py
  alignjax evaluate --workdir runs/hh/gkd

What it reaches has not been measured. `:smoke` takes six steps of a toy model on any machine; it has no teacher but its
own start, which holds it back.
"""

import sft
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring claims; variant "smoke" is its smallest."""
  c = sft.get_config(variant).unlock()
  if not variant:
    c.model.update(layers=3, embed=128, heads=4, kv_heads=2, mlp=384)
  c.algorithm = ConfigDict(
    dict(
      name="distillation",
      loss="jsd" if not variant else "jsd:0.5+cross_entropy:0.5",
      teacher="runs/hh/sft" if not variant else "",  # a run directory, of any model with this tokenizer
      beta=0.5,  # 0: KL(teacher || student), covers all that the teacher says; 1: KL(student || teacher), its modes
      temperature=1.0,  # of both distributions
    )
  )
  return c.lock()
