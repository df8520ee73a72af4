"""How fast and how large is this package beside TRL and Tunix, on the same work and machine?

  python -m benchmarks.peers [--rounds 6]

Four tasks with the 27M-parameter decoder of benchmarks/step_time.py, in float32 and bfloat16, on a processor:

  dpo: a step of DPO on 4 pairs of 512 tokens a side, the reference's forward pass included.
  reward: a step of a reward model on the same pairs.
  ppo: 16 prompts of 64 tokens: 64 new ones each, their scores by reference, reward model and critic (four models of the
    one size), and 2 updates of policy and critic on all of them.
  generate: 16 prompts of 128 tokens, 128 new ones each, sampled at temperature 1.

Every side gets the same weights, in files of transformers' layout, and the same tokens. Rows are full: nobody pays for
padding. Each side is a process of its own in its own environment (peer_alignjax.py, peer_trl.py and peer_tunix.py say
how each is set up and what bfloat16 means there), which are installed where they are missing. The sides take turns, in
an order that moves on every round, and ratios are taken within a round: what else the machine does slows all alike.
Steps of DPO and of the reward model must find the same losses on each side, PPO about the same KL divergence of policy
and reference, and greedy decoding the same tokens: else there is no result. Peak memory is the most that the process
had resident, compilation included; what its imports alone take is beside it.

Writes benchmarks/results/peers.json after each comparison.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from alignjax.model import ModelConfig, decoder
from alignjax.model.huggingface import weights
from alignjax.system import malloc
from benchmarks import environments, result
from benchmarks.step_time import DTYPES, MODEL

TASKS = {"dpo": "DPO step", "reward": "reward-model step", "ppo": "PPO iteration", "generate": "generation"}
SIDES = {"alignjax": "alignjax", "trl": "TRL", "tunix": "Tunix"}
NOT_MEASURED = {("tunix", "reward"): "Tunix trains no reward models"}
WARM_UP = 2  # rounds that do not count: programs are compiled, memory is found
COVERAGE = 0.95  # of the intervals
SPECIAL = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
# One rotary base for all: Tunix's Llama has only this one.
WORK = {
  "model": MODEL | {"rope_theta": 1e6, "norm_eps": 1e-6},
  "pairs": 4,
  "length": 512,  # tokens of a side of a pair
  "prompts": 16,
  "prompt_length": 64,
  "new_tokens": 64,
  "epochs": 2,
  "batch": 16,  # prompts of `generate`
  "batch_prompt_length": 128,
  "batch_new_tokens": 128,
  "learning_rate": 1e-6,  # a pair is not learnt by heart within the rounds
  "beta": 0.1,
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--rounds", type=int, default=6, help="times that every side takes its turn")
  parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
  parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
  parser.add_argument("--table", action="store_true", help="only print the table of results/peers.json")
  a = parser.parse_args()
  if a.table:
    print(table(json.loads((result.RESULTS / "peers.json").read_text())["tasks"]))
    return
  numbers: dict[str, Any] = {"question": __doc__.splitlines()[0], "work": WORK, "rounds": a.rounds, "warm_up": WARM_UP}
  load, versions, tasks = os.getloadavg(), {}, {}
  with tempfile.TemporaryDirectory() as folder:
    write_work(pathlib.Path(folder), WORK)
    for dtype, task in itertools.product(a.dtypes, a.tasks):
      found = compare(pathlib.Path(folder), task, dtype, a.rounds)
      versions |= found.pop("versions")
      tasks.setdefault(task, {"tokens_per_turn": tokens_per_turn(task, WORK)})[dtype] = found
      print(f"{task} {dtype}: {json.dumps(found['alignjax_over'], indent=2)}", flush=True)
      loads = {"load_average_1_5_15_min": {"start": load, "end": os.getloadavg()}}
      facts = {"versions_of_sides": versions, "gpu": "not measured: there was none"}
      print("wrote", result.write("peers", numbers | {"tasks": tasks} | facts | loads), flush=True)


def write_work(folder: pathlib.Path, work: Mapping[str, Any]) -> None:
  """Writes what all sides read: weights of a policy, of another as the reference, of a reward model; tokens; sizes."""
  config = ModelConfig(**work["model"])
  scoring = ModelConfig(**work["model"] | {"head": "scalar", "tied": True})
  for seed, (name, c) in enumerate({"policy": config, "reference": config, "reward": scoring}.items()):
    model = decoder.make(c)
    params = jax.jit(model.init)(jax.random.key(seed))
    head = "score" if c.head == "scalar" else "unembed"  # so large that it tells tokens and completions apart
    params[head] = jax.random.normal(jax.random.key(10 + seed), params[head].shape) * c.embed**-0.5
    weights.save(folder / name, model, params, SPECIAL)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.integers(3, config.vocab, shape, np.int32)
  pairs = draw(work["pairs"], 2, work["length"])
  half = work["length"] // 2
  pairs[:, 1, :half] = pairs[:, 0, :half]  # of one prompt
  pairs[:, :, -1] = SPECIAL["eos_token_id"]  # else TRL adds it
  prompts = draw(work["prompts"], work["prompt_length"])
  np.savez(folder / "tokens.npz", pairs=pairs, prompts=prompts, batch=draw(work["batch"], work["batch_prompt_length"]))
  (folder / "work.json").write_text(json.dumps(work))


def tokens_per_turn(task: str, work: Mapping[str, Any]) -> int:
  """Of a training step all tokens of the rows; where some are sampled, those."""
  if task in ("dpo", "reward"):
    return work["pairs"] * 2 * work["length"]
  return work["prompts"] * work["new_tokens"] if task == "ppo" else work["batch"] * work["batch_new_tokens"]


class Side:
  """A process of one side, for one task in one dtype."""

  def __init__(self, name: str, folder: pathlib.Path, task: str, dtype: str):
    """Starts it and waits until it is ready."""
    self.name, self.log = name, folder / f"{name}-{task}-{dtype}.log"
    environment, root = os.environ | environments.SETTINGS, environments.FOLDER.parent
    command = [*interpreter(name, task), str(folder), task, dtype]
    if name == "alignjax":
      environment["PYTHONPATH"] = str(root)
    with self.log.open("w") as log:
      self.process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=root, env=environment
      )
    self.facts = self._answer()

  def turn(self) -> dict[str, Any]:
    """Takes one; returns the worker's answer."""
    self.process.stdin.write("{}\n")
    self.process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict[str, Any]:
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f"{self.name} ended: {self.log.read_text()[-3000:]}")
    return json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    self.process.stdin.close()
    self.process.wait()


