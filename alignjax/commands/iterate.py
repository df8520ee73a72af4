"""Rounds of generate, score, choose and retrain: iterative DPO, RAFT, expert iteration; `alignjax iterate`.

A round samples n completions of each prompt from the last round's policy, keeps the best (or best and worst), and
trains on them with any offline algorithm. It is a folder with these records (best_of.py) and an ordinary run. Each part
is a function of the plan, and continues where it was interrupted.

Source: iterative DPO: Xiong et al. 2024 (arXiv:2312.11456), Dong et al. 2024 (arXiv:2405.07863); RAFT: Dong et al. 2023
(arXiv:2304.06767)
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from alignjax.algorithms import ALGORITHMS
from alignjax.algorithms.sampling_options import SamplingOptions
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
  """Everything that decides the rounds.

  Attributes:
    config: of a round's training; its run.init is the first policy, its data.train is replaced by the round's records.
    rewards: see `scorer.settings`; rewards of weight 0 are measured only.
    request: how completions are sampled; a round folds its number into the seed.
    prompts: a file of records; "": the config's data.train.
    prompts_per_round: each round takes the next so many, in shuffled order; 0: all of them.
    eval_prompts: held-out prompts, which every round's policy, and the first, answer once. "": none.
    reference: a round's reference: "last" is the policy that it begins with, "first" is the first policy.
  """

  config: Config
  rewards: SamplingOptions
  request: Request = Request()
  prompts: str = ""
  prompts_per_round: int = 0
  eval_prompts: str = ""
  reference: str = "last"


@alone("iterates")
def iterate(plan: Plan, workdir: epath.PathLike, rounds: int) -> dict[str, Any]:
  """Runs the rounds that are not yet complete, and writes summary.json.

  Args:
    plan: the same at every call.
    workdir: made if missing; round-01/records.jsonl, round-01/run, ...
    rounds: number of all rounds; a later call may have more.

  Returns:
    {"rounds": [...]}, a row each; with held-out prompts, round 0 is the first policy's. After a signal also "stopped".

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
    train_round = functools.partial(one_round, plan, workdir, number, pairs)
    row = once(folder_of(workdir, number) / "round.json", train_round)
    if not row:
      return {"stopped": True, "rounds": rows}
    rows.append(row)
    hosts.say(show({"rounds": rows}).splitlines()[-1])
  result = {"rounds": rows}
  write(workdir / "summary.json", [json.dumps(result, indent=2)])
  return result


def one_round(plan: Plan, workdir: epath.Path, number: int, pairs: bool) -> dict[str, Any]:
  """Generates, scores, chooses and trains; returns the round's row, or {} if a signal ended the training.

  Args:
    plan: of the rounds.
    workdir: of the rounds; the last round is complete in it.
    number: of the round, from 1.
    pairs: True if the algorithm trains on pairs, False if on the best completions.

  Raises:
    InputError: as `iterate`.
  """
  folder = folder_of(workdir, number)
  start = policy_of(plan, workdir, number - 1)
  policy = load(start, trust_code=[plan.config.model.module])
  scorer = make_scorer(plan.rewards, policy.tokenizer, policy.mesh)
  source = open_source(plan.prompts or plan.config.data.train)
  request = plan.request._replace(seed=seed_of(plan.request.seed, number))
  generated = best_of(
    policy,
    source,
    scorer,
    folder / "records.jsonl",
    request,
    pairs=pairs,
    numbers=prompts_of(plan.request.seed, plan.prompts_per_round, len(source), number),
  )
  overrides = {"data.train": str(folder / "records.jsonl"), "run.init": start}
  if plan.reference == "first":
    overrides["run.reference"] = plan.config.run.init
  run = fit(plan.config.replace(overrides), folder / "run", f"round {number}")
  if run.stopped:
    return {}
  kept = ("prompts", "records", "left_out", "cut_off", "failed_rewards", "scores", "scores_of_all", "finished")
  row = {
    "round": number,
    "generated": {key: generated[key] for key in kept},
    "trained": newest(folder / "run" / "metrics.jsonl"),
  }
  if plan.eval_prompts:
    row |= evaluate(plan, workdir, number)
  return row


