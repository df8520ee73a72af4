"""What do the configs for HH-RLHF reach on human preferences that they have not seen?

  ALIGNJAX_DATA=DIR python -m benchmarks.hh_rlhf [--workdir runs/hh]

Runs configs/sft.py, configs/reward.py and configs/dpo.py as their docstrings say (what is complete is not run again),
and counts the held-out pairs that the reward model, and the implicit reward of DPO, order as the annotators did.
Writes benchmarks/results/hh_rlhf.json. About ten minutes on two cores.
"""

import argparse
import pathlib

from alignjax import train
from alignjax.cli import main as command_line
from alignjax.evaluation.held_out import evaluate
from alignjax.evaluation.interval import wilson
from alignjax.runs import config
from alignjax.system import malloc
from benchmarks import result

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", default="runs/hh")
  workdir = pathlib.Path(parser.parse_args().workdir)
  tokenizer = workdir / "tokenizer.model"
  if not tokenizer.exists():
    data = config.load_config(f"{CONFIGS / 'sft.py'}").data.train
    command_line(["data", "tokenizer", "--input", data, "--vocab", "4096", "--out", str(tokenizer)])
  for stage in ("sft", "reward", "dpo"):
    overrides = [f"data.tokenizer={tokenizer}"] + [f"run.init={workdir / 'sft'}"] * (stage != "sft")
    train.fit(config.load_config(str(CONFIGS / f"{stage}.py"), overrides), workdir / stage, stage)

  numbers = {"question": "what do the configs for HH-RLHF reach on human preferences that they have not seen?"}
  reward, dpo = evaluate(workdir / "reward"), evaluate(workdir / "dpo")
  right = {
    "reward": (round(reward["heldout_accuracy"] * reward["pairs"]), reward["pairs"]),
    "dpo": (round(dpo["rewards/accuracies"] * dpo["examples"]), dpo["examples"]),
  }
  for name, (count, pairs) in right.items():
    share = wilson(count, pairs)
    ends = reward["heldout_interval"] if name == "reward" else share.interval  # that one is over prompts
    numbers[name] = {"heldout_accuracy": share.value, "heldout_interval": ends, "pairs": pairs}
    low, high = ends
    print(f"{name}: {share.value:.1%} of {pairs} held-out pairs [{low:.1%}, {high:.1%}]")
  print("wrote", result.write("hh_rlhf", numbers | {"dpo_loss": dpo["loss"], "reward_log_loss": reward["log_loss"]}))


if __name__ == "__main__":
  malloc.keep_freed()
  main()
