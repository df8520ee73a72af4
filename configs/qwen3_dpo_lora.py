"""DPO of LoRA factors on Qwen3-0.6B, on the one chip of a Colab TPU (v5e-1).

Rafailov et al. 2023 (arXiv:2305.18290); Hu et al. 2021 (arXiv:2106.09685). pairs.jsonl has a line for each pair:
{"prompt": ..., "chosen": ..., "rejected": ...}, texts or lists of messages.

  pip install 'alignjax[tpu,hub]'
  alignjax train --config configs/qwen3_dpo_lora.py --workdir runs/qwen3 --config.data.train=pairs.jsonl
  alignjax generate --workdir runs/qwen3 --prompt "Say something kind."
  alignjax export --workdir runs/qwen3 --out qwen3-dpo          # merged, for transformers and vLLM; --adapter for PEFT

Never run at this size: docs/real_models.md says what the compiler estimates. `:smoke` takes six steps of a Qwen3 of 30
thousand random weights on any machine.
"""

import shared
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring describes; variant "smoke" is its smallest."""
  c = ConfigDict()
  c.model = ConfigDict(
    dict(  # the sizes are those of run.init
      dtype="bfloat16",
      param_dtype="bfloat16",  # of the base, which is held; factors are float32
      remat="full",
    )
  )
  c.lora = ConfigDict(dict(rank=16, alpha=32.0))
  c.data = ConfigDict(
    dict(
      train="pairs.jsonl",
      holdout=0.05,
      tokenizer="hf://Qwen/Qwen3-0.6B",
      rows=16,
      row_length=2048,
      pack=True,
      max_examples=8,
      max_prompt_length=1024,
      overlong="drop",
    )
  )
  c.algorithm = ConfigDict(dict(name="preference", loss="dpo", beta=0.1))
  c.optimizer = ConfigDict(
    dict(
      name="adamw",
      learning_rate=1e-4,
      schedule="cosine",
      warmup_steps=20,
      clip_norm=1.0,
      microbatches=8,
    )
  )
  c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
  c.run = ConfigDict(
    dict(
      steps=500,
      seed=0,
      init="hf://Qwen/Qwen3-0.6B",
      log_every=5,
      eval_every=100,
      save_every=100,
      keep_latest=2,
    )
  )
  if variant == "smoke":
    shared.shrink(c, "preference.jsonl")
    shared.tiny_qwen3(c)
  elif variant:
    raise ValueError(f"no variant {variant!r}; there is smoke")
  return c.lock()