def evaluate(plan: Plan, workdir: epath.Path, number: int) -> dict[str, Any]:
  """Compares a round's policy (0: the first policy) with the first one on the held-out prompts, at temperature 1.

  It writes the rewards to the round's heldout.json; that of round 0 must be there before another round's.

  Args:
    plan: with eval_prompts.
    workdir: of the rounds.
    number: of the round.

  Returns:
    {"kl": from the first policy, "length", "finished", "rewards": {NAME or "score": mean, interval, win rate against
    the first policy}}; every interval at 95 %.
  """
  given = [plan.config.model.module]
  first = load(plan.config.run.init, trust_code=given)
  policy = first
  if number > 0:
    policy = load(policy_of(plan, workdir, number), trust_code=given)
  scorer = make_scorer(plan.rewards, policy.tokenizer, policy.mesh)
  source = open_source(plan.eval_prompts)
  request = Request(
    1, seed_of(plan.request.seed, number, 1), plan.request.max_new_tokens, batch_size=plan.request.batch_size
  )
  drawn = draw(policy, source, range(len(source)), request)
  worth = scorer.score(drawn)
  values = {"score": worth.scores} | worth.each
  write_json(folder_of(workdir, number) / "heldout.json", {name: listed(v) for name, v in values.items()})
  first_folder = folder_of(workdir, 0)
  first_values = output.read_json(first_folder / "heldout.json", f"delete {first_folder}, and it is made again")
  prompt_ids = [item.prompt_ids for item in drawn]
  completion_ids = [item.completion.tokens for item in drawn]
  with jax.set_mesh(policy.mesh):
    logps = completion_logps(policy.model, policy.params, prompt_ids, completion_ids)
    first_logps = completion_logps(first.model, first.params, prompt_ids, completion_ids)
  prompts = [json.dumps(item.prompt) for item in drawn]
  kl = sequence_kl(logps, first_logps, prompts).kl
  rewards = {}
  for name, rewards_now in values.items():
    rewards[name] = compared(rewards_now, np.array(first_values[name], np.float64), prompts)
  return {
    "kl": {"mean": kl.value, "interval": kl.interval},
    "length": float(np.mean([len(ids) for ids in completion_ids])),
    "finished": float(np.mean([item.completion.finished for item in drawn])),
    "rewards": rewards,
  }


def compared(rewards: np.ndarray, other: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
  """Computes the mean of a reward, and its win rate against another policy's, on the prompts where both have it.

  Args:
    rewards: [n], NaN where the reward does not apply.
    other: of the other policy, likewise.
    prompts: n texts; intervals are over them.

  Returns:
    {"mean", "interval", "win_rate", "win_rate_interval", "prompts"}; {"prompts": 0} if no prompt has both.
  """
  both = ~np.isnan(rewards) & ~np.isnan(other)
  if not both.any():
    return {"prompts": 0}
  prompts_of_both = [prompts[int(i)] for i in np.flatnonzero(both)]
  mean = interval.mean(rewards[both], prompts_of_both)
  wins = win_rate(rewards[both], other[both], prompts_of_both)
  return {
    "mean": mean.value,
    "interval": mean.interval,
    "win_rate": wins.value,
    "win_rate_interval": wins.interval,
    "prompts": int(both.sum()),
  }


def show(result: Mapping[str, Any]) -> str:
  """Formats the rounds as a table for people.

  Args:
    result: of `iterate`.
  """
  rows = result["rounds"]
  names = list(dict.fromkeys(name for row in rows for name in row.get("rewards", {})))
  head = ["round", "records", "generated", "chosen", *names, "wins by score", "KL", "tokens"]
  return aligned([head, *(_cells(row, names) for row in rows)])


def _cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
  """Returns the cells of a round's row; `names` are those of the rewards."""
  generated = row.get("generated", {})
  rewards = row.get("rewards", {})
  scores = generated.get("scores") or {}
  best_scores = scores.get("chosen") or scores.get("completion")
  return [
    str(row["round"]),
    str(generated.get("records", "-")),
    _cell(generated.get("scores_of_all"), "mean"),
    _cell(best_scores, "mean"),
    *(_cell(rewards.get(name), "mean") for name in names),
    _cell(rewards.get("score"), "win_rate"),
    _cell(row.get("kl"), "mean"),
    _cell(row, "length", digits=1),
  ]


def _cell(numbers: Mapping[str, Any] | None, key: str, digits: int = 3) -> str:
  """Returns a number as a cell of the table; "-" if it is missing."""
  if not numbers or key not in numbers:
    return "-"
  return f"{numbers[key]:.{digits}f}"


def policy_of(plan: Plan, workdir: epath.Path, number: int) -> str:
  """Returns the run of a round's policy; that of round 0 is the first policy."""
  if number == 0:
    return plan.config.run.init
  return str(folder_of(workdir, number) / "run")


def _check(plan: Plan, rounds: int) -> bool:
  """Returns whether the algorithm trains on pairs; raises InputError if the plan cannot be run."""
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
