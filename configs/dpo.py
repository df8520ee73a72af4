"""Direct preference optimisation on HH-RLHF (harmless; 2,000 human pairs, a tenth held out), from the SFT run.

Rafailov et al. 2023 (arXiv:2305.18290). The SFT parameters are the frozen reference.

  alignjax train --config configs/dpo.py --workdir runs/hh/dpo              # after the two commands of configs/sft.py
  alignjax evaluate --workdir runs/hh/dpo

On two CPU cores its implicit reward orders 60.2% [53.0%, 67.0%] of 186 held-out pairs as the annotators did
(benchmarks/results/hh_rlhf.json). `:smoke` takes six steps of a toy model on any machine.
"""

import shared
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring claims; variant "smoke" is its smallest."""
  c = ConfigDict()
  c.model = ConfigDict(
    dict(
      vocab=0,  # the tokenizer's
      layers=6,
      embed=256,
      heads=8,
      kv_heads=4,
      head_dim=32,
      mlp=768,
      tied=True,
      dtype="float32",
      remat="none",
    )
  )
  c.data = ConfigDict(
    dict(
      train=shared.hh_rlhf(),
      holdout=0.1,
      tokenizer="runs/hh/tokenizer.model",
      rows=8,
      row_length=1024,
      pack=True,
      max_examples=8,
      overlong="drop",
    )
  )
  c.algorithm = ConfigDict(
    dict(
      name="preference",
      loss="dpo",
      beta=0.1,  # strength of the pull towards the reference
      label_smoothing=0.0,  # share of labels taken to be flipped (conservative DPO)
    )
  )
  c.optimizer = ConfigDict(
    dict(
      name="adamw",
      learning_rate=5e-5,
      schedule="cosine",
      warmup_steps=10,
      weight_decay=0.1,
      clip_norm=1.0,
      microbatches=1,
    )
  )
  c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
  c.run = ConfigDict(
    dict(
      steps=100,
      seed=0,
      init="runs/hh/sft",
      log_every=5,
      eval_every=50,
      save_every=50,
      keep_latest=2,
      keep_best="eval/loss:min",
    )
  )
  if variant == "smoke":
    shared.shrink(c, "preference.jsonl")
  elif variant:
    raise ValueError(f"no variant {variant!r}; there is smoke")
  return c.lock()
