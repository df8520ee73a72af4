"""One batch of `transformers.generate` for every line of standard input; prints the seconds that it took.

  echo | python benchmarks/transformers_generate.py CONFIG.json

Runs in an environment of requirements-trl.txt, for benchmarks/rollout.py. CONFIG.json holds the model (of a
LlamaConfig), the dtype, and the numbers of rows, of prompt tokens and of new tokens; nothing stops a completion.
"""

import json
import os
import pathlib
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
  config = json.loads(pathlib.Path(sys.argv[1]).read_text())
  llama = LlamaConfig(**config["model"] | {"eos_token_id": None})
  model = LlamaForCausalLM(llama).to(getattr(torch, config["dtype"])).eval()
  torch.manual_seed(0)
  prompts = torch.randint(2, llama.vocab_size, (config["rows"], config["prompt_tokens"]))
  settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
  print("ready", flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    out = model.generate(
      prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=config["new_tokens"], **settings
    )
    seconds = time.perf_counter() - start
    assert out.shape[1] == config["prompt_tokens"] + config["new_tokens"]
    print(f"seconds {seconds}", flush=True)


if __name__ == "__main__":
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  main()
