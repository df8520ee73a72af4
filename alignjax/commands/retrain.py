"""Rounds of online training whose reward model is retrained on current samples between them: `alignjax retrain`.

A trained policy writes texts on which its reward model has seen no data. Therefore, before every round but the first,
the last round's policy answers prompts twice, somebody labels the better answer, and the reward model continues from
its last weights on these pairs and on earlier ones. A round is an ordinary online run that starts from the last round's
policy; the first policy is the reference of all rounds. Each part is a function of the plan, and continues where it was
interrupted.

Source: Ziegler et al. 2019, section 2.3 (arXiv:1909.08593), online data collection; Bai et al. 2022, section 4.5
(arXiv:2204.05862), iterated online RLHF
"""

import functools
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

# Files of a round.
PAIRS = "pairs.jsonl"
UNLABELLED = "unlabelled.jsonl"


class Plan(NamedTuple):
  """Everything that decides the rounds.

  Attributes:
    config: of a round's policy: run.init is the first policy, and algorithm.reward_model the first reward model.
    labeller: rewards that decide which of a prompt's completions is best and which worst (see `scorer.settings`), such
      as a held-out reward model; None: people decide, between two calls.
    request: how the completions are sampled; a round folds its number into the seed.
    prompts: a file of records; "": the config's data.train.
    pairs_per_round: number of prompts that get a pair before a round; 0: all of them.
    earlier: number of earlier pairs for each new one in a round's reward data.
    reward_steps: steps of a retraining; all else is as in the first reward model's own config.
  """

  config: Config
  labeller: SamplingOptions | None
  request: Request = Request(n=2)
  prompts: str = ""
  pairs_per_round: int = 1024
  earlier: float = 1.0
  reward_steps: int = 100


class Unlabelled(NamedTuple):
  """A file of pairs that people are to label, and the file for their labels.

  Attributes:
    ask: what `ask` wrote.
    answer: where the labelled pairs go.
  """

  ask: epath.Path
  answer: epath.Path


