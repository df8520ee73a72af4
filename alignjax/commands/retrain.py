"""Rounds of online training whose reward model is retrained on current samples between them: `alignjax retrain`.

Where a policy has gone, its reward model has seen no data. So before every round but the first the last one's policy
answers prompts twice, somebody says which answer is better, and the reward model goes on from its last weights: on
these pairs and on earlier ones. A round is an ordinary online run from the last one's policy, with the first policy as
the reference of all. Each part continues by itself where it was interrupted, and is a function of the plan.

Source: Ziegler et al. 2019, section 2.3 (arXiv:1909.08593), online data collection; Bai et al. 2022, section 4.5
(arXiv:2204.05862), iterated online RLHF
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from alignjax.algorithms.rollout import IN_GRAPH
from alignjax.algorithms.sampling_options import SamplingOptions
from alignjax.commands import resumable, reward_domain
from alignjax.commands.best_of import PART, Request, best_of, check_left, cut_off, draw, identity
from alignjax.commands.rounds import aligned, claim, folder_of, newest, once, prompts_of, seed_of
from alignjax.data.source import Source, open_source
from alignjax.errors import InputError
from alignjax.evaluation.held_out import evaluate
from alignjax.runs.build import sampling_of
from alignjax.runs.checkpoint import load_metadata
from alignjax.runs.config import Config
from alignjax.runs.initial_params import check_sources
from alignjax.runs.run import Run, load
from alignjax.runs.scorer import make_scorer
from alignjax.runs.trust import check_code
from alignjax.runs.workdir import alone, read_config
from alignjax.system import hosts, output, ranges, reading
from alignjax.system.fingerprint import digest
from alignjax.system.ranges import Count, NonNegative, Several, Whole
from alignjax.train import fit

PAIRS, UNLABELLED = "pairs.jsonl", "unlabelled.jsonl"  # of a round


class Plan(NamedTuple):
  """What the rounds do.

  Attributes:
    config: of a round's policy: run.init is the first policy, and algorithm.reward_model the first reward model.
    labeller: rewards that say which of a prompt's completions is best and which worst (see `scorer.settings`), such as
      a held-out reward model; {}: people do, between two calls.
    request: how the completions are sampled; a round folds its number into the seed.
    prompts: a file of records; "": the config's data.train.
    pairs_per_round: so many prompts get a pair before a round; 0: all of them.
    earlier: earlier pairs for each new one in a round's reward data.
    reward_steps: steps of a retraining, otherwise by the first reward model's own config.
  """

  config: Config
  labeller: SamplingOptions | None
  request: Request = Request(n=2)
  prompts: str = ""
  pairs_per_round: int = 1024
  earlier: float = 1.0
  reward_steps: int = 100


class Unlabelled(NamedTuple):
  """A file of pairs that wait for people, and where their answers go."""

  ask: epath.Path
  answer: epath.Path


@alone("retrains")
def retrain(plan: Plan, workdir: epath.PathLike, rounds: int) -> dict[str, Any]:
  """Takes the rounds that are not yet complete, and writes summary.json.

  Args:
    plan: the same at every call; the rounds may become more.
    workdir: made if missing; round-01/policy, round-02/{pairs.jsonl, train.jsonl, reward, policy}, ...
    rounds: how many, in all.

  Returns:
    {"rounds": [...]}, a row each; with "stopped" after a signal, or "unlabelled" (`Unlabelled`) where people are asked.

  Raises:
    InputError: as `train.fit`, `best_of` and `reward_domain.write`; a config without a reward model of pairs; another
      plan's rounds in `workdir`.
  """
  workdir = epath.Path(workdir).expanduser()
  _check(plan, rounds)
  if not hosts.there(workdir / "plan.json"):
    check_sources(workdir, plan.config)
  plan = claim(workdir, plan)
  rows: list[dict[str, Any]] = []
  for number in range(1, rounds + 1):
    folder = folder_of(workdir, number)
    found = {} if number == 1 else once(folder / "labelled.json", lambda: label(plan, workdir, number))  # noqa: B023
    if number > 1 and not found:
      return {"rounds": rows, "unlabelled": Unlabelled(folder / UNLABELLED, folder / PAIRS)}
    row = once(folder / "round.json", lambda: one_round(plan, workdir, number, found))  # noqa: B023
    if not row:
      return {"rounds": rows, "stopped": True}
    rows.append(row)
    hosts.say(show({"rounds": rows}).splitlines()[-1])
  result = {"rounds": rows}
  resumable.write(workdir / "summary.json", [json.dumps(result, indent=2)])
  return result


def label(plan: Plan, workdir: epath.Path, number: int) -> dict[str, Any]:
  """Writes a round's pairs of the last one's samples, and what the last reward model makes of them; {}: not there yet.

  Returns:
    {"left_out", "cut_off"}: of the prompts and completions that gave no pair; {"pairs", "accuracy",
    "accuracy_interval"}: of the reward model that the samples were optimised against.
  """
  folder = folder_of(workdir, number)
  pairs, prompts = folder / PAIRS, plan.prompts or plan.config.data.train
  done = pairs.with_suffix(".json") if plan.labeller else pairs  # what is written last
  if not hosts.there(done):
    policy = load(folder_of(workdir, number - 1) / "policy", trust_code=[plan.config.model.module])
    source = open_source(prompts)
    request = plan.request._replace(seed=seed_of(plan.request.seed, number))
    numbers = prompts_of(plan.request.seed, plan.pairs_per_round, len(source), number - 1)
    if not plan.labeller:
      ask(policy, source, numbers, folder / UNLABELLED, request)
      return {}
    scorer = make_scorer(plan.labeller, policy.tokenizer, policy.mesh)
    best_of(policy, source, scorer, pairs, request, pairs=True, numbers=numbers)
  measured = evaluate(reward_of(plan, workdir, number - 1), str(pairs), trust_code=[plan.config.model.module])
  summary = pairs.with_suffix(".json") if plan.labeller else (folder / UNLABELLED).with_suffix(".json")
  sampled = json.loads(reading.read_text(summary)) if hosts.there(summary) else {}
  return {
    **{name: sampled[name] for name in ("left_out", "cut_off") if name in sampled},
    "pairs": measured["pairs"],
    "accuracy": measured["heldout_accuracy"],
    "accuracy_interval": measured["heldout_interval"],
  }


def ask(policy: Run, source: Source, numbers: list[int], out: epath.Path, request: Request) -> None:
  """Writes the completions that people are to compare: {"prompt", "responses", "number"} a line; and beside it, with
  the ending .json, how many were left out.

  Those that were cut at the budget are not among them: a pair of records ends with the stop token.

  Raises:
    InputError: no prompt has two different completions that ended by themselves.
  """
  if hosts.there(out):
    return
  folder = out.with_suffix(".parts")
  resumable.claim(folder, identity(policy, source, request, numbers=digest(numbers), rewards="people", finished="kept"))

  def make(asked):
    drawn = draw(policy, source, asked, request)
    for place, number in enumerate(asked):
      own = drawn[place * request.n : (place + 1) * request.n]
      yield {
        "prompt": own[0].record.get("prompt", own[0].prompt),
        "responses": [one.completion.text for one in own],
        "finished": [one.completion.finished for one in own],
        "number": int(number),
      }

  found = list(resumable.rows(folder, numbers, PART, make))
  rows, reasons = comparable(found)
  check_left(rows, reasons, request, out)
  summary = {"prompts": len(found), "records": len(rows), "left_out": reasons, "cut_off": cut_off(found)}
  resumable.write(out.with_suffix(".json"), [json.dumps(summary, indent=2)])
  resumable.write(out, (resumable.line_of(row) for row in rows))


def comparable(found: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
  """Each prompt's responses that ended by themselves, where two differ; and how many prompts have none, by reason."""
  rows, reasons = [], {"cut off": 0, "all equal": 0}
  for row in found:
    whole = [text for text, end in zip(row["responses"], row["finished"], strict=True) if end]
    if len(set(whole)) > 1:
      rows.append({"prompt": row["prompt"], "responses": whole, "number": row["number"]})
    else:
      reasons["cut off" if len(set(row["responses"])) > 1 and len(whole) < len(row["responses"]) else "all equal"] += 1
  return rows, reasons


