"""The best of n: completions of a run's policy, scored, and the best (or best and worst) kept as records to train on.

The best alone are supervised data (`algorithm.name=sft`: RAFT, or rejection sampling), best and worst are pairs
(`algorithm.name=preference`). All n stay in OUT.parts, so that another choice among them costs no sampling; a command
that was interrupted goes on behind the last part.

A completion that was cut at the budget never becomes part of a record: a record's completion ends with the stop token,
and training would teach to stop in the middle of a sentence. Those are dropped and counted.

The policy that answers with the best of n is at most log n - (n - 1) / n nats from the one that it asks.

Source: RAFT: Dong et al. 2023 (arXiv:2304.06767); the KL: Stiennon et al. 2020, appendix G.3 (arXiv:2009.01325),
Beirami et al. 2024 (arXiv:2401.01879) on why it is a bound
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from alignjax.commands import resumable
from alignjax.data.field import Dialogue
from alignjax.data.format import read
from alignjax.data.source import Source, open_source
from alignjax.errors import InputError
from alignjax.evaluation import interval
from alignjax.runs.run import Run
from alignjax.runs.scorer import Drawn, Scorer
from alignjax.sampling.generate import check_length, sample_text
from alignjax.system import hosts, output, ranges
from alignjax.system.fingerprint import digest, table
from alignjax.system.ranges import Count, NonNegative, Seed, ShareAboveZero, Whole

PART = 64  # prompts that are sampled, scored and written together


class Request(NamedTuple):
  """What decides the samples, beside the policy, the prompts and the rewards.

  Attributes:
    n: completions of a prompt.
    seed: other seeds, other completions.
    max_new_tokens: of a completion.
    temperature: of the sampler.
    top_k: tokens to sample among; 0: all.
    top_p: share of the likeliest tokens to sample among; 1: all.
    missing_eos_penalty: taken off the score of a completion that did not end by itself.
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
    """Raises InputError where a value is out of range, or n completions of a prompt would be one and the same."""
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
  """Writes records of the best completions to `out`, and what they are to `out` with the ending .json.

  Args:
    policy: whose completions.
    prompts: a file of records with prompts, or what `open_source` made of it, so that it is read once.
    scorer: says which is the best of those that ended by themselves; of equals the first, and the last is the worst.
    out: a .jsonl file: {"prompt", "completion"} a line, or {"prompt", "chosen", "rejected"}.
    request: what is sampled.
    pairs: best and worst; else the best.
    numbers: of the prompts' records, from 0; all of them if None.

  Returns:
    What the JSON file holds.

  Raises:
    InputError: a malformed prompt, options that mean nothing, parts of another request at this place, or no record is
      left.
  """
  request.check()
  if request.n < 1 + pairs:
    raise InputError(f"n={request.n}: use at least {1 + pairs}")
  out = resumable.check_out(out, ".json")
  folder = out.with_suffix(".parts")
  with hosts.held("parts", lambda: output.lock(folder, "samples", "--out")):
    return _best_of(policy, prompts, scorer, out, folder, request, pairs, numbers)


def _best_of(policy, prompts, scorer, out, folder, request, pairs, numbers) -> dict[str, Any]:
  source = prompts if isinstance(prompts, Source) else open_source(prompts)
  numbers = range(len(source)) if numbers is None else numbers
  which = digest([int(number) for number in numbers])
  resumable.claim(folder, identity(policy, source, request, numbers=which, rewards=scorer.identity))
  make = lambda asked: rows_of(asked, draw(policy, source, asked, request), scorer, request)
  found = list(resumable.rows(folder, numbers, PART, make))
  records, reasons = choose(found, pairs)
  check_left(records, reasons, request, out)
  resumable.write(out, (resumable.line_of(record) for record in records))
  summary = {
    "prompts": len(found),
    "records": len(records),
    "left_out": reasons,
    "cut_off": cut_off(found),
    "failed_rewards": sum(row["failed"] for row in found),
    "kl_bound": math.log(request.n) - (request.n - 1) / request.n,
    "scores": {
      name: _estimate((row["scores"][i], row["prompt"]) for row in records) for i, name in enumerate(_sides(pairs))
    },
    "scores_of_all": _estimate((score, row["prompt"]) for row in found for score in row["scores"] if score is not None),
    "finished": float(np.mean([end for row in found for end in row["finished"]])),
    "request": request._asdict(),
    "rewards": scorer.identity,
    "policy_step": policy.step,
  }
  resumable.write(out.with_suffix(".json"), [json.dumps(summary, indent=2)])
  return summary


