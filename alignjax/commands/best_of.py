"""Best of n: samples and scores completions, and keeps the best (or best and worst) as records to train on.

The best alone are supervised data (`algorithm.name=sft`: RAFT, or rejection sampling); best and worst are pairs
(`algorithm.name=preference`). All n stay in OUT.parts, so that another choice among them needs no sampling. An
interrupted command continues after the last part.

A completion that was cut at the budget never becomes part of a record: a record's completion ends with the stop token,
and training on a cut one would teach to stop in the middle of a sentence. Cut completions are dropped and counted.

The policy that answers with the best of n is at most log n - (n - 1) / n nats from the sampled policy.

Source: RAFT: Dong et al. 2023 (arXiv:2304.06767); the KL: Stiennon et al. 2020, appendix G.3 (arXiv:2009.01325),
Beirami et al. 2024 (arXiv:2401.01879) on why it is a bound
"""

import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from alignjax.commands import resumable
from alignjax.data.field import plain
from alignjax.data.format import read
from alignjax.data.source import Source, open_source
from alignjax.errors import InputError
from alignjax.evaluation import interval
from alignjax.runs.run import Run
from alignjax.runs.scorer import Drawn, Scorer
from alignjax.sampling.generate import check_length, sample_text
from alignjax.system import ranges
from alignjax.system.fingerprint import digest, table
from alignjax.system.ranges import Count, NonNegative, Seed, ShareAboveZero, Whole

PART = 64  # prompts that are sampled, scored and written together


class Request(NamedTuple):
  """The options of sampling; together with policy, prompts and rewards they decide the samples.

  Attributes:
    n: completions of a prompt.
    seed: other seeds give other completions.
    max_new_tokens: of a completion.
    temperature: of the sampler.
    top_k: number of the likeliest tokens to sample among; 0: all.
    top_p: probability of the likeliest tokens to sample among; 1: all.
    missing_eos_penalty: subtracted from the score of a completion that did not end by itself.
    batch_size: rows decoded together.
  """

  n: Count = 16
  seed: Seed = 0
  max_new_tokens: Count = 128
  temperature: NonNegative = 1.0
  top_k: Whole = 0
  top_p: ShareAboveZero = 1.0
  missing_eos_penalty: NonNegative = 0.0
  batch_size: Count = 256

  def check(self) -> None:
    """Raises InputError if a value is out of range, or all n completions of a prompt would be the same."""
    ranges.check_record("", self)
    if self.n > 1 and not self.temperature:
      raise InputError(f"temperature=0 with n={self.n}: a prompt's completions would be the same; use more than 0")


DEFAULT = Request()


def best_of(
  policy: Run,
  prompts: epath.PathLike | Source,
  scorer: Scorer,
  out: epath.PathLike,
  request: Request = DEFAULT,
  *,
  pairs: bool = False,
  numbers: Sequence[int] | None = None,
) -> dict[str, Any]:
  """Writes records of the best completions to `out`, and a summary to the same name with the ending .json.

  Args:
    policy: to sample from.
    prompts: a file of records with prompts, or the opened source, so that it is read once.
    scorer: ranks the completions that ended by themselves. Of equal ones the first is the best and the last the worst.
    out: a .jsonl file: {"prompt", "completion"} a line, or {"prompt", "chosen", "rejected"}.
    request: how the completions are sampled.
    pairs: keeps best and worst; otherwise the best alone.
    numbers: indices of the prompts' records, from 0; all of them if None.

  Returns:
    The summary.

  Raises:
    InputError: a malformed prompt, options out of range, parts of another request next to `out`, or no record is left.
  """
  request.check()
  if request.n < 1 + pairs:
    raise InputError(f"n={request.n}: use at least {1 + pairs}")
  out = resumable.check_out(out, ".json")
  with resumable.locked_parts(out, "samples") as folder:
    return _best_of(policy, prompts, scorer, out, folder, request, pairs, numbers)


