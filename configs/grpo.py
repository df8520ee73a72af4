"""GRPO on GSM8K with a verifier of the final answer: the plumbing is real, the skill of a model of this size is not.

Shao et al. 2024 (arXiv:2402.03300).

  alignjax data tokenizer --input $ALIGNJAX_DATA/gsm8k/train.jsonl.gz --vocab 4000 --out runs/gsm8k/tokenizer.model
  alignjax train --config configs/sft.py --workdir runs/gsm8k/sft --config.data.row_length=512 \\
    --config.data.train=$ALIGNJAX_DATA/gsm8k/train.jsonl.gz --config.data.tokenizer=runs/gsm8k/tokenizer.model
  alignjax train --config configs/grpo.py --workdir runs/gsm8k/grpo

`:arithmetic` teaches the built-in world's sums to an SFT run that knows a sixth: `python -m benchmarks.arithmetic`
makes that run (the quickstart's, for longer) and the prompts, and measures what comes of it. `:smoke` takes six steps
of a toy model on any machine.
"""

import shared
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring claims; variant "smoke" is its smallest, "arithmetic" another task."""
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
      train=shared.gsm8k("train"),
      eval=shared.gsm8k("test"),
      tokenizer="runs/gsm8k/tokenizer.model",
      rows=16,  # prompts of an iteration
      row_length=256,  # tokens of a prompt, at most
    )
  )
  c.algorithm = ConfigDict(
    dict(
      name="grpo",
      loss="grpo",  # or dr_grpo, dapo, gspo, cispo, rloo, ...: losses/policy.py
      advantages="group",  # less the group's mean, over its deviation
      rewards="gsm8k",  # 1 where the number after "####" is right
      num_generations=8,  # completions of a prompt
      max_new_tokens=256,
      temperature=1.0,
      epochs=1,
      minibatches=1,
    )
  )
  c.optimizer = ConfigDict(
    dict(
      name="adamw",
      learning_rate=5e-5,
      b2=0.99,
      schedule="constant",
      warmup_steps=2,
      clip_norm=1.0,
      microbatches=1,
    )
  )
  c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
  c.run = ConfigDict(
    dict(
      steps=100,  # iterations
      seed=0,
      init="runs/gsm8k/sft",
      log_every=1,
      eval_every=50,
      save_every=25,
      keep_latest=2,
    )
  )
  if variant == "arithmetic":
    shared.quickstart(c)
    c.data.update(train="runs/arithmetic/prompts.jsonl", eval="", holdout=0.0)
    c.algorithm.update(rewards="testbed_answer+testbed_gold:0", num_generations=16, max_new_tokens=32, minibatches=2)
    # Else it finds out that of many numbers one is right, and never ends.
    c.algorithm.missing_eos_penalty = 1.0
    c.optimizer.update(learning_rate=4e-4, warmup_steps=10, weight_decay=0.1)
    c.run.update(steps=500, init="runs/arithmetic/sft", eval_every=0, save_every=50)
  elif variant == "smoke":
    shared.shrink(c, "preference.jsonl")
    c.algorithm.update(num_generations=4)
  elif variant:
    raise ValueError(f"no variant {variant!r}; there are arithmetic and smoke")
  return c.lock()
