"""Does the gold reward turn while the reward model's still rises, and which mitigation moves the turning point?

  python -m benchmarks.overoptimisation --workdir runs/overoptimisation
  python -m benchmarks.overoptimisation --workdir runs/overoptimisation --conditions plain --seeds 0
  python -m benchmarks.overoptimisation --draw

Annotators of the built-in world who take length for quality label pairs; a reward model learns from them; RLOO from the
quickstart's SFT run (made if it is missing) is paid by it. Each condition changes one thing about that. A seed is
another draw of pairs, another reward model, another order, other samples; every evaluation is of the same held-out
prompts. The SFT run's best-of-n by the same reward model stands beside.

A finished (condition, seed) is not run again, one that was interrupted goes on, and --seeds alone gathers the finished.
Writes results/overoptimisation.json after each, and draws results/overoptimisation.svg from it.
"""

import argparse
import json
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from alignjax.commands import quickstart, retrain
from alignjax.commands.best_of import Request
from alignjax.commands.rounds import folder_of
from alignjax.data.source import open_source
from alignjax.environments import testbed
from alignjax.errors import InputError
from alignjax.evaluation import over_optimisation as oo
from alignjax.evaluation import reward_domain as domains
from alignjax.evaluation.testbed import gold_rewards
from alignjax.runs import config as config_lib
from alignjax.runs import run, scorer
from alignjax.runs.config import Config
from alignjax.runs.rescore import completion_rewards
from alignjax.system import malloc
from alignjax.train import fit
from alignjax.training import metrics
from benchmarks import overoptimisation_figure, result
from benchmarks.length_biased import LENGTH_BIAS, POPULATION
from benchmarks.turning_point import against_plain, turning_point

PAIRS, PROMPTS = 8000, 96
NEW_TOKENS = 64
REWARD_STEPS = 300
NEW_PAIRS, ROUND_STEPS = 1024, 150  # of a retraining: its steps are most of a pass over these and as many earlier pairs
SAMPLES = 32  # of each prompt, for best-of-n
PROXY, GOLD = "eval/rewards/reward_model", "eval/rewards/testbed_gold"
KEPT = {
  "kl": "eval/objective/kl",
  "proxy": PROXY,
  "gold": GOLD,
  "length": "eval/completions/mean_length",
  "entropy": "eval/policy/entropy",
  "distinct": "eval/rewards/distinct",
  "outside": "eval/domain/outside",
  "z": "eval/domain/z",
}


class Condition(NamedTuple):
  """What a run is paid by.

  Attributes:
    reason: what it is, and why with this number.
    algorithm: overrides; {price} in its rewards is `length_price`.
    heads: of the reward model.
    reward_steps: of its first training.
    rounds: of the policy's run, between which the reward model is retrained.
  """

  reason: str
  algorithm: Mapping[str, Any] = {}
  heads: int = 1
  reward_steps: int = REWARD_STEPS
  rounds: int = 1


MONITORS = "testbed_gold:0+distinct:0"
CONDITIONS = {
  "plain": Condition("a small KL coefficient and nothing else"),
  "kl": Condition("a larger KL coefficient", {"kl_coef": 0.1}),
  "ensemble": Condition("four heads, paid by their mean less their deviation", {"ensemble": "lower"}, heads=4),
  "length": Condition(
    "a completion pays for its length, about as much as the annotators like it",
    {"rewards": f"reward_model+length:8+{MONITORS}", "reward_settings": {"max_completion": NEW_TOKENS}},
  ),
  "price": Condition(
    "a token costs what the reward model pays for one at equal gold reward, measured on held-out pairs",
    {"rewards": f"reward_model+length:{{price}}+{MONITORS}", "reward_settings": {"max_completion": NEW_TOKENS}},
  ),
  "retraining": Condition(
    f"after each quarter of the run {NEW_PAIRS} pairs of its samples are labelled by the same annotators, and the "
    "reward model goes on from its last weights on them and as many earlier ones",
    rounds=4,
  ),
  "longer": Condition(
    "the first pairs alone, and a reward model that takes as many steps in all as with retraining",
    reward_steps=REWARD_STEPS + 3 * ROUND_STEPS,
  ),
}


def write_pairs(workdir: epath.Path, seed: int) -> pathlib.Path:
  """The folder of a seed's pairs, labelled by the length-biased, and of the held-out prompts, made if it is missing."""
  folder = pathlib.Path(workdir) / "pairs" / str(seed)
  if not (folder / "README.md").exists():  # the last to be written
    counts = dict(sft=0, preference=PAIRS, evaluation=400, prompts=PROMPTS)
    testbed.write(folder, seed=2000 + seed, population=POPULATION, **counts)
  return folder