def _best_of(policy, prompts, scorer, out, folder, request, pairs, numbers) -> dict[str, Any]:
  source = prompts
  if not isinstance(source, Source):
    source = open_source(prompts)
  if numbers is None:
    numbers = range(len(source))
  numbers_digest = digest([int(number) for number in numbers])
  resumable.claim(folder, identity(policy, source, request, numbers=numbers_digest, rewards=scorer.identity))

  def make_rows(part):
    return rows_of(part, draw(policy, source, part, request), scorer, request)

  sampled = list(resumable.rows(folder, numbers, PART, make_rows))
  records, reasons = choose(sampled, pairs)
  check_left(records, reasons, request, out)
  resumable.write(out, (resumable.line_of(record) for record in records))
  scores = {}
  for place, side in enumerate(_sides(pairs)):
    scores[side] = _estimate((record["scores"][place], record["prompt"]) for record in records)
  all_scores = ((score, row["prompt"]) for row in sampled for score in row["scores"])
  summary = {
    "prompts": len(sampled),
    "records": len(records),
    "left_out": reasons,
    "cut_off": cut_off(sampled),
    "failed_rewards": sum(row["failed"] for row in sampled),
    "kl_bound": math.log(request.n) - (request.n - 1) / request.n,
    "scores": scores,
    "scores_of_all": _estimate((score, prompt) for score, prompt in all_scores if score is not None),
    "finished": float(np.mean([end for row in sampled for end in row["finished"]])),
    "request": request._asdict(),
    "rewards": scorer.identity,
    "policy_step": policy.step,
  }
  resumable.write(out.with_suffix(".json"), [json.dumps(summary, indent=2)])
  return summary


def draw(policy: Run, source: Source, numbers: Sequence[int], request: Request) -> list[Drawn]:
  """Samples request.n completions for each of some prompts: n in a row for each, in the order of the prompts.

  Each is a function of the seed, the prompt's number and its place among the n.

  Args:
    policy: to sample from.
    source: the prompts.
    numbers: indices of the prompts to ask.
    request: how the completions are sampled.

  Raises:
    InputError: a malformed record, one whose prompt is too long, or options out of range.
  """
  examples = [read(source, number, "prompt") for number in numbers]
  rendered = []
  for number, example in zip(numbers, examples, strict=True):
    try:
      rendered.append(policy.tokenizer.render(example.prompt, add_generation_prompt=True, tools=example.tools))
    except InputError as error:
      raise InputError(f"{source.where(number)}: {error}") from error
  rows = min(request.batch_size, request.n * len(rendered))
  for number, prompt in zip(numbers, rendered, strict=True):
    check_length(policy.model, len(prompt), rows, request.max_new_tokens, source.where(number))

  def repeated(values):
    return [value for value in values for _ in range(request.n)]

  with jax.set_mesh(policy.mesh):
    completions = sample_text(
      policy.model,
      policy.params,
      policy.tokenizer,
      repeated(rendered),
      key=jax.random.key(request.seed),
      prompt_ids=repeated(numbers),
      sample_ids=list(range(request.n)) * len(numbers),
      max_new_tokens=request.max_new_tokens,
      temperature=request.temperature,
      top_k=request.top_k or None,
      top_p=None if request.top_p == 1 else request.top_p,
      batch_size=request.batch_size,
    )
  records = repeated([source[number] for number in numbers])
  prompts = repeated([example.prompt for example in examples])
  return [Drawn(*parts) for parts in zip(records, prompts, repeated(rendered), completions, strict=True)]


def rows_of(
  numbers: Sequence[int], drawn: Sequence[Drawn], scorer: Scorer, request: Request
) -> Iterator[dict[str, Any]]:
  """Yields a JSON record for each prompt: its completions with their scores and rewards.

  Args:
    numbers: indices of the prompts.
    drawn: request.n completions for each prompt, from `draw`.
    scorer: scores them.
    request: how they were sampled.
  """
  n = request.n
  worth = scorer.score(drawn)
  finished = np.array([item.completion.finished for item in drawn])
  scores = worth.scores - request.missing_eos_penalty * ~finished
  for place, number in enumerate(numbers):
    of_prompt = slice(place * n, (place + 1) * n)
    first = drawn[of_prompt][0]
    row: dict[str, Any] = {"number": int(number), "prompt": plain(first.prompt)}
    if tools := first.record.get("tools"):
      row["tools"] = tools
    yield row | {
      "completions": [item.completion.text for item in drawn[of_prompt]],
      "scores": listed(scores[of_prompt]),
      "rewards": {name: listed(values[of_prompt]) for name, values in worth.each.items()},
      "finished": finished[of_prompt].tolist(),
      "failed": int(worth.failed[of_prompt].sum()),
    }


