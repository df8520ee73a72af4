"""Is a policy that learned from its own completions better than the SFT run it began with, and how far did it go?

  python -m benchmarks.quickstart --workdir runs/quickstart-seeds --seeds 0 1 2
  python -m benchmarks.online --quickstart runs/quickstart-seeds --workdir runs/online --seeds 0 1 2

On the built-in world, against the quickstart's reward model: PPO, RLOO, GRPO and online DPO with the settings of their
configs, and the best of 16 of the SFT run's answers, which trains nothing. All are judged by the gold reward, which no
method sees, on held-out prompts against answers of the SFT run. What is finished in the workdir is not done again.
Writes results/online.json; `--idle` says that the machine does nothing else, and adds wall seconds.
"""

import argparse
import json
import math
import pathlib
import time
from typing import Any

import jax

from alignjax import train
from alignjax.commands.best_of import Request, best_of, draw
from alignjax.commands.resumable import write
from alignjax.data.source import open_source
from alignjax.evaluation import testbed as judge
from alignjax.evaluation.kl import completion_logps, sequence_kl
from alignjax.runs.config import load_config
from alignjax.runs.run import load
from alignjax.runs.scorer import make_scorer, settings
from alignjax.system import malloc
from benchmarks import result

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
GRPO = ("algorithm.loss=grpo", "algorithm.advantages=group")
METHODS = {"ppo": ("ppo",), "rloo": ("rloo",), "grpo": ("rloo", *GRPO), "online_dpo": ("online_dpo",)}
BEST_OF = "best_of_16"
REQUEST = Request(n=16, max_new_tokens=48)
KEPT = (
  *("gold_win_rate_vs_sft", "gold_win_rate_interval", "gold_mean", "gold_mean_interval", "gold_mean_sft"),
  *("capability", "capability_sft", "sycophancy", "sycophancy_sft", "harm", "harm_sft"),
)


def train_one(quickstart: pathlib.Path, workdir: pathlib.Path, method: str, seed: int) -> None:
  """Trains a method from the quickstart's SFT run."""
  name, *own = METHODS[method]
  files = {
    "data.train": quickstart / "data" / "preference.jsonl",
    "data.eval": quickstart / "data" / "eval_prompts.jsonl",
    "data.tokenizer": quickstart / "tokenizer.model",
    "data.cache": quickstart / "cache",
    "algorithm.reward_model": quickstart / "reward",
    "algorithm.rewards": "reward_model+testbed_gold:0",  # logged, and learned from by nobody
    "run.init": quickstart / "sft",
  }
  overrides = [f"{key}={path}" for key, path in files.items()]
  config = load_config(str(CONFIGS / f"{name}.py"), [*overrides, *own, f"run.seed={seed}", "run.eval_every=0"])
  if (workdir / "checkpoints" / str(config.run.steps)).exists():
    return  # complete; `fit` would evaluate it once more
  if train.fit(config, workdir, method).stopped:
    raise SystemExit(0)  # told to stop; the same command goes on from here


def answers(quickstart: pathlib.Path, workdir: pathlib.Path, method: str, seed: int) -> dict[str, Any]:
  """What a method answers to the held-out prompts: texts, and its KL from the SFT run."""
  prompts = quickstart / "data" / "eval_prompts.jsonl"
  sft = load(quickstart / "sft")
  if method == BEST_OF:
    scorer = make_scorer(settings(str(quickstart / "reward")), sft.tokenizer, sft.mesh)
    summary = best_of(sft, prompts, scorer, workdir / "best.jsonl", REQUEST._replace(seed=seed))
    records = [json.loads(line) for line in (workdir / "best.jsonl").read_text().splitlines()]
    return {"texts": [record["completion"] for record in records], "kl_bound": summary["kl_bound"]}
  run = load(workdir)
  source = open_source(prompts)
  drawn = draw(run, source, range(len(source)), REQUEST._replace(n=1, seed=2 * seed + 1))
  asked, ids = [one.prompt_ids for one in drawn], [one.completion.tokens for one in drawn]
  with jax.set_mesh(run.mesh):
    logps = [completion_logps(r.model, r.params, asked, ids) for r in (run, sft)]
  kl = sequence_kl(*logps, [tuple(prompt) for prompt in asked]).kl
  return {"texts": [one.completion.text for one in drawn], "kl": kl.value, "kl_interval": kl.interval}


def one(quickstart: pathlib.Path, workdir: pathlib.Path, method: str, seed: int) -> dict[str, Any]:
  """A method on a seed: trained, and judged against the SFT run."""
  path = workdir / "piece.json"
  if path.exists():
    return json.loads(path.read_text())
  began = time.perf_counter()
  if method != BEST_OF:
    train_one(quickstart, workdir, method, seed)
  seconds = time.perf_counter() - began
  found = answers(quickstart, workdir, method, seed)
  source = open_source(quickstart / "data" / "eval_prompts.jsonl")
  prompts = [source[i]["prompt"] for i in range(len(source))]
  baseline = draw(load(quickstart / "sft"), source, range(len(source)), REQUEST._replace(n=1, seed=2 * seed + 2))
  compared = judge.compare(prompts, found.pop("texts"), [drawn.completion.text for drawn in baseline])
  row = {"method": method, "seed": seed, "train_s": round(seconds, 1)} | {key: compared[key] for key in KEPT} | found
  write(path, [json.dumps(row, indent=2)])
  return row


def main() -> None:
  """Runs what is missing and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quickstart", type=pathlib.Path, required=True, help="a folder of quickstarts, by seed")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--methods", nargs="+", default=[BEST_OF, *METHODS], choices=[BEST_OF, *METHODS])
  parser.add_argument("--idle", action="store_true", help="the machine does nothing else: wall seconds mean something")
  parser.add_argument("--finished", action="store_true", help="run nothing: write what is there")
  arguments = parser.parse_args()
  rows = []
  for seed in arguments.seeds:
    for method in arguments.methods:
      if arguments.finished and not (arguments.workdir / str(seed) / method / "piece.json").exists():
        continue
      row = one(arguments.quickstart / str(seed), arguments.workdir / str(seed) / method, method, seed)
      low, high = row["gold_win_rate_interval"]
      kl = f"{row['kl']:.1f}" if "kl" in row else f"at most {row['kl_bound']:.1f}"
      print(f"{method}, seed {seed}: {row['gold_win_rate_vs_sft']:.1%} [{low:.1%}, {high:.1%}], {kl} nats", flush=True)
      if not arguments.idle:
        del row["train_s"]
      rows.append(row)
  lowest = lambda method: min(row["gold_win_rate_interval"][0] for row in rows if row["method"] == method)
  above = {method: lowest(method) > 0.5 for method in dict.fromkeys(row["method"] for row in rows)}
  numbers = {"question": "does each method's policy beat the SFT run it began with, by the gold reward?"}
  bound = {"best_of_16_kl_bound": math.log(16) - 15 / 16, "interval": "95 %; Wilson (win rates), Student t (means)"}
  print("wrote", result.write("online", numbers | bound | {"above_sft": above, "rows": rows}))


if __name__ == "__main__":
  malloc.keep_freed()
  main()