def one_round(plan: Plan, workdir: epath.Path, number: int, labelled: Mapping[str, Any]) -> dict[str, Any]:
  """Retrains the reward model, but in the first round, and the policy; the round's row, or {} where a signal came."""
  folder, overrides = folder_of(workdir, number), {}
  row: dict[str, Any] = {"round": number}
  if number > 1:
    if fit(reward_config(plan, workdir, number), folder / "reward", f"reward {number}").stopped:
      return {}
    row |= {"labelled": dict(labelled), "reward": newest(folder / "reward" / "metrics.jsonl")}
    last = folder_of(workdir, number - 1) / "policy"
    overrides = {"run__init": str(last), "run__seed": seed_of(plan.config.run.seed, number)}
    overrides["algorithm__reward_model"] = reward_of(plan, workdir, number)
    if "reference" in load_metadata(last / "checkpoints"):
      overrides["run__reference"] = plan.config.run.reference or plan.config.run.init
    if sampling_of(plan.config).domain:
      overrides["algorithm__domain"] = str(domain_of(folder / "reward", plan.config.model.module))
  if fit(plan.config.replace(**overrides), folder / "policy", f"policy {number}").stopped:
    return {}
  return row | {"policy": newest(folder / "policy" / "metrics.jsonl")}


def reward_config(plan: Plan, workdir: epath.Path, number: int) -> Config:
  """The first reward model's config, from the last one's weights, on a round's pairs and earlier ones."""
  source = epath.Path(sampling_of(plan.config).reward_model).expanduser()
  first = read_config(source)
  check_code(source / "config.json", [first.model.module], given=[plan.config.model.module])
  folder = folder_of(workdir, number)
  if not hosts.there(folder / "train.jsonl"):
    new = open_source(str(folder / PAIRS))
    old = open_source([first.data.train, *(str(folder_of(workdir, k) / PAIRS) for k in range(2, number))])
    count = min(round(plan.earlier * len(new)), len(old))
    drawn = np.random.default_rng(seed_of(plan.request.seed, number, 1)).choice(len(old), count, replace=False)
    records = [*(old[int(i)] for i in np.sort(drawn)), *new]
    resumable.write(folder / "train.jsonl", (resumable.line_of(record) for record in records))
  return first.replace(
    data__train=str(folder / "train.jsonl"),
    data__format="auto",
    run__init=reward_of(plan, workdir, number - 1),
    run__steps=plan.reward_steps,
    run__seed=seed_of(first.run.seed, number),
  )