def interpreter(side: str, task: str) -> list[str]:
  """The command of a side's worker, without its arguments."""
  if side == "alignjax":
    return [sys.executable, "-m", "benchmarks.peer_alignjax"]
  return [environments.python(requirements(side, task)), str(environments.FOLDER / f"peer_{side}.py")]


def requirements(side: str, task: str) -> str:
  """The file of another side's environment for a task."""
  return f"requirements-{side}{'-ppo' * ((side, task) == ('trl', 'ppo'))}.txt"


def compare(
  folder: pathlib.Path, task: str, dtype: str, rounds: int, sides: Sequence[str] = tuple(SIDES)
) -> dict[str, Any]:
  """What each side takes for a task, and this package's part of it.

  Raises:
    SystemExit: a side ended, or did other work than this package.
  """
  there = [side for side in sides if (side, task) not in NOT_MEASURED]
  ready, answers = take_turns(folder, task, dtype, rounds, there)
  last = {side: found[-1] for side, found in answers.items()}
  if wrong := disagreement(task, dtype, last):
    raise SystemExit(f"{task} {dtype}: {wrong}")
  measures = {
    side: {
      **{key: np.array([answer[key] for answer in found[WARM_UP:]]) for key in ("seconds", "cpu_seconds")},
      "peak_mb": last[side]["peak_mb"],
      "imported_mb": ready[side]["imported_mb"],
    }
    for side, found in answers.items()
  }
  tokens = tokens_per_turn(task, json.loads((folder / "work.json").read_text()))
  return {
    **{side: row(found, tokens) for side, found in measures.items()},
    **{side: {"not_measured": NOT_MEASURED[side, task]} for side in sides if side not in there},
    "alignjax_over": {side: part(measures["alignjax"], measures[side]) for side in there if side != "alignjax"},
    "found": {side: evidence(task, answer) for side, answer in last.items()},
    "versions": {
      "this" if side == "alignjax" else requirements(side, task): facts["versions"] for side, facts in ready.items()
    },
  }


