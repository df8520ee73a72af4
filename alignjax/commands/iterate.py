"""Rounds of generate, score, choose and retrain: iterative DPO, RAFT, expert iteration; `alignjax iterate`.

A round asks the last one's policy for n completions of each prompt, keeps the best (or best and worst), and trains on
them with any offline algorithm; it is a folder with these records (best_of.py) and an ordinary run. Each part continues
by itself where it was interrupted, and is a function of the plan: so are the rounds.

Source: iterative DPO: Xiong et al. 2024 (arXiv:2312.11456), Dong et al. 2024 (arXiv:2405.07863); RAFT: Dong et al. 2023
(arXiv:2304.06767)
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from alignjax.algorithms import ALGORITHMS
from alignjax.commands.best_of import Request, best_of, draw, listed
from alignjax.commands.resumable import write, write_json
from alignjax.commands.rounds import aligned, claim, folder_of, newest, once, prompts_of, seed_of
from alignjax.data.source import open_source
from alignjax.errors import InputError
from alignjax.evaluation import interval
from alignjax.evaluation.kl import completion_logps, sequence_kl
from alignjax.evaluation.win_rate import win_rate
from alignjax.runs.build import records_of
from alignjax.runs.config import Config
from alignjax.runs.initial_params import check_sources
from alignjax.runs.run import load
from alignjax.runs.scorer import make_scorer
from alignjax.runs.workdir import alone
from alignjax.system import hosts, output, ranges
from alignjax.system.ranges import Count, Whole
from alignjax.train import fit

REFERENCES = ("last", "first")


class Plan(NamedTuple):
  """What the rounds do.

  Attributes:
    config: of a round's training; its run.init is the first policy, its data.train stands for every round's records.
    rewards: see `scorer.settings`; rewards of weight 0 are measured alone.
    request: what is sampled; a round folds its number into the seed.
    prompts: a file of records; "": the config's data.train.
    prompts_per_round: each round takes the next so many, in an order of its own; 0: all of them.
    eval_prompts: held out: every round's policy, and the first, answers each once. "": none.
    reference: "last": a round's reference is the policy that it begins with; "first": the first of all.
  """

  config: Config
  rewards: Mapping[str, Any]
  request: Request = Request()
  prompts: str = ""
  prompts_per_round: int = 0
  eval_prompts: str = ""
  reference: str = "last"


@alone("iterates")
def iterate(plan: Plan, workdir: epath.PathLike, rounds: int) -> dict[str, Any]:
  """Takes the rounds that are not yet complete, and writes summary.json.

  Args:
    plan: the same at every call; the rounds may become more.
    workdir: made if missing; round-01/records.jsonl, round-01/run, ...
    rounds: how many, in all.

  Returns:
    {"rounds": [...]}, a row each, the first policy's as round 0 where there are held-out prompts; or {"stopped": True}.

  Raises:
    InputError: as `train.fit` and `best_of`; a config that no offline algorithm of a policy reads; another plan's
      rounds in `workdir`.
  """
  workdir = epath.Path(workdir).expanduser()
  pairs = _check(plan, rounds)
  if not hosts.there(workdir / "plan.json"):
    check_sources(workdir, plan.config)
  plan = claim(workdir, plan)
  rows = []
  if plan.eval_prompts:
    rows.append(once(folder_of(workdir, 0) / "round.json", lambda: {"round": 0} | evaluate(plan, workdir, 0)))
  for number in range(1, rounds + 1):
    row = once(folder_of(workdir, number) / "round.json", lambda: one_round(plan, workdir, number, pairs))  # noqa: B023
    if not row:
      return {"stopped": True, "rounds": rows}
    rows.append(row)
    hosts.say(show({"rounds": rows}).splitlines()[-1])
  result = {"rounds": rows}
  write(workdir / "summary.json", [json.dumps(result, indent=2)])
  return result


def one_round(plan: Plan, workdir: epath.Path, number: int, pairs: bool) -> dict[str, Any]:
  """Generates, scores, chooses and trains; the round's row, or {} where a signal ended the training."""
  folder, start = folder_of(workdir, number), policy_of(plan, workdir, number - 1)
  policy = load(start, trust_code=[plan.config.model.module])
  scorer = make_scorer(plan.rewards, policy.tokenizer, policy.mesh)
  source = open_source(plan.prompts or plan.config.data.train)
  request = plan.request._replace(seed=seed_of(plan.request.seed, number))
  found = best_of(
    policy,
    source,
    scorer,
    folder / "records.jsonl",
    request,
    pairs=pairs,
    numbers=prompts_of(plan.request.seed, plan.prompts_per_round, len(source), number),
  )
  overrides = {"data__train": str(folder / "records.jsonl"), "run__init": start}
  if plan.reference == "first":
    overrides["run__reference"] = plan.config.run.init
  run = fit(plan.config.replace(**overrides), folder / "run", f"round {number}")
  if run.stopped:
    return {}
  kept = ("prompts", "records", "left_out", "cut_off", "failed_rewards", "scores", "scores_of_all", "finished")
  row = {
    "round": number,
    "generated": {key: found[key] for key in kept},
    "trained": newest(folder / "run" / "metrics.jsonl"),
  }
  return row | (evaluate(plan, workdir, number) if plan.eval_prompts else {})