def domain_of(reward: epath.Path, module: str = "") -> epath.Path:
  """The domain of a reward model's run, whose record may name `module`; written if it is not there as a whole."""
  found = reward / "domain"
  if not hosts.there(found / "config.json"):  # the last to be written, where a folder is filled in place
    if jax.process_index() == 0:
      output.remove(found)
    hosts.meet()
    reward_domain.write(reward, trust_code=[module])
  return found


def reward_of(plan: Plan, workdir: epath.Path, number: int) -> str:
  """The run of a round's reward model."""
  return str(folder_of(workdir, number) / "reward") if number > 1 else sampling_of(plan.config).reward_model


def show(result: Mapping[str, Any]) -> str:
  """The rounds as a table for people."""
  number = lambda value: "-" if value is None else f"{value:.3f}"
  head = ["round", "new pairs", "right before", "right after", "scores", "KL"]
  lines = [head]
  for row in result["rounds"]:
    policy, labelled = row["policy"], row.get("labelled", {})
    lines.append(
      [
        str(row["round"]),
        str(labelled.get("pairs", "-")),
        number(labelled.get("accuracy")),
        number(row.get("reward", {}).get("eval/rewards/accuracies")),
        number(policy.get("eval/objective/scores", policy.get("objective/scores"))),
        number(policy.get("eval/objective/kl", policy.get("objective/kl"))),
      ]
    )
  return aligned(lines)


def _check(plan: Plan, rounds: int) -> None:
  """Raises InputError where the plan means nothing."""
  config = plan.config
  source = getattr(config.options, IN_GRAPH, "")
  if not source or sampling_of(config).step_reward:
    raise InputError(
      f"algorithm.name={config.algorithm.name}, algorithm.reward_model={source!r}: rounds are of an online algorithm "
      "with a reward model of pairs; name both"
    )
  first = read_config(epath.Path(source).expanduser())
  if first.algorithm.name != "reward" or first.algorithm.loss == "plackett_luce":
    raise InputError(f"algorithm.reward_model={source}: was not trained on pairs; name one that was")
  if not config.run.init:
    raise InputError("run.init is empty; name the run of the policy that the first round begins with")
  if config.lora.rank:
    raise InputError(f"lora.rank={config.lora.rank}: a round begins with all weights of the last; use 0")
  for name, value, kind in (
    ("rounds", rounds, Count),
    ("reward-steps", plan.reward_steps, Count),
    ("n", plan.request.n, Several),
    ("pairs-per-round", plan.pairs_per_round, Whole),
    ("earlier", plan.earlier, NonNegative),
  ):
    ranges.check(f"--{name}", value, kind)
  plan.request.check()
