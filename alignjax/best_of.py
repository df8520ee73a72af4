"""The best of n: completions of a run's policy, scored, and the best (or best and worst) kept as records to train on.

The best alone are supervised data (`algorithm.name=sft`: RAFT, or rejection sampling), best and worst are pairs
(`algorithm.name=preference`). All n stay in OUT.parts, so that another choice among them costs no sampling; a command
that was interrupted goes on behind the last part.

The policy that answers with the best of n is at most log n - (n - 1) / n nats from the one that it asks.

Source: RAFT: Dong et al. 2023 (arXiv:2304.06767); the KL: Stiennon et al. 2020, appendix G.3 (arXiv:2009.01325),
Beirami et al. 2024 (arXiv:2401.01879) on why it is a bound
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from alignjax import hosts, output, parts
from alignjax.data.format import read
from alignjax.data.source import Source, open_source
from alignjax.errors import InputError
from alignjax.evaluation import interval
from alignjax.fingerprint import digest, table
from alignjax.generate import sample_text
from alignjax.run import Run
from alignjax.scoring import Drawn, Scorer

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

  n: int = 16
  seed: int = 0
  max_new_tokens: int = 128
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  missing_eos_penalty: float = 0.0
  batch_size: int = 256


DEFAULT = Request()


def best_of(
  policy: Run,
  prompts: epath.PathLike,
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
    prompts: a file of records with prompts.
    scorer: says which is the best; of equals the first, and the last is the worst.
    out: a .jsonl file: {"prompt", "completion"} a line, or {"prompt", "chosen", "rejected"}.
    request: what is sampled.
    pairs: best and worst; else the best.
    numbers: of the prompts' records, from 0; all of them if None.

  Returns:
    What the JSON file holds.

  Raises:
    InputError: a malformed prompt, options that mean nothing, or parts of another request at this place.
  """
  if request.n < 1 + pairs:
    raise InputError(f"n={request.n}: use at least {1 + pairs}")
  out = epath.Path(out).expanduser()
  if out.suffix != ".jsonl":
    raise InputError(f"--out={out}: the records are JSON lines; give it the ending .jsonl")
  folder = out.with_suffix(".parts")
  hosts.by_first("output", lambda: [output.check_file(one, "--out") for one in (out, out.with_suffix(".json"))])
  with hosts.held("parts", lambda: output.lock(folder, "samples", "--out")):
    return _best_of(policy, prompts, scorer, out, folder, request, pairs, numbers)


def _best_of(policy, prompts, scorer, out, folder, request, pairs, numbers) -> dict[str, Any]:
  source = open_source(prompts)
  numbers = range(len(source)) if numbers is None else numbers
  which = digest([int(number) for number in numbers])
  parts.claim(folder, identity(policy, source, request, numbers=which, rewards=scorer.identity))
  make = lambda asked: rows_of(asked, draw(policy, source, asked, request), scorer, request)
  found = list(parts.rows(folder, numbers, PART, make))
  records, reasons = choose(found, pairs)
  parts.write(out, (parts.line_of(record) for record in records))
  summary = {
    "prompts": len(found),
    "records": len(records),
    "left_out": reasons,
    "failed_rewards": sum(row["failed"] for row in found),
    "kl_bound": math.log(request.n) - (request.n - 1) / request.n,
    "scores": {name: _estimate(row["scores"][i] for row in records) for i, name in enumerate(_sides(pairs))},
    "scores_of_all": _estimate(score for row in found for score in row["scores"] if score is not None),
    "finished": float(np.mean([end for row in found for end in row["finished"]])),
    "request": request._asdict(),
    "rewards": scorer.identity,
    "policy_step": policy.step,
  }
  parts.write(out.with_suffix(".json"), [json.dumps(summary, indent=2)])
  return summary


def draw(policy: Run, source: Source, numbers: Sequence[int], request: Request) -> list[Drawn]:
  """n completions for each of some prompts, prompt by prompt; each a function of the seed and the prompt's number.

  Raises:
    InputError: a malformed record, or options that mean nothing.
  """
  examples = [read(source, number, "prompt") for number in numbers]
  rendered = []
  for number, example in zip(numbers, examples, strict=True):
    try:
      rendered.append(policy.tokenizer.render(example.prompt, add_generation_prompt=True, tools=example.tools))
    except InputError as error:
      raise InputError(f"{source.where(number)}: {error}") from error
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
      "prompt": prompt[0]["content"] if len(prompt) == 1 and prompt[0]["role"] == "user" else prompt,
      **({"tools": tools} if (tools := drawn[own][0].record.get("tools")) else {}),
      "completions": [one.completion.text for one in drawn[own]],
      "scores": listed(scores[own]),
      "rewards": {name: listed(values[own]) for name, values in worth.each.items()},
      "finished": ends[own].tolist(),
      "failed": int(worth.failed[own].sum()),
    }


def choose(found: Sequence[dict[str, Any]], pairs: bool) -> tuple[list[dict[str, Any]], dict[str, int]]:
  """Records of the best completions, and how many prompts have none, by reason."""
  records: list[dict[str, Any]] = []
  reasons = {"no score": 0, "one score": 0, "all equal": 0} if pairs else {"no score": 0}
  for row in found:
    judged = [k for k, score in enumerate(row["scores"]) if score is not None]
    if len(judged) < 1 + pairs:
      reasons["one score" if judged else "no score"] += 1
      continue
    best = max(judged, key=lambda k: (row["scores"][k], -k))
    worst = min(judged, key=lambda k: (row["scores"][k], -k))
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


def _sides(pairs: bool) -> tuple[str, ...]:
  return ("chosen", "rejected") if pairs else ("completion",)


def identity(policy: Run, source: Source, request: Request, **also: Any) -> dict[str, Any]:
  """All that decides the samples, and what `also` does, as `parts.claim` takes it."""
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


def _estimate(values) -> dict[str, Any] | None:
  """Mean and interval, as JSON; None of fewer than two."""
  values = list(values)
  if len(values) < 2:
    return None
  found = interval.mean(values)
  return {"mean": found.value, "interval": found.interval, "count": found.count}