def reward_config(workdir: epath.Path, seed: int, condition: Condition) -> Config:
  """The quickstart's reward model in fewer steps, on a seed's pairs."""
  pairs = write_pairs(workdir, seed)
  raw = quickstart.stage_config("reward", workdir, seed).to_dict()
  raw["model"] |= {"score_heads": condition.heads}
  raw["data"] |= {"train": str(pairs / "preference.jsonl"), "eval": str(pairs / "eval_preference.jsonl"), "cache": ""}
  raw["run"] |= {"steps": condition.reward_steps, "save_every": condition.reward_steps}
  return config_lib.resolve(raw)


def policy_config(workdir: epath.Path, seed: int, condition: Condition, steps: int) -> Config:
  """RLOO against the seed's reward model."""
  pairs, judge = write_pairs(workdir, seed), reward_dir(workdir, seed, condition)
  changed = dict(condition.algorithm)
  if "{price}" in changed.get("rewards", ""):
    changed["rewards"] = changed["rewards"].format(price=length_price(workdir, seed))
  algorithm = {
    "name": "grpo",
    "loss": "rloo",
    "advantages": "rloo",
    "rewards": f"reward_model+{MONITORS}",
    "reward_model": str(judge),
    "domain": str(judge / "domain"),
    "num_generations": 4,
    "max_new_tokens": NEW_TOKENS,
    "kl_in": "reward",
    "kl_estimator": "k1",
    "kl_coef": 0.002,
  }
  return config_lib.resolve(
    {
      "model": dict(quickstart.MODEL),
      "data": {
        "train": str(pairs / "preference.jsonl"),
        "eval": str(write_pairs(workdir, 0) / "eval_prompts.jsonl"),  # the same prompts for every seed
        "tokenizer": str(workdir / "tokenizer.model"),
        "rows": 16,
        "row_length": 40,
      },
      "algorithm": algorithm | changed,
      "optimizer": {"learning_rate": 1.5e-4, "b2": 0.99, "schedule": "constant", "warmup_steps": 4},
      "run": {
        "steps": steps // condition.rounds,
        "seed": seed,
        "init": str(workdir / "sft"),
        "log_every": 1,
        "eval_every": max(1, steps // 20),
        "save_every": max(1, steps // 4),
      },
    }
  )


def reward_dir(workdir: epath.Path, seed: int, condition: Condition) -> epath.Path:
  """Where a seed's reward model lies."""
  longer = f"-{condition.reward_steps}" if condition.reward_steps != REWARD_STEPS else ""
  return workdir / "reward" / f"{seed}-{condition.heads}{longer}"


def train_judge(workdir: epath.Path, seed: int, condition: Condition) -> run.Run:
  """A seed's reward model."""
  return run_of(fit(reward_config(workdir, seed, condition), reward_dir(workdir, seed, condition), "reward"))


def length_price(workdir: epath.Path, seed: int) -> float:
  """The weight of the reward `length` at which a token costs what a seed's reward model pays for one.

  That is its slope on tokens in a linear fit with the gold reward, over both sides of the seed's held-out pairs. It is
  less than the annotators' 0.17 nats a word: a model that has learned little pays little for anything.
  """
  judge = train_judge(workdir, seed, CONDITIONS["plain"])
  records = open_source(write_pairs(workdir, seed) / "eval_preference.jsonl")
  texts = [(record["prompt"], record[side]) for record in records for side in ("chosen", "rejected")]
  ask = lambda prompt: [{"role": "user", "content": prompt}]
  prompts = [judge.tokenizer.render(ask(prompt), add_generation_prompt=True) for prompt, _ in texts]
  whole = [judge.tokenizer.render([*ask(p), {"role": "assistant", "content": text}]) for p, text in texts]
  answers = [both[len(prompt) :] for both, prompt in zip(whole, prompts, strict=True)]
  with jax.set_mesh(judge.mesh):
    rewards = completion_rewards(judge.model, judge.params, prompts, answers).mean(axis=-1)
  gold = gold_rewards(*zip(*texts, strict=True))
  slopes = np.linalg.lstsq(np.stack([np.ones(len(gold)), gold, list(map(len, answers))], axis=1), rewards)[0]
  return round(float(slopes[2]) * NEW_TOKENS, 1)


def one(name: str, workdir: epath.Path, seed: int, steps: int) -> dict[str, Any]:
  """Trains and measures, or reads what an earlier call found."""
  condition = CONDITIONS[name]
  folder, judge_dir = workdir / f"steps-{steps}" / name / str(seed), reward_dir(workdir, seed, condition)
  judge = train_judge(workdir, seed, condition)
  config = policy_config(workdir, seed, condition, steps)
  settings = settings_of(config, condition)
  if (folder / "result.json").exists():
    found = json.loads((folder / "result.json").read_text())
    if as_now(found["settings"]) != settings:
      raise InputError(f"{folder}: made with other settings; remove it, or change --workdir")
    return found
  retrain.domain_of(judge_dir)
  begin = time.perf_counter()
  found = {"condition": name, "seed": seed, "reward_accuracy": judge.metrics["eval/rewards/accuracies"]}
  if condition.rounds > 1:
    labeller = scorer.settings("benchmarks.length_biased:label")
    request = Request(n=2, seed=seed, max_new_tokens=NEW_TOKENS)
    plan = retrain.Plan(config, labeller, request, pairs_per_round=NEW_PAIRS, reward_steps=ROUND_STEPS)
    rounds = retrain.retrain(plan, folder, condition.rounds)
    if rounds.get("stopped"):
      raise SystemExit(0)
    found["rounds"] = [
      {"new_pairs": row["labelled"]["pairs"], "accuracy_before": row["labelled"]["accuracy"]}
      | {"accuracy_after": row["reward"]["eval/rewards/accuracies"]}
      for row in rounds["rounds"][1:]
    ]
    parts = [folder_of(folder, number) / "policy" for number in range(1, condition.rounds + 1)]
  else:
    run_of(fit(config, folder, name))
    parts = [folder]
  rows = evaluations(parts, config.run.steps)
  raised = oo.alarms(rows, oo.default_rules(PROXY, GOLD))
  found |= {
    "curve": [{"step": row["step"], **{short: row[key] for short, key in KEPT.items()}} for row in rows],
    "first_alarms": {alarm.name: alarm.step for alarm in reversed(raised)},
    "wall_s": round(time.perf_counter() - begin, 1),
    "settings": settings,
  }
  (folder / "result.json").write_text(json.dumps(found, indent=2) + "\n")
  for part in parts:
    for large in ("checkpoints", "reference", "reward_model"):
      shutil.rmtree(part / large, ignore_errors=True)
  return found


def evaluations(parts: Sequence[epath.Path], steps: int) -> list[dict[str, Any]]:
  """The evaluations of runs that follow each other, of so many steps each, with the steps counted through."""
  rows = [(place, row) for place, part in enumerate(parts) for row in metrics.read(part / "metrics.jsonl")]
  return [row | {"step": place * steps + row["step"]} for place, row in rows if GOLD in row]


def settings_of(config: Config, condition: Condition) -> dict[str, Any]:
  """What decides a run's numbers beside its seed: finished ones are those of the same."""
  found = {part: config.to_dict()[part] for part in ("algorithm", "optimizer")} | {"length_bias": LENGTH_BIAS}
  found["algorithm"] = {k: v for k, v in found["algorithm"].items() if k not in ("reward_model", "domain")}
  if condition.rounds > 1:
    found["retraining"] = {"rounds": condition.rounds, "pairs": NEW_PAIRS, "reward_steps": ROUND_STEPS}
  return found


def as_now(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of a finished run with the options that are younger than it at their defaults: it did the same."""
  parts = ("algorithm", "optimizer")
  now = config_lib.resolve({part: settings[part] for part in parts}).to_dict()
  now["algorithm"] = {k: v for k, v in now["algorithm"].items() if k not in ("reward_model", "domain")}
  return dict(settings) | {part: now[part] for part in parts}


def train_sft(workdir: epath.Path) -> run.Run:
  """The quickstart's SFT run; `fit` would evaluate a complete one again."""
  config, folder = quickstart.stage_config("sft", workdir, seed=0), workdir / "sft"
  if (folder / "checkpoints" / str(config.run.steps)).exists():
    return run.load(folder)
  return run_of(fit(config, folder, "sft"))


def run_of(found: run.Run) -> run.Run:
  """`found`, unless it was told to stop: the same command goes on from here."""
  if found.stopped:
    raise SystemExit(0)
  return found


def best_of_n(workdir: epath.Path, sft: run.Run, seed: int) -> dict[str, Any]:
  """The SFT run's best-of-n curve by a seed's reward model, and where its samples lie in the model's domain."""
  path = workdir / "best-of-n" / f"{seed}.json"
  if path.exists():
    return json.loads(path.read_text())
  judge = train_judge(workdir, seed, CONDITIONS["plain"])
  records = (write_pairs(workdir, 0) / "eval_prompts.jsonl").read_text().splitlines()
  texts = [json.loads(record)["prompt"] for record in records]
  drawn = run.sample(sft, texts, num=SAMPLES, seed=seed, max_new_tokens=NEW_TOKENS)
  gold = [gold_rewards([text] * SAMPLES, [c.text for c in own]) for text, own in zip(texts, drawn, strict=True)]
  render = lambda text: sft.tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True)
  rows = [[*render(text), *c.tokens] for text, own in zip(texts, drawn, strict=True) for c in own]
  with jax.set_mesh(judge.mesh):
    scored = domains.measure(judge.model, judge.params, batches(rows, 64), sides=1)
  curve = oo.best_of_n(scored.rewards.reshape(len(texts), SAMPLES), np.array(gold))
  found = {"seed": seed, "curve": [{"n": p.n, "kl": p.kl, "proxy": p.proxy.value, "gold": p.gold.value} for p in curve]}
  found["distinct_2"] = oo.distinct_n([c.tokens for own in drawn for c in own], 2)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(found, indent=2) + "\n")
  return found


def batches(rows: list[list[int]], size: int):
  """Texts as batches of one text a row, as `reward_domain.measure` takes them."""
  width = max(map(len, rows))
  for start in range(0, len(rows), size):
    part = rows[start : start + size]
    tokens, segment_ids = np.zeros((2, size, width), np.int32)
    for row, ids in enumerate(part):
      tokens[row, : len(ids)] = ids
      segment_ids[row, : len(ids)] = 1
    there = (np.arange(size) < len(part)).astype(np.float32)[:, None]
    yield {
      "tokens": tokens,
      "segment_ids": segment_ids,
      "positions": np.arange(width, dtype=np.int32) * segment_ids,
      "example_mask": there,
    }


def collect(workdir: epath.Path, steps: int) -> dict[str, Any]:
  """All that is finished."""
  read = lambda pattern: [json.loads(path.read_text()) for path in sorted(workdir.glob(pattern))]
  runs = read(f"steps-{steps}/*/*/result.json")
  return {
    "question": __doc__.splitlines()[0],
    "steps": steps,
    "pairs": PAIRS,
    "prompts": PROMPTS,
    "completions_per_prompt": 4,
    "length_bias": LENGTH_BIAS,
    "conditions": {name: condition.reason for name, condition in CONDITIONS.items()},
    **summary(runs),
    "runs": runs,
    "best_of_n": read("best-of-n/*.json"),
  }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
  """Where each condition turns, and how that differs from the plain runs of the same seeds."""
  of = {name: [r for r in runs if r["condition"] == name] for name in CONDITIONS}
  done = {name: own for name, own in of.items() if own}
  return {
    "turning_points": {name: turning_point(own) for name, own in done.items()},
    "against_plain": {name: against_plain(of["plain"], own) for name, own in done.items() if name != "plain"},
  }


def summarise() -> None:
  """Derives the summary of results/overoptimisation.json again from the runs in it; commit and date stay the runs'."""
  path = result.RESULTS / "overoptimisation.json"
  record = json.loads(path.read_text())
  path.write_text(json.dumps(record | summary(record["runs"]), indent=2) + "\n")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--workdir", type=epath.Path, default="runs/overoptimisation", help="a quickstart's of seed 0 will do")
  add("--conditions", nargs="+", default=list(CONDITIONS), choices=CONDITIONS, metavar="NAME")
  add("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: only gather what is finished")
  add("--steps", type=int, default=100, help="iterations of 16 prompts")
  add("--draw", action="store_true", help="only summarise the runs of results/overoptimisation.json again, and draw")
  a = parser.parse_args()
  if a.draw:
    summarise()
  else:
    workdir = a.workdir.expanduser()
    quickstart.write_data(workdir, seed=0)
    sft = train_sft(workdir)
    for seed in a.seeds:  # a run that is cut short has compared all conditions
      for name in a.conditions:
        last = one(name, workdir, seed, a.steps)["curve"][-1]
        jax.clear_caches()  # a program of another condition is of no more use
        result.write("overoptimisation", collect(workdir, a.steps))
        print(f"{name}, seed {seed}: gold {last['gold']:.2f} at {last['kl']:.1f} nats", flush=True)
      best_of_n(workdir, sft, seed)
    result.write("overoptimisation", collect(workdir, a.steps))
  print("drew", overoptimisation_figure.draw(result.RESULTS / "overoptimisation.json"))


if __name__ == "__main__":
  malloc.keep_freed()  # as the command line does
  main()
