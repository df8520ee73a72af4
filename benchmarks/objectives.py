"""Which objective reaches how much gold reward, how far from SFT, and what do wrong labels change?

  python -m benchmarks.objectives --workdir runs/objectives --label-noise 0 0.2
  python -m benchmarks.objectives --draw

Every objective on pairs or labelled completions, from one SFT checkpoint of the built-in world (the quickstart's, made
if it is missing), in short runs with the quickstart's settings. A seed is another draw of pairs, another order, other
samples. Label noise is a share of labels turned over, beside the faults that the world's annotators have anyway.

A finished (label noise, objective, seed) is not run again. Writes results/objectives.json after each, and draws
results/objectives.svg from it.
"""

import argparse
import json
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from alignjax.algorithms import ALGORITHMS
from alignjax.commands import quickstart
from alignjax.environments import testbed
from alignjax.errors import InputError
from alignjax.runs import config as config_lib
from alignjax.runs.config import Config
from alignjax.runs.run import Run
from alignjax.system import malloc
from alignjax.train import fit
from benchmarks import objectives_figure, result

RATE = 1.5e-4  # of all: Adam takes out the size of a loss, and one rate makes one length of the way
PAIRED, UNPAIRED = ("preference",), ("unpaired", "mismatched")  # kinds of records that pairs can feed
KEPT = (
  *("gold_win_rate_vs_sft", "gold_win_rate_interval", "prompts", "gold_mean", "gold_mean_sft"),
  *("kl", "kl_interval", "kl_stderr", "capability", "capability_sft", "sycophancy", "harm", "over_refusal", "finished"),
)


class Setting(NamedTuple):
  """What an objective is run with: hyper-parameters that are not the defaults, why, and the loss if named otherwise."""

  hparams: dict[str, float]
  reason: str
  loss: str = ""


# A completion has about 17 tokens. The quickstart's beta of 0.2 asks for margins of some 5 nats; what is said per token
# needs about 17 times as much.
SUMS = {"beta": 0.2}
SETTINGS = {
  "dpo": Setting(SUMS, "the quickstart's"),
  "cdpo": Setting(SUMS | {"label_smoothing": 0.1}, "the quickstart's: one annotator in eleven tosses a coin", "dpo"),
  "ipo": Setting({"beta": 1.5}, "a target of 1/3 nat a token, 5 to 6 a completion"),
  "hinge": Setting(SUMS, "margins up to 5 nats"),
  "robust": Setting(SUMS | {"label_smoothing": 0.1}, "the rate of labels that the world's annotators turn over"),
  "exo_pair": Setting(SUMS, "as dpo"),
  "nca_pair": Setting(SUMS, "as dpo"),
  "bco_pair": Setting(SUMS, "as dpo"),
  "sppo_hard": Setting(SUMS, "targets of 2.5 nats up and down"),
  "aot": Setting(SUMS, "as dpo"),
  "aot_unpaired": Setting(SUMS, "as dpo"),
  "apo_zero": Setting(SUMS, "as dpo"),
  "apo_down": Setting(SUMS, "as dpo; made for pairs that are worse than the policy's own answers, which these are not"),
  "discopop": Setting(SUMS, "as dpo"),
  "sigmoid_norm": Setting({"beta": 3.0}, "0.2 a token, for 17 tokens"),
  "sft": Setting({}, "supervised training on the chosen side: what the pairs' better half alone gives"),
  "orpo": Setting({"beta": 0.5}, "at the paper's 0.1 the likelihood term of an SFT model outweighs the odds"),
  "cpo": Setting(SUMS, "as dpo"),
  "simpo": Setting({"beta": 3.0, "gamma": 0.5}, "as sigmoid_norm; a target of 1/6 nat a token"),
  "cpo_simpo": Setting({"beta": 3.0, "gamma": 0.5}, "as simpo"),
  "alphapo": Setting({"beta": 3.0, "gamma": 0.5}, "as simpo"),
  "kto": Setting(SUMS, "as dpo"),
  "apo_zero_unpaired": Setting(SUMS, "as dpo"),
  "bco": Setting(SUMS, "as dpo"),
}


def objectives() -> dict[str, str]:
  """The algorithm of each loss that pairs can feed; policies only, and no second SFT stage."""
  return {
    loss: name
    for name, module in ALGORITHMS.items()
    if module.head == "none" and name != "sft"
    for loss in module.losses
    if module.kind(loss) in PAIRED + UNPAIRED
  }


