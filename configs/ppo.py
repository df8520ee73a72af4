"""PPO on the built-in world, from the quickstart's SFT run, against its reward model.

Schulman et al. 2017 (arXiv:1707.06347), with the four models of Stiennon et al. 2020 (arXiv:2009.01325).

  alignjax quickstart --workdir runs/quickstart     # trains the SFT run, the reward model and this policy
  alignjax train --config configs/ppo.py --workdir runs/ppo
  alignjax generate --workdir runs/ppo --prompt "What is 12 + 5?"

`:smoke` takes six steps of a toy model on any machine, paid for two letters: it needs no reward model.
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
      train=f"{QUICKSTART}/data/preference.jsonl",  # of pairs, the prompts
      eval=f"{QUICKSTART}/data/eval_prompts.jsonl",
      tokenizer=f"{QUICKSTART}/tokenizer.model",
      rows=64,  # prompts of an iteration
      row_length=40,  # tokens of a prompt, at most
    )
  )
  c.algorithm = ConfigDict(
    dict(
      name="ppo",
      rewards="reward_model",
      reward_model=f"{QUICKSTART}/reward",
      max_new_tokens=48,
      temperature=1.0,
      epochs=2,  # passes over an iteration's completions
      minibatches=4,  # parts of a pass, an optimizer step each
      critic="own",  # a trunk of its own, which begins as the reward model's
      kl_coef=0.05,
      gamma=1.0,
      lam=0.95,
      epsilon=0.2,
      value_coef=0.1,
    )
  )
  c.optimizer = ConfigDict(
    dict(
      name="adamw",
      learning_rate=1e-4,
      b2=0.99,
      schedule="cosine",
      warmup_steps=2,
      clip_norm=1.0,
      microbatches=1,
    )
  )
  c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
  c.run = ConfigDict(
    dict(
      steps=60,  # iterations
      seed=0,
      init=f"{QUICKSTART}/sft",
      log_every=1,
      eval_every=20,
      save_every=20,
      keep_latest=2,
    )
  )
  if variant == "smoke":
    shared.shrink(c, "preference.jsonl")
    c.algorithm.update(reward_model="", num_generations=2, minibatches=2)
  elif variant:
    raise ValueError(f"no variant {variant!r}; there is smoke")
  return c.lock()
