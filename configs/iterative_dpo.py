"""A round of iterative DPO on the built-in world, from the quickstart's SFT run; `alignjax iterate` takes the rounds.

Xiong et al. 2024 (arXiv:2312.11456). Each round the policy writes four answers a prompt, the reward model orders them,
and DPO learns from the best and the worst, with the round's own start as the reference.

  alignjax quickstart --workdir runs/quickstart     # trains the SFT run and the reward model
  alignjax iterate --config configs/iterative_dpo.py --workdir runs/iterative-dpo --rounds 3 \\
    --reward runs/quickstart/reward --n 4 --max-new-tokens 48 --prompts-per-round 1024 \\
    --eval-prompts runs/quickstart/data/eval_prompts.jsonl

`--config.algorithm.name=sft` makes it RAFT: supervised training on the best of n. Trained alone it is DPO on the
pairs of `data.train`, whose prompts the rounds take; so is `:smoke`, six steps of a toy model on any machine.
"""

import shared
from ml_collections import ConfigDict

QUICKSTART = "runs/quickstart"


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring claims; variant "smoke" is its smallest."""
  c = ConfigDict()
  c.model = ConfigDict(
    dict(
      vocab=0,  # the tokenizer's
      layers=3,
      embed=192,
      heads=6,
      kv_heads=6,
      head_dim=32,
      mlp=384,
      tied=True,
      dtype="float32",
      remat="none",
    )
  )
  c.data = ConfigDict(
    dict(
      train=f"{QUICKSTART}/data/preference.jsonl",  # in a round: its records
      eval=f"{QUICKSTART}/data/eval_preference.jsonl",
      tokenizer=f"{QUICKSTART}/tokenizer.model",
      rows=8,
      row_length=144,
      max_examples=4,
    )
  )
  c.algorithm = ConfigDict(
    dict(
      name="preference",
      loss="dpo",
      beta=0.1,  # strength of the pull towards the reference
    )
  )
  c.optimizer = ConfigDict(
    dict(
      name="adamw",
      learning_rate=1.5e-4,
      b2=0.99,
      schedule="cosine",
      warmup_steps=5,
      clip_norm=1.0,
      microbatches=1,
    )
  )
  c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
  c.run = ConfigDict(
    dict(
      steps=60,  # of a round
      seed=0,
      init=f"{QUICKSTART}/sft",
      log_every=10,
      eval_every=0,
      save_every=30,
      keep_latest=1,
    )
  )
  if variant == "smoke":
    shared.shrink(c, "preference.jsonl")
    c.data.update(eval="")
  elif variant:
    raise ValueError(f"no variant {variant!r}; there is smoke")
  return c.lock()
