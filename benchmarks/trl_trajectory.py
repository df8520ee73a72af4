"""What do TRL's own trainers log, step by step, on given weights and tokens?

  python benchmarks/trl_trajectory.py DIR

Runs in an environment of requirements-trl.txt, without alignjax; tests/test_trajectory.py compares. DIR holds
llama.json (of a LlamaConfig), weights.npz (float32, under transformers' names, with both heads) and cases.json:

  {name: {"trainer": one of TRAINERS, "arguments": of its config, "steps": how many, "records": [...]}}

Records have lists of token ids for texts: 0 is padding, and every completion ends with 1, the end of the text. They are
taken in order, and just suffice for the steps. Writes DIR/trl.json: {name: [{"loss", "margin", "grad_norm"}, ...]}, a
line for each step.
"""

import copy
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from words import as_text, make_tokenizer

TRAINERS = {
  "dpo": (DPOTrainer, DPOConfig),
  "kto": (KTOTrainer, KTOConfig),
  "cpo": (CPOTrainer, CPOConfig),
  "orpo": (ORPOTrainer, ORPOConfig),
  "reward": (RewardTrainer, RewardConfig),
}
# All else is TRL's: AdamW's moments and epsilon, no weight decay, gradients clipped at 1, no dropout.
ARGUMENTS = {
  "lr_scheduler_type": "constant",
  "train_sampling_strategy": "sequential",
  "bf16": False,
  "use_cpu": True,
  "gradient_checkpointing": False,  # saves memory, changes no number
  "logging_steps": 1,
  "save_strategy": "no",
  "report_to": "none",
  "disable_tqdm": True,
}


def trajectory(folder: pathlib.Path, case: dict[str, Any]) -> list[dict[str, float]]:
  """Loss, mean reward margin and gradient norm (before clipping) of each step of one case."""
  make_trainer, make_config = TRAINERS[case["trainer"]]
  model = make_model(folder, "score" if case["trainer"] == "reward" else "lm_head")
  reference = {"ref_model": copy.deepcopy(model)} if case["trainer"] in ("dpo", "kto") else {}
  accumulated = case["arguments"].get("gradient_accumulation_steps", 1)
  with tempfile.TemporaryDirectory() as out:
    arguments = make_config(
      output_dir=out,
      per_device_train_batch_size=len(case["records"]) // case["steps"] // accumulated,
      max_steps=case["steps"],
      **ARGUMENTS,
      **case["arguments"],
    )
    trainer = make_trainer(
      model=model,
      args=arguments,
      train_dataset=Dataset.from_list([as_text(record) for record in case["records"]]),
      processing_class=make_tokenizer(model.config.vocab_size),
      **reference,
    )
    trainer.train()
  lines = [line for line in trainer.state.log_history if "loss" in line]
  margin = "margin" if case["trainer"] == "reward" else "rewards/margins"
  return [{"loss": line["loss"], "margin": line[margin], "grad_norm": line["grad_norm"]} for line in lines]


def make_model(folder: pathlib.Path, head: str) -> torch.nn.Module:
  """The Llama with one of its heads, "lm_head" or "score"; every weight must have its place."""
  config = LlamaConfig(**json.loads((folder / "llama.json").read_text()))
  with np.load(folder / "weights.npz") as file:
    weights = {name: torch.from_numpy(file[name]) for name in file if name.startswith(("model.", head))}
  model = LlamaForSequenceClassification(config) if head == "score" else LlamaForCausalLM(config)
  model.load_state_dict(weights)
  return model


def main() -> None:
  folder = pathlib.Path(sys.argv[1])
  torch.set_num_threads(1)
  cases = json.loads((folder / "cases.json").read_text())
  found = {name: trajectory(folder, case) for name, case in cases.items()}
  (folder / "trl.json").write_text(json.dumps(found))


if __name__ == "__main__":
  main()