@alone("retrains")
def retrain(plan: Plan, workdir: epath.PathLike, rounds: int) -> dict[str, Any]:
  """Runs the rounds that are not yet complete, and writes summary.json.

  Args:
    plan: the same at every call.
    workdir: made if missing; round-01/policy, round-02/{pairs.jsonl, train.jsonl, reward, policy}, ...
    rounds: number of all rounds; a later call may have more.

  Returns:
    {"rounds": [...]}, a row each; with "stopped" after a signal, or with "unlabelled" (`Unlabelled`) if people are to
    label pairs.

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
    labelled: dict[str, Any] = {}
    if number > 1:
      labelled = once(folder / "labelled.json", functools.partial(label, plan, workdir, number))
      if not labelled:
        return {"rounds": rows, "unlabelled": Unlabelled(folder / UNLABELLED, folder / PAIRS)}
    row = once(folder / "round.json", functools.partial(one_round, plan, workdir, number, labelled))
    if not row:
      return {"rounds": rows, "stopped": True}
    rows.append(row)
    hosts.say(show({"rounds": rows}).splitlines()[-1])
  result = {"rounds": rows}
  resumable.write(workdir / "summary.json", [json.dumps(result, indent=2)])
  return result


def label(plan: Plan, workdir: epath.Path, number: int) -> dict[str, Any]:
  """Writes a round's pairs of the last round's samples, and measures the last reward model on them.

  Args:
    plan: of the rounds.
    workdir: of the rounds; the last round is complete in it.
    number: of the round, from 2.

  Returns:
    {} if people have not labelled the pairs yet. Otherwise {"left_out", "cut_off"}: counts of the prompts and
    completions that gave no pair; {"pairs", "accuracy", "accuracy_interval"}: of the reward model that the samples
    were optimised against.
  """
  folder = folder_of(workdir, number)
  pairs = folder / PAIRS
  if plan.labeller:
    summary = pairs.with_suffix(".json")
    last_file = summary
  else:
    summary = (folder / UNLABELLED).with_suffix(".json")
    last_file = pairs
  if not hosts.there(last_file):
    policy = load(folder_of(workdir, number - 1) / "policy", trust_code=[plan.config.model.module])
    source = open_source(plan.prompts or plan.config.data.train)
    request = plan.request._replace(seed=seed_of(plan.request.seed, number))
    numbers = prompts_of(plan.request.seed, plan.pairs_per_round, len(source), number - 1)
    if not plan.labeller:
      ask(policy, source, numbers, folder / UNLABELLED, request)
      return {}
    scorer = make_scorer(plan.labeller, policy.tokenizer, policy.mesh)
    best_of(policy, source, scorer, pairs, request, pairs=True, numbers=numbers)
  measured = evaluate(reward_of(plan, workdir, number - 1), str(pairs), trust_code=[plan.config.model.module])
  sampled: dict[str, Any] = {}
  if hosts.there(summary):
    sampled = json.loads(reading.read_text(summary))
  return {
    **{name: sampled[name] for name in ("left_out", "cut_off") if name in sampled},
    "pairs": measured["pairs"],
    "accuracy": measured["heldout_accuracy"],
    "accuracy_interval": measured["heldout_interval"],
  }


def ask(policy: Run, source: Source, numbers: list[int], out: epath.Path, request: Request) -> None:
  """Writes the completions that people are to compare: a line of {"prompt", "responses", "number"} for each prompt.

  A file of the same name with the ending .json holds the counts of those left out. Completions that were cut at the
  budget are left out: a pair of records ends with the stop token.

  Args:
    policy: to sample from.
    source: the prompts.
    numbers: indices of the prompts to ask.
    out: the file to write, unless it exists.
    request: how the completions are sampled.

  Raises:
    InputError: no prompt has two different completions that ended by themselves.
  """
  if hosts.there(out):
    return
  folder = out.with_suffix(".parts")
  resumable.claim(folder, identity(policy, source, request, numbers=digest(numbers), rewards="people", finished="kept"))

  def make_rows(part):
    drawn = draw(policy, source, part, request)
    for place, number in enumerate(part):
      of_prompt = drawn[place * request.n : (place + 1) * request.n]
      yield {
        "prompt": of_prompt[0].record.get("prompt", of_prompt[0].prompt),
        "responses": [item.completion.text for item in of_prompt],
        "finished": [item.completion.finished for item in of_prompt],
        "number": int(number),
      }

  sampled = list(resumable.rows(folder, numbers, PART, make_rows))
  rows, reasons = comparable(sampled)
  check_left(rows, reasons, request, out)
  summary = {"prompts": len(sampled), "records": len(rows), "left_out": reasons, "cut_off": cut_off(sampled)}
  resumable.write(out.with_suffix(".json"), [json.dumps(summary, indent=2)])
  resumable.write(out, (resumable.line_of(row) for row in rows))


def comparable(sampled: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
  """Picks the responses that ended by themselves, of each prompt with two different ones; and counts the others.

  Args:
    sampled: a row for each prompt: "prompt", "responses", "finished", "number".

  Returns:
    Rows with "prompt", "responses", "number"; and the number of prompts without a row, by reason.
  """
  rows = []
  reasons = {"cut off": 0, "all equal": 0}
  for row in sampled:
    responses = row["responses"]
    finished = [text for text, end in zip(responses, row["finished"], strict=True) if end]
    if len(set(finished)) > 1:
      rows.append({"prompt": row["prompt"], "responses": finished, "number": row["number"]})
    elif len(set(responses)) > 1 and len(finished) < len(responses):
      reasons["cut off"] += 1
    else:
      reasons["all equal"] += 1
  return rows, reasons


def one_round(plan: Plan, workdir: epath.Path, number: int, labelled: Mapping[str, Any]) -> dict[str, Any]:
  """Retrains the reward model (not in the first round) and the policy; returns the round's row, or {} after a signal.

  Args:
    plan: of the rounds.
    workdir: of the rounds.
    number: of the round, from 1.
    labelled: the result of `label`.
  """
  folder = folder_of(workdir, number)
  overrides: dict[str, Any] = {}
  row: dict[str, Any] = {"round": number}
  if number > 1:
    if fit(reward_config(plan, workdir, number), folder / "reward", f"reward {number}").stopped:
      return {}
    row |= {"labelled": dict(labelled), "reward": newest(folder / "reward" / "metrics.jsonl")}
    last = folder_of(workdir, number - 1) / "policy"
    overrides = {"run.init": str(last), "run.seed": seed_of(plan.config.run.seed, number)}
    overrides["algorithm.reward_model"] = reward_of(plan, workdir, number)
    if "reference" in load_metadata(last / "checkpoints"):
      overrides["run.reference"] = plan.config.run.reference or plan.config.run.init
    if sampling_of(plan.config).domain:
      overrides["algorithm.domain"] = str(domain_of(folder / "reward", plan.config.model.module))
  if fit(plan.config.replace(overrides), folder / "policy", f"policy {number}").stopped:
    return {}
  return row | {"policy": newest(folder / "policy" / "metrics.jsonl")}


def reward_config(plan: Plan, workdir: epath.Path, number: int) -> Config:
  """Makes the config of a round's reward model: the first one's, from the last one's weights, on new and earlier pairs.

  Writes these pairs to the round's train.jsonl, unless it exists.

  Args:
    plan: of the rounds.
    workdir: of the rounds, with the round's labelled pairs.
    number: of the round, from 2.
  """
  source = epath.Path(sampling_of(plan.config).reward_model).expanduser()
  first = read_config(source)
  check_code(source / "config.json", [first.model.module], given=[plan.config.model.module])
  folder = folder_of(workdir, number)
  if not hosts.there(folder / "train.jsonl"):
    new = open_source(str(folder / PAIRS))
    earlier_files = [first.data.train, *(str(folder_of(workdir, k) / PAIRS) for k in range(2, number))]
    earlier = open_source(earlier_files)
    count = min(round(plan.earlier * len(new)), len(earlier))
    rng = np.random.default_rng(seed_of(plan.request.seed, number, 1))
    drawn = rng.choice(len(earlier), count, replace=False)
    records = [*(earlier[int(i)] for i in np.sort(drawn)), *new]
    resumable.write(folder / "train.jsonl", (resumable.line_of(record) for record in records))
  overrides = {
    "data.train": str(folder / "train.jsonl"),
    "data.format": "auto",
    "run.init": reward_of(plan, workdir, number - 1),
    "run.steps": plan.reward_steps,
    "run.seed": seed_of(first.run.seed, number),
  }
  return first.replace(overrides)


def domain_of(reward: epath.Path, module: str = "") -> epath.Path:
  """Returns the domain of a reward model's run, and writes it unless it is there as a whole.

  Args:
    reward: the run.
    module: the model.module that the run's record may name.
  """
  domain = reward / "domain"
  if not hosts.there(domain / "config.json"):  # the last file to be written if a folder is filled in place
    if jax.process_index() == 0:
      output.remove(domain)
    hosts.meet()
    reward_domain.write(reward, trust_code=[module])
  return domain


def reward_of(plan: Plan, workdir: epath.Path, number: int) -> str:
  """Returns the run of a round's reward model; that of round 1 is the first one."""
  if number <= 1:
    return sampling_of(plan.config).reward_model
  return str(folder_of(workdir, number) / "reward")


def show(result: Mapping[str, Any]) -> str:
  """Formats the rounds as a table for people.

  Args:
    result: of `retrain`.
  """
  lines = [["round", "new pairs", "right before", "right after", "scores", "KL"]]
  for row in result["rounds"]:
    policy = row["policy"]
    labelled = row.get("labelled", {})
    lines.append(
      [
        str(row["round"]),
        str(labelled.get("pairs", "-")),
        _cell(labelled.get("accuracy")),
        _cell(row.get("reward", {}).get("eval/rewards/accuracies")),
        _cell(policy.get("eval/objective/scores", policy.get("objective/scores"))),
        _cell(policy.get("eval/objective/kl", policy.get("objective/kl"))),
      ]
    )
  return aligned(lines)


def _cell(value: float | None) -> str:
  """Returns a number as a cell of the table; "-" for none."""
  if value is None:
    return "-"
  return f"{value:.3f}"


def _check(plan: Plan, rounds: int) -> None:
  """Raises InputError if the plan cannot be run."""
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
