"""DPO of LoRA factors on HH-RLHF: configs/dpo.py with the SFT run's weights held, which are the reference as well.

Hu et al. 2021 (arXiv:2106.09685), on all linear layers; ten times the learning rate of full training (Biderman et al.
2024, arXiv:2405.09673, section 6).

  alignjax train --config configs/dpo_lora.py --workdir runs/hh/dpo_lora    # after the two commands of configs/sft.py
  alignjax evaluate --workdir runs/hh/dpo_lora
  alignjax export --adapter --workdir runs/hh/dpo_lora --out runs/hh/adapter  # in PEFT's files
  alignjax sweep --config configs/dpo_lora.py --workdir runs/hh/sweep --sweep beta=0.05,0.1,0.3 lr=1e-4,5e-4

`:smoke` takes six steps of a toy model on any machine.
"""

import dpo
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring claims; variant "smoke" is its smallest."""
  c = dpo.get_config(variant).unlock()
  c.lora = ConfigDict(
    dict(
      rank=16,
      alpha=32.0,
      scaling="standard",
      targets="layers/(q|k|v|o|gate|up|down)",
    )
  )
  c.optimizer.update(learning_rate=5e-4, weight_decay=0.0)
  if variant == "smoke":
    c.lora.update(rank=4, alpha=8.0)
  return c.lock()
