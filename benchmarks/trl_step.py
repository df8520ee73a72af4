"""One optimizer step of TRL's DPO trainer for every line of standard input; prints the seconds that it took.

  echo | python benchmarks/trl_step.py CONFIG.json

Runs in an environment of requirements-trl.txt, for benchmarks/step_time_trl.py. CONFIG.json holds the model (of a
LlamaConfig), the dtype, and the number of pairs and of tokens a side; the second half of a side is its completion.
"""

import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl_trajectory import ARGUMENTS, as_text, make_tokenizer


class OnRequest(TrainerCallback):
  """Lets a step begin at a line of input, and ends the training with the input."""

  def on_step_begin(self, args, state, control, **kwargs):
    if not sys.stdin.readline():
      os._exit(0)
    self.start = time.perf_counter()

  def on_step_end(self, args, state, control, **kwargs):
    print(f"seconds {time.perf_counter() - self.start}", flush=True)


def main() -> None:
  config = json.loads(pathlib.Path(sys.argv[1]).read_text())
  pairs, length = config["pairs"], config["length"]
  rng = np.random.default_rng(0)
  draw = lambda: rng.integers(3, config["model"]["vocab_size"], length // 2).tolist()
  records = [{side: draw() for side in ("prompt", "chosen", "rejected")} for _ in range(pairs)]
  for record in records:
    record["chosen"][-1] = record["rejected"][-1] = 1  # the end of the text: else TRL adds it
  llama = LlamaConfig(**config["model"])
  with tempfile.TemporaryDirectory() as out:
    settings = {**ARGUMENTS, "bf16": config["dtype"] == "bfloat16"}
    trainer = DPOTrainer(
      model=LlamaForCausalLM(llama),
      ref_model=LlamaForCausalLM(llama),
      args=DPOConfig(output_dir=out, per_device_train_batch_size=pairs, max_steps=10_000, **settings),
      train_dataset=Dataset.from_list([as_text(record) for record in records]),
      processing_class=make_tokenizer(llama.vocab_size),
      callbacks=[OnRequest()],
    )
    print("ready", flush=True)
    trainer.train()


if __name__ == "__main__":
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  main()