def make_config(name: str, workdir: epath.Path, pairs: pathlib.Path, seed: int, steps: int) -> Config:
  """The quickstart's DPO stage with another objective; of labelled completions a row holds twice as many."""
  setting = SETTINGS[name]
  loss = setting.loss or name
  algorithm = objectives()[loss]
  raw = quickstart.stage_config("dpo", workdir, seed).to_dict()
  raw["algorithm"] = {"name": algorithm, "loss": loss, **setting.hparams}
  raw["optimizer"] |= {"learning_rate": RATE}
  raw["data"] |= {"train": str(pairs), "eval": "", "holdout": 0.0}
  if ALGORITHMS[algorithm].kind(loss) in UNPAIRED:
    raw["data"]["max_examples"] *= 2
  raw["run"] |= {"steps": steps, "save_every": steps}
  return config_lib.resolve(raw)


def write_pairs(workdir: epath.Path, label_noise: float, seed: int) -> pathlib.Path:
  """The file of a seed's pairs, made if it is missing."""
  folder = pathlib.Path(workdir) / "pairs" / f"noise-{label_noise:g}-seed-{seed}"
  if not (folder / "README.md").exists():  # the last to be written
    population = testbed.noisier(testbed.POPULATIONS["default"], label_noise)
    pairs = quickstart.DATA["preference"]
    testbed.write(folder, seed=1000 + seed, sft=0, preference=pairs, evaluation=0, prompts=0, population=population)
  return folder / "preference.jsonl"


def one(name: str, workdir: epath.Path, sft: Run, label_noise: float, seed: int, steps: int) -> dict[str, Any]:
  """Trains and judges, or reads what an earlier call found.

  Raises:
    InputError: the earlier call had other settings.
  """
  folder = workdir / f"steps-{steps}" / f"noise-{label_noise:g}" / name / str(seed)
  config = make_config(name, workdir, write_pairs(workdir, label_noise, seed), seed, steps)
  settings = config.to_dict()["algorithm"] | {"learning_rate": config.optimizer.learning_rate}
  if (folder / "result.json").exists():
    found = json.loads((folder / "result.json").read_text())
    if found["settings"] != settings:
      raise InputError(f"{folder}: made with {found['settings']}, now {settings}; remove it, or change --workdir")
    return found
  begin = time.perf_counter()
  run = fit(config, folder, name)
  if run.stopped:
    raise SystemExit(0)  # told to stop; the same command goes on from here
  trained = time.perf_counter()
  prompts = workdir / "data" / "eval_prompts.jsonl"
  numbers = quickstart.evaluate_policies({"sft": sft, "policy": run}, prompts, seed)["policy"]
  found = {
    "objective": name,
    "label_noise": label_noise,
    "seed": seed,
    **{key: numbers[key] for key in KEPT},
    "wall_s": {"train": round(trained - begin, 1), "evaluate": round(time.perf_counter() - trained, 1)},
    "settings": settings,
  }
  (folder / "result.json").write_text(json.dumps(found, indent=2) + "\n")
  for part in ("checkpoints", "reference"):  # tens of megabytes each, of some hundred runs
    shutil.rmtree(folder / part, ignore_errors=True)
  return found


def collect(workdir: epath.Path, steps: int) -> list[dict[str, Any]]:
  """All that is finished."""
  return [json.loads(path.read_text()) for path in sorted((workdir / f"steps-{steps}").glob("*/*/*/result.json"))]


def run_all(names: Sequence[str], workdir: epath.Path, noises: Sequence[float], seeds: Sequence[int], steps: int):
  """Every (seed, label noise, objective), in this order: a run that is cut short has compared all of them."""
  quickstart.write_data(workdir, seed=0)
  sft = fit(quickstart.stage_config("sft", workdir, seed=0), workdir / "sft", "sft")
  for seed in seeds:
    for label_noise in noises:
      for name in names:
        found = one(name, workdir, sft, label_noise, seed, steps)
        jax.clear_caches()  # a program of another loss is of no more use
        numbers = {"question": __doc__.splitlines()[0], "steps": steps, "runs": collect(workdir, steps)}
        result.write("objectives", numbers | {"reasons": {n: setting.reason for n, setting in SETTINGS.items()}})
        print(f"{name}, noise {label_noise:g}, seed {seed}: {summary(found)}", flush=True)


def summary(found: dict[str, Any]) -> str:
  """The numbers of one run for a reader."""
  return f"{found['gold_win_rate_vs_sft']:.1%} at {found['kl']:.2f} nats; {found['wall_s']} s"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=epath.Path, default="runs/objectives", help="a quickstart's of seed 0 will do")
  parser.add_argument("--objectives", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--label-noise", type=float, nargs="+", default=[0.0], help="shares of labels turned over")
  parser.add_argument("--draw", action="store_true", help="only draw results/objectives.svg again")
  a = parser.parse_args()
  if not a.draw:
    run_all(a.objectives, a.workdir.expanduser(), a.label_noise, a.seeds, a.steps)
  print("drew", objectives_figure.draw(result.RESULTS / "objectives.json"))


if __name__ == "__main__":
  malloc.keep_freed()  # as the command line does
  main()