def evaluate(plan: Plan, workdir: epath.Path, number: int) -> dict[str, Any]:
  """What a round's policy (0: the first) writes for the held-out prompts, at temperature 1, beside the first one's.

  Returns:
    {"kl": of it from the first, "length", "finished", "rewards": {NAME or "score": mean, interval, win rate against
    the first}}; every interval at 95 %.
  """
  given = [plan.config.model.module]
  first = load(plan.config.run.init, trust_code=given)
  policy = first if number == 0 else load(policy_of(plan, workdir, number), trust_code=given)
  scorer = make_scorer(plan.rewards, policy.tokenizer, policy.mesh)
  source = open_source(plan.eval_prompts)
  whole = Request(
    1, seed_of(plan.request.seed, number, 1), plan.request.max_new_tokens, batch_size=plan.request.batch_size
  )
  drawn = draw(policy, source, range(len(source)), whole)
  worth = scorer.score(drawn)
  values = {"score": worth.scores} | worth.each
  write_json(folder_of(workdir, number) / "heldout.json", {name: listed(v) for name, v in values.items()})
  first_ones = folder_of(workdir, 0)
  before = output.read_json(first_ones / "heldout.json", f"delete {first_ones}, and it is made again")
  prompts, ids = [one.prompt_ids for one in drawn], [one.completion.tokens for one in drawn]
  with jax.set_mesh(policy.mesh):
    logps = [completion_logps(run.model, run.params, prompts, ids) for run in (policy, first)]
  asked = [json.dumps(one.prompt) for one in drawn]
  kl = sequence_kl(*logps, asked).kl
  return {
    "kl": {"mean": kl.value, "interval": kl.interval},
    "length": float(np.mean([len(one) for one in ids])),
    "finished": float(np.mean([one.completion.finished for one in drawn])),
    "rewards": {name: compared(found, np.array(before[name], np.float64), asked) for name, found in values.items()},
  }


def compared(found: np.ndarray, before: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
  """Mean of a reward, and how often it is above another policy's, on the prompts where both have it."""
  both = ~np.isnan(found) & ~np.isnan(before)
  if not both.any():
    return {"prompts": 0}
  asked = [prompts[i] for i in np.flatnonzero(both)]
  mean, wins = interval.mean(found[both], asked), win_rate(found[both], before[both], asked)
  numbers = {"mean": mean.value, "interval": mean.interval, "win_rate": wins.value, "win_rate_interval": wins.interval}
  return numbers | {"prompts": int(both.sum())}


def show(result: Mapping[str, Any]) -> str:
  """The rounds as a table for people."""
  rows = result["rounds"]
  names = list(dict.fromkeys(name for row in rows for name in row.get("rewards", {})))
  head = ["round", "records", "generated", "chosen", *names, "wins by score", "KL", "tokens"]
  return aligned([head, *(_cells(row, names) for row in rows)])


def _cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
  number = lambda tree, *path: f"{tree[path[0]]:.3f}" if len(path) == 1 and path[0] in tree else "-"
  generated, rewards = row.get("generated", {}), row.get("rewards", {})
  sides = generated.get("scores") or {}
  best = sides.get("chosen") or sides.get("completion") or {}
  return [
    str(row["round"]),
    str(generated.get("records", "-")),
    number(generated.get("scores_of_all") or {}, "mean"),
    number(best, "mean"),
    *(number(rewards.get(name, {}), "mean") for name in names),
    number(rewards.get("score", {}), "win_rate"),
    number(row.get("kl", {}), "mean"),
    f"{row['length']:.1f}" if "length" in row else "-",
  ]


def policy_of(plan: Plan, workdir: epath.Path, number: int) -> str:
  """The run of a round's policy."""
  return str(folder_of(workdir, number) / "run") if number else plan.config.run.init


def _check(plan: Plan, rounds: int) -> bool:
  """Whether the algorithm takes pairs; raises InputError where the plan means nothing."""
  config = plan.config
  kind = records_of(config)
  if ALGORITHMS[config.algorithm.name].head != "none" or kind not in ("sft", "preference", "unpaired"):
    raise InputError(f"algorithm.name={config.algorithm.name}: rounds are of sft, preference or unpaired; use one")
  if not config.run.init:
    raise InputError("run.init is empty; name the run of the policy that the first round asks")
  if config.lora.rank:
    raise InputError(f"lora.rank={config.lora.rank}: a round begins with all weights of the last; use 0")
  if plan.reference not in REFERENCES:
    raise InputError(f"--reference={plan.reference}: use one of {', '.join(REFERENCES)}")
  ranges.check("--rounds", rounds, Count)
  ranges.check("--prompts-per-round", plan.prompts_per_round, Whole)
  plan.request.check()
  if plan.eval_prompts and len(open_source(plan.eval_prompts)) < 2:
    raise InputError(f"--eval-prompts={plan.eval_prompts}: holds one prompt, over which no interval can be; give two")
  return kind != "sft"
