"""How long is a DPO step here, and in TRL, on the same machine?

  python -m benchmarks.step_time_trl --python ENVIRONMENT/bin/python [--rounds 7]

The model and batch of benchmarks/step_time.py: 27M parameters, 4 pairs of 512 tokens a side, the reference's forward
pass included; TRL's DPOTrainer in the environment of requirements-trl.txt, without gradient checkpointing. In bfloat16
both keep float32 weights. The steps take turns, so that whatever else the machine does slows all alike.
Writes benchmarks/results/step_time_trl.json.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile
from collections.abc import Callable

import numpy as np

from alignjax import host_memory
from benchmarks import result
from benchmarks.step_time import DTYPES, EXAMPLES, LENGTH, MODEL, make_step, seconds_of, spread

LLAMA = {
  "vocab_size": MODEL["vocab"],
  "hidden_size": MODEL["embed"],
  "num_hidden_layers": MODEL["layers"],
  "num_attention_heads": MODEL["heads"],
  "num_key_value_heads": MODEL["kv_heads"],
  "head_dim": MODEL["head_dim"],
  "intermediate_size": MODEL["mlp"],
  "tie_word_embeddings": MODEL["tied"],
  "bos_token_id": None,
  "eos_token_id": 1,
  "pad_token_id": 0,
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--python", type=pathlib.Path, required=True, help="of the environment with TRL")
  parser.add_argument("--rounds", type=int, default=7, help="times that every step takes its turn")
  a = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    steps = {("trl", dtype): make_trl_step(a.python, pathlib.Path(folder), dtype) for dtype in DTYPES}
    for dtype in DTYPES:
      run = make_step("preference", dtype).run
      steps["alignjax", dtype] = lambda run=run: seconds_of(run)
    seconds = {key: [] for key in steps}
    for _ in range(a.rounds + 1):
      for key, step in steps.items():
        seconds[key].append(step())
  took = {key: np.array(values[1:]) for key, values in seconds.items()}  # the first of each warms up
  numbers = {"question": __doc__.splitlines()[0], "model": MODEL, "tokens_per_step": EXAMPLES * LENGTH}
  numbers["rounds"] = a.rounds
  for dtype in DTYPES:
    ours, theirs = took["alignjax", dtype], took["trl", dtype]
    numbers[dtype] = {
      "alignjax_tokens_per_s": spread(EXAMPLES * LENGTH / ours),
      "trl_tokens_per_s": spread(EXAMPLES * LENGTH / theirs),
      "trl_over_alignjax_seconds": spread(theirs / ours),
    }
    print(f"{dtype}: {np.median(ours):.2f} s here, {np.median(theirs):.2f} s in TRL")
  print("wrote", result.write("step_time_trl", numbers))


def make_trl_step(python: pathlib.Path, folder: pathlib.Path, dtype: str) -> Callable[[], float]:
  """Starts a process that takes a step at each call, and returns the seconds that it counted."""
  path = folder / f"{dtype}.json"
  path.write_text(json.dumps({"model": LLAMA, "dtype": dtype, "pairs": EXAMPLES // 2, "length": LENGTH}))
  return timed_process(python, "trl_step.py", path)


def timed_process(python: pathlib.Path, name: str, config: pathlib.Path) -> Callable[[], float]:
  """Starts a script of this folder that says "ready", then how many seconds it took for every line that it reads."""
  script = pathlib.Path(__file__).with_name(name)
  process = subprocess.Popen([python, script, config], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

  def answer(word: str) -> str:
    """What follows the word in the next line that begins with it."""
    for line in process.stdout:
      if line.startswith(word):
        return line.removeprefix(word)
    raise SystemExit(f"{script.name} ended; run it alone to see why: {python} {script} {config}")

  def step() -> float:
    process.stdin.write("\n")
    process.stdin.flush()
    return float(answer("seconds"))

  answer("ready")
  return step


if __name__ == "__main__":
  host_memory.keep_freed()  # as the command line does
  main()
