"""Values that several configs share."""

import os
import pathlib

from ml_collections import ConfigDict

SMOKE = pathlib.Path(__file__).parent / "smoke"


def hh_rlhf() -> str:
  """The file of 2,000 human pairs of HH-RLHF (harmless), in the folder that ALIGNJAX_DATA names."""
  return os.path.join(os.environ.get("ALIGNJAX_DATA", "data"), "hh-rlhf", "harmless.jsonl.gz")


def gsm8k(split: str) -> str:
  """GSM8K's "train" or "test" questions, in the folder that ALIGNJAX_DATA names."""
  return os.path.join(os.environ.get("ALIGNJAX_DATA", "data"), "gsm8k", f"{split}.jsonl.gz")


def quickstart(c: ConfigDict) -> None:
  """Takes the quickstart's model and tokenizer, and prompts as long as the built-in world's."""
  c.model.update(layers=3, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=384)
  c.data.update(tokenizer="runs/quickstart/tokenizer.model", row_length=40)


def shrink(c: ConfigDict, data: str) -> None:
  """Turns a config into its smoke test: a toy model, six steps, records of the built-in world kept in configs/smoke."""
  c.model.update(layers=2, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=128)
  c.data.update(train=str(SMOKE / data), tokenizer=str(SMOKE / "tokenizer.model"), rows=8, row_length=128)
  c.optimizer.update(warmup_steps=1)
  c.run.update(init="", steps=6, log_every=1, eval_every=3, save_every=2)
  if "max_new_tokens" in c.algorithm:  # online: from the prompts of the records
    c.data.update(row_length=40, eval=str(SMOKE / "eval_prompts.jsonl"))
    # Some completions of random words have it and some have not: a reward to tell completions apart by.
    settings = ConfigDict(dict(pattern="in|on"))
    c.algorithm.update(rewards="regex+testbed_answer:0", reward_settings=settings, max_new_tokens=16)


def tiny_qwen3(c: ConfigDict) -> None:
  """Takes the Qwen3 of random weights in configs/smoke/qwen3, and its tokenizer."""
  folder = str(SMOKE / "qwen3")
  c.data.update(tokenizer=folder)
  c.run.update(init=folder)
  c.optimizer.update(microbatches=1)
