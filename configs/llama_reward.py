"""A Bradley-Terry reward model from Llama-3.2-1B-Instruct, on one v5e-8 host.

Ouyang et al. 2022 (arXiv:2203.02155), eq. 1. pairs.jsonl as in configs/qwen3_dpo_lora.py. The weights are gated:
log in to the hub first, or name a folder that holds them in run.init and data.tokenizer.

  pip install 'alignjax[tpu,hub]'
  alignjax train --config configs/llama_reward.py --workdir runs/llama_reward --config.data.train=pairs.jsonl
  alignjax evaluate --workdir runs/llama_reward                 # accuracy with its interval, and calibration
  alignjax export --workdir runs/llama_reward --out llama-reward --dtype bfloat16

What is written is transformers' LlamaForSequenceClassification with one label. Never run at this size:
docs/real_models.md says what the compiler estimates. `:smoke` takes six steps of a Qwen3 of 30 thousand random weights.
"""

import qwen3_dpo_lora
from ml_collections import ConfigDict

LLAMA = "hf://meta-llama/Llama-3.2-1B-Instruct"


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring describes; variant "smoke" is its smallest."""
  c = qwen3_dpo_lora.get_config(variant).unlock()
  del c.lora
  c.model.update(param_dtype="float32")
  c.algorithm = ConfigDict(dict(name="reward", center_coefficient=0.01))
  c.optimizer.update(learning_rate=5e-6)
  if not variant:
    c.data.update(tokenizer=LLAMA, rows=64)
    c.optimizer.update(microbatches=4)
    c.run.update(init=LLAMA, keep_best="eval/loss:min")
  return c.lock()
