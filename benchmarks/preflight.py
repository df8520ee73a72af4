"""Does the post-training of published models fit the chips that people have, and what would limit it?

  python -m benchmarks.preflight --workdir runs/preflight [--only 8b-dpo ...]

`alignjax compile` of a few runs, each in a process of its own, which takes minutes; a run whose file is in the workdir
is not compiled again. All numbers are the compiler's (libtpu, no TPU): estimates, never measurements.
Writes benchmarks/results/preflight.json.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import jax

from benchmarks import result

BF16 = ["--config.model.dtype=bfloat16", "--config.model.remat=full", "--config.data.holdout=0", "--config.data.eval="]


def rows(count: int, length: int) -> list[str]:
  """A batch of so many rows of so many tokens."""
  return [f"--config.data.rows={count}", f"--config.data.row_length={length}"]


def run(config: str, topology: str, model: str, *more: str) -> list[str]:
  """The arguments of `alignjax compile`."""
  return ["--config", f"configs/{config}.py", "--topology", topology, "--model", model, "--no-levers", *BF16, *more]


ONE = "--config.data.max_examples=1"
# At 4,096 tokens a side: two rows of 4,096 for each chip.
DPO_8B = run("dpo", "v5e:4x4", "llama-3.1-8b", *rows(32, 4096), ONE)
RUNS = {
  "8b-dpo": DPO_8B,
  "8b-dpo-cached": [*DPO_8B, "--config.run.reference_cache=cache"],
  "8b-grpo": run(
    "grpo", "v5e:4x4", "llama-3.1-8b", *rows(16, 1024), "--config.mesh.fsdp=4", "--config.mesh.tensor=4",
    "--config.algorithm.num_generations=4", "--config.algorithm.max_new_tokens=1024",
    "--config.optimizer.microbatches=4",
  ),
  "1b-grpo": run(
    "grpo", "v5e:2x2", "llama-3.2-1b", *rows(16, 256), "--config.algorithm.num_generations=4",
    "--config.algorithm.max_new_tokens=256", "--config.optimizer.microbatches=4",
  ),
  "qwen3-dpo-lora": run("qwen3_dpo_lora", "v5e:1x1", "qwen3-0.6b"),  # the recipes of docs/real_models.md
  "llama-reward": run("llama_reward", "v5e:2x4", "llama-3.2-1b"),
  "llama-ppo": run("llama_ppo", "v5e:4x4", "llama-3.1-8b", "--config.algorithm.reward_model=runs/reward"),
}  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--workdir", required=True, help="keeps what was compiled")
  parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="compile these alone")
  arguments = parser.parse_args()
  folder = pathlib.Path(arguments.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  for name in arguments.only:
    if not (folder / f"{name}.json").exists():
      print(name, flush=True)
      command = [sys.executable, "-m", "alignjax.cli", "compile", *RUNS[name], "--json", str(folder / f"{name}.json")]
      done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
      if done.returncode not in (0, 1):  # 1: it does not fit, which is a result
        sys.exit(done.returncode)
  found = {name: folder / f"{name}.json" for name in RUNS}
  jax.config.update("jax_platforms", "cpu")  # what is written of the device is the host that compiled
  numbers = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
  for name, numbers_of_run in numbers.items():
    numbers_of_run["arguments"] = RUNS[name]
    numbers_of_run |= decode(numbers_of_run)
  question = "does the post-training of published models fit the chips that people have, and what would limit it?"
  what = "compiler estimates (libtpu), nothing was measured"
  print("wrote", result.write("preflight", {"question": question, "what": what, "runs": numbers}))


def decode(numbers: dict) -> dict:
  """A decode step's cycles, without collectives, against the least it must read: its share of bfloat16 weights."""
  rollout = next((step for step in numbers["steps"] if step["step"] == "rollout"), None)
  if rollout is None or "one_turn" not in rollout:
    return {}
  turn, chip = rollout["one_turn"], numbers["chip"]
  floor = 2 * numbers["parameters"] / numbers["devices"]
  return {
    "decode": {
      "floor_bytes": floor,
      "floor_seconds": floor / chip["hbm"],
      "seconds_by_cycles": turn["cycles"] / chip["clock"],
      "ratio": turn["cycles"] / chip["clock"] * chip["hbm"] / floor,
    }
  }


if __name__ == "__main__":
  main()