def choose(sampled: Sequence[dict[str, Any]], pairs: bool) -> tuple[list[dict[str, Any]], dict[str, int]]:
  """Chooses the best completions that ended by themselves, as records, and counts the prompts without one.

  Args:
    sampled: the rows of `rows_of`.
    pairs: True takes best and worst; False the best alone.

  Returns:
    The records; and the number of prompts without one, by reason. The reason is "cut off" if the prompt would have a
    record if no completion had been cut at the budget.
  """
  records: list[dict[str, Any]] = []
  reasons = {"no score": 0, "cut off": 0}
  if pairs:
    reasons = {"no score": 0, "one score": 0, "cut off": 0, "all equal": 0}
  for row in sampled:
    scored = [k for k, score in enumerate(row["scores"]) if score is not None]
    finished = [k for k in scored if row["finished"][k]]
    if len(finished) < 1 + pairs:
      reasons[_why_left_out(len(scored), pairs)] += 1
      continue
    rank = functools.partial(_rank, row["scores"])
    places = [max(finished, key=rank)]
    if pairs:
      places.append(min(finished, key=rank))
    texts = [row["completions"][k] for k in places]
    scores = [row["scores"][k] for k in places]
    if pairs and (texts[0] == texts[1] or scores[0] == scores[1]):
      reasons["all equal"] += 1
      continue
    prompt_fields = {name: row[name] for name in ("prompt", "tools") if name in row}
    sides = dict(zip(_sides(pairs), texts, strict=True))
    records.append(prompt_fields | sides | {"scores": scores, "number": row["number"]})
  return records, reasons


def _rank(scores: Sequence[float], place: int) -> tuple[float, int]:
  """Returns the key by which completions are ordered: by score; of equal ones the earlier is better."""
  return scores[place], -place


def _why_left_out(scored: int, pairs: bool) -> str:
  """Names the reason why too few of a prompt's completions have a score and ended by themselves.

  `scored` of them have a score.
  """
  if scored >= 1 + pairs:
    return "cut off"
  if scored:
    return "one score"
  return "no score"


def cut_off(sampled: Sequence[dict[str, Any]]) -> int:
  """Counts the completions that were cut at the budget, in the rows of `rows_of`."""
  return sum(not end for row in sampled for end in row["finished"])


def check_left(records: Sequence[Any], reasons: dict[str, int], request: Request, out: epath.Path) -> None:
  """Raises InputError if no prompt has a record, because there would be nothing to train on.

  Args:
    records: those that are left.
    reasons: the counts of the others, for the message, as `choose` returns them.
    request: for the remedy.
    out: the file that they would be written to.
  """
  if records:
    return
  counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
  remedy = "check the rewards"
  if reasons.get("cut off"):
    remedy = f"raise --max-new-tokens={request.max_new_tokens}"
  raise InputError(f"{out}: no prompt has a record ({counts or 'there are no prompts'}); {remedy}")


def _sides(pairs: bool) -> tuple[str, ...]:
  """Returns the names of a record's completions, the best first."""
  if pairs:
    return "chosen", "rejected"
  return ("completion",)


def identity(policy: Run, source: Source, request: Request, **also: Any) -> dict[str, Any]:
  """Makes the JSON that decides the samples, for `resumable.claim`; `also` holds further entries."""
  return {
    "policy": digest(table({"params": policy.params})),
    "tokenizer": policy.tokenizer.fingerprint,
    "prompts": source.fingerprint,
    **also,
    "request": request._asdict(),
  }


def listed(values: np.ndarray) -> list[float | None]:
  """Converts numbers to JSON: None for NaN."""
  return [None if np.isnan(value) else float(value) for value in values]


def _estimate(scores: Iterable[tuple[float, Any]]) -> dict[str, Any] | None:
  """Returns the mean of scores, and its interval over their prompts, as JSON.

  Args:
    scores: of (score, prompt).

  Returns:
    None if there are no scores; "interval" is None for one prompt.
  """
  scores = list(scores)
  if not scores:
    return None
  prompts = [json.dumps(prompt) for _, prompt in scores]
  mean = interval.mean([score for score, _ in scores], prompts)
  return {"mean": mean.value, "interval": mean.interval, "count": mean.count, "prompts": len(set(prompts))}
