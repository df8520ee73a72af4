"""Values that several configs share."""

import os
import pathlib

from ml_collections import ConfigDict

SMOKE = pathlib.Path(__file__).parent / "smoke"


def hh_rlhf() -> str:
  """The file of 2,000 human pairs of HH-RLHF (harmless), in the folder that ALIGNJAX_DATA names."""
  return os.path.join(os.environ.get("ALIGNJAX_DATA", "data"), "hh-rlhf", "harmless.jsonl.gz")


def shrink(c: ConfigDict, data: str) -> None:
  """Turns a config into its smoke test: a toy model, six steps, records of the built-in world kept in configs/smoke."""
  c.model.update(layers=2, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=128)
  c.data.update(train=str(SMOKE / data), tokenizer=str(SMOKE / "tokenizer.model"), rows=8, row_length=128)
  c.optimizer.update(warmup_steps=1)
  c.run.update(init="", steps=6, log_every=1, eval_every=3, save_every=2)