def draw(policy: Run, source: Source, numbers: Sequence[int], request: Request) -> list[Drawn]:
  """n completions for each of some prompts, prompt by prompt; each a function of the seed and the prompt's number.

  Raises:
    InputError: a malformed record, one whose prompt is too long, or options that mean nothing.
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
  repeated = lambda values: [value for value in values for _ in range(request.n)]
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
  records = [source[number] for number in numbers]
  asked = zip(repeated(records), repeated([example.prompt for example in examples]), repeated(rendered), strict=True)
  return [Drawn(*one, completion) for one, completion in zip(asked, completions, strict=True)]


def rows_of(
  numbers: Sequence[int], drawn: Sequence[Drawn], scorer: Scorer, request: Request
) -> Iterator[dict[str, Any]]:
  """A JSON record per prompt: its completions, and what each is worth."""
  n = request.n
  worth = scorer.score(drawn)
  ends = np.array([one.completion.finished for one in drawn])
  scores = worth.scores - request.missing_eos_penalty * ~ends
  for place, number in enumerate(numbers):
    own = slice(place * n, (place + 1) * n)
    prompt = drawn[own][0].prompt
    yield {
      "number": int(number),
      "prompt": plain(prompt),
      **({"tools": tools} if (tools := drawn[own][0].record.get("tools")) else {}),
      "completions": [one.completion.text for one in drawn[own]],
      "scores": listed(scores[own]),
      "rewards": {name: listed(values[own]) for name, values in worth.each.items()},
      "finished": ends[own].tolist(),
      "failed": int(worth.failed[own].sum()),
    }


def plain(prompt: Dialogue) -> str | Dialogue:
  """A prompt as a record holds it: the text alone of a user's single turn."""
  return prompt[0]["content"] if len(prompt) == 1 and prompt[0]["role"] == "user" else prompt


def choose(found: Sequence[dict[str, Any]], pairs: bool) -> tuple[list[dict[str, Any]], dict[str, int]]:
  """Records of the best completions that ended by themselves, and how many prompts have none, by reason.

  A prompt is left out as "cut off" where it would have a record if no completion had been cut at the budget.
  """
  records: list[dict[str, Any]] = []
  reasons = {"no score": 0, "one score": 0, "cut off": 0, "all equal": 0} if pairs else {"no score": 0, "cut off": 0}
  for row in found:
    scored = [k for k, score in enumerate(row["scores"]) if score is not None]
    finished_and_scored = [k for k in scored if row["finished"][k]]
    if len(finished_and_scored) < 1 + pairs:
      reasons["cut off" if len(scored) >= 1 + pairs else "one score" if scored else "no score"] += 1
      continue
    best = max(finished_and_scored, key=lambda k: (row["scores"][k], -k))
    worst = min(finished_and_scored, key=lambda k: (row["scores"][k], -k))
    chosen = (best, worst) if pairs else (best,)
    texts = [row["completions"][k] for k in chosen]
    if pairs and (texts[0] == texts[1] or row["scores"][best] == row["scores"][worst]):
      reasons["all equal"] += 1
      continue
    scores = [row["scores"][k] for k in chosen]
    named = dict(zip(_sides(pairs), texts, strict=True))
    asked = {name: row[name] for name in ("prompt", "tools") if name in row}
    records.append(asked | named | {"scores": scores, "number": row["number"]})
  return records, reasons


def cut_off(found: Sequence[dict[str, Any]]) -> int:
  """How many completions were cut at the budget."""
  return sum(not end for row in found for end in row["finished"])


def check_left(records: Sequence[Any], reasons: dict[str, int], request: Request, out: epath.Path) -> None:
  """Raises InputError where no prompt has a record, for nothing could be learned from none."""
  if records:
    return
  counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
  remedy = f"raise --max-new-tokens={request.max_new_tokens}" if reasons.get("cut off") else "check the rewards"
  raise InputError(f"{out}: no prompt has a record ({counts or 'there are no prompts'}); {remedy}")


def _sides(pairs: bool) -> tuple[str, ...]:
  return ("chosen", "rejected") if pairs else ("completion",)


def identity(policy: Run, source: Source, request: Request, **also: Any) -> dict[str, Any]:
  """All that decides the samples, and what `also` does, as `resumable.claim` takes it."""
  return {
    "policy": digest(table({"params": policy.params})),
    "tokenizer": policy.tokenizer.fingerprint,
    "prompts": source.fingerprint,
    **also,
    "request": request._asdict(),
  }


def listed(values: np.ndarray) -> list[float | None]:
  """Numbers as JSON has them: None for NaN."""
  return [None if np.isnan(value) else float(value) for value in values]


def _estimate(scores: Iterable[tuple[float, Any]]) -> dict[str, Any] | None:
  """Mean of scores and its interval over their prompts, as JSON; None of no scores, and no interval of one prompt."""
  scores = list(scores)
  if not scores:
    return None
  prompts = [json.dumps(prompt) for _, prompt in scores]
  found = interval.mean([score for score, _ in scores], prompts)
  return {"mean": found.value, "interval": found.interval, "count": found.count, "prompts": len(set(prompts))}
