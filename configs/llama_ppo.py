"""PPO of LoRA factors on Llama-3.1-8B-Instruct against a reward model, on a v5e-16 slice.

Schulman et al. 2017 (arXiv:1707.06347). The base is held in bfloat16 and is the reference as well; the critic is a head
on the policy's states. The reward model is any that transformers calls LlamaForSequenceClassification, or a run.

  pip install 'alignjax[tpu,hub]'
  alignjax train --config configs/llama_ppo.py --workdir gs://bucket/llama_ppo \
    --config.data.train=prompts.jsonl --config.algorithm.reward_model=hf://org/llama-reward      # on every host

Never run at this size: docs/real_models.md says what the compiler estimates. `:smoke` takes six steps of a Qwen3 of 30
thousand random weights, paid for two letters.
"""

import shared
from ml_collections import ConfigDict

LLAMA = "hf://meta-llama/Llama-3.1-8B-Instruct"


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring describes; variant "smoke" is its smallest."""
  c = ConfigDict()
  c.model = ConfigDict(
    dict(  # the sizes are those of run.init
      dtype="bfloat16",
      param_dtype="bfloat16",  # of the base, which is held; factors and the critic's head are float32
      remat="full",
    )
  )
  c.lora = ConfigDict(dict(rank=32, alpha=64.0))
  c.data = ConfigDict(
    dict(
      train="prompts.jsonl",
      tokenizer=LLAMA,
      rows=64,  # prompts of an iteration
      row_length=1024,  # tokens of a prompt, at most
    )
  )
  c.algorithm = ConfigDict(
    dict(
      name="ppo",
      rewards="reward_model",
      reward_model="",
      max_new_tokens=512,
      temperature=1.0,
      epochs=2,
      minibatches=2,
      critic="shared",
      kl_coef=0.03,
      gamma=1.0,
      lam=0.95,
      epsilon=0.2,
      value_coef=0.1,
      missing_eos_penalty=1.0,
    )
  )
  c.optimizer = ConfigDict(
    dict(
      name="adamw",
      learning_rate=1e-5,
      schedule="constant",
      warmup_steps=5,
      clip_norm=1.0,
      microbatches=2,
    )
  )
  c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
  c.run = ConfigDict(
    dict(
      steps=300,  # iterations
      seed=0,
      init=LLAMA,
      log_every=1,
      eval_every=50,
      save_every=25,
      keep_latest=2,
    )
  )
  if variant == "smoke":
    shared.shrink(c, "preference.jsonl")
    shared.tiny_qwen3(c)
    c.algorithm.update(num_generations=2)
  elif variant:
    raise ValueError(f"no variant {variant!r}; there is smoke")
  return c.lock()
