"""A Bradley-Terry reward model on HH-RLHF (harmless; 2,000 human pairs, a tenth held out), from the SFT run.

  alignjax train --config configs/reward.py --workdir runs/hh/reward        # after the two commands of configs/sft.py
  alignjax evaluate --workdir runs/hh/reward

On two CPU cores it orders 57.0% [49.8%, 63.9%] of 186 held-out pairs as the annotators did, which does not exclude
chance at this size (benchmarks/results/hh_rlhf.json). `:smoke` takes six steps of a toy model on any machine.
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
      name="reward",
      center_coefficient=0.01,  # holds the mean reward near zero
    )
  )
  c.optimizer = ConfigDict(
    dict(
      name="adamw",
      learning_rate=2e-4,
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