def take_turns(
  folder: pathlib.Path, task: str, dtype: str, rounds: int, sides: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
  """What each side says when it is ready, and after every turn, those that warm up included."""
  running: dict[str, Side] = {}
  answers: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
  try:
    for side in sides:
      running[side] = Side(side, folder, task, dtype)
    for i in range(WARM_UP + rounds):
      for k in range(len(sides)):
        side = sides[(i + k) % len(sides)]
        answers[side].append(running[side].turn())
  finally:
    for process in running.values():
      process.close()
  return {side: process.facts for side, process in running.items()}, answers


def row(found: Mapping[str, Any], tokens: int) -> dict[str, Any]:
  """The numbers of one side."""
  memory = {key: round(found[key]) for key in ("peak_mb", "imported_mb")}
  seconds = {key: spread(found[key]) for key in ("seconds", "cpu_seconds")}
  return seconds | {"tokens_per_s": spread(tokens / found["seconds"])} | memory


def part(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
  """Our speed over theirs, round by round, by the clock and by the seconds of all cores; our memory over theirs."""
  speeds = {f"tokens_per_{key}": spread(theirs[f"{key}econds"] / ours[f"{key}econds"]) for key in ("s", "cpu_s")}
  return speeds | {"peak_mb": ours["peak_mb"] / theirs["peak_mb"]}


def spread(values: np.ndarray) -> dict[str, Any]:
  """Median of the rounds, an interval around it, and their least and greatest."""
  low, high, coverage = median_interval(values)
  least, greatest = float(values.min()), float(values.max())
  return {
    "median": float(np.median(values)), "interval": [low, high], "coverage": coverage, "min": least, "max": greatest,
  }  # fmt: skip


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
  """The narrowest interval of two of the values that covers the median with COVERAGE; of few values, the widest.

  Returns:
    Its ends, and the probability that it covers the median whatever the distribution.
  """
  n, ordered = len(values), np.sort(values)
  outside = lambda k: 2 * sum(math.comb(n, i) for i in range(k)) / 2**n  # of the k-th least and k-th greatest
  k = max((k for k in range(1, (n + 1) // 2 + 1) if 1 - outside(k) >= COVERAGE), default=1)
  return float(ordered[k - 1]), float(ordered[n - k]), 1 - outside(k)


def table(tasks: Mapping[str, Any]) -> str:
  """The ratios in Markdown: speed with its interval, and memory, of each other side and dtype."""
  lines = [f"| beside | {' | '.join(TASKS[task] for task in tasks)} |", "| --- |" + " --- |" * len(tasks)]

  def cell(found: Mapping[str, Any], side: str) -> str:
    if side not in found.get("alignjax_over", {}):
      return "not measured"
    ratio = found["alignjax_over"][side]
    speed, (low, high) = ratio["tokens_per_s"]["median"], ratio["tokens_per_s"]["interval"]
    return f"{speed:.2f} [{low:.2f}, {high:.2f}]; {ratio['peak_mb']:.2f}"

  for side, dtype in itertools.product([side for side in SIDES if side != "alignjax"], DTYPES):
    cells = [cell(numbers.get(dtype, {}), side) for numbers in tasks.values()]
    lines.append(f"| {SIDES[side]}, {dtype} | {' | '.join(cells)} |")
  return "\n".join(lines)


def evidence(task: str, answer: Mapping[str, Any]) -> dict[str, Any]:
  """What the turns found, as far as the JSON keeps it."""
  return {"greedy": answer["greedy"][0][:8]} if task == "generate" else {k: answer[k] for k in EVIDENCE[task]}


EVIDENCE = {"dpo": ("losses",), "reward": ("losses",), "ppo": ("kl", "score"), "generate": ("greedy",)}
# How far others may be from us: losses absolutely, a KL divergence relatively, and the share of other tokens. In
# bfloat16 sides round in other places, and Tunix rounds updates of the weights away: there the first loss alone counts.
TOLERANCES = {
  "float32": {"losses": 1e-3, "kl": 0.2, "greedy": 0.05},
  "bfloat16": {"losses": 0.5, "kl": 0.3, "greedy": 1.0},
}


def disagreement(task: str, dtype: str, last: Mapping[str, Mapping[str, Any]]) -> str:
  """How a side did other work than this package; "" if none did."""
  key = EVIDENCE[task][0]
  allowed, ours = TOLERANCES[dtype][key], np.array(last["alignjax"][key])
  for side, answer in last.items():
    theirs = np.array(answer[key])
    far = math.inf
    if key == "greedy" and theirs.shape == ours.shape:
      far = float((theirs != ours).mean())
    elif key == "kl" and theirs.size:  # of other completions
      far = abs(float(theirs.mean() / ours.mean()) - 1)
    elif key == "losses" and (n := min(len(theirs), len(ours) if dtype == "float32" else 1)):  # TRL's last comes late
      far = float(np.abs(theirs[:n] - ours[:n]).max())
    if not far <= allowed:
      return f"{side}'s {key} are {far:.3g} from alignjax's, allowed {allowed}: {answer[key]}, {last['alignjax'][key]}"
  return ""


if __name__ == "__main__":
  malloc.keep_freed()  # as the command line does
  main()
