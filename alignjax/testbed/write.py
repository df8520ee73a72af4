"""Writes the testbed to files: JSONL like anybody's, no gold reward in the records."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from alignjax.errors import InputError
from alignjax.testbed import annotator, behaviour, world
from alignjax.testbed.annotator import Population
from alignjax.testbed.phrasing import EVALUATION, TRAINING
from alignjax.testbed.world import Prompt

Records = list[dict]


def write(
  out_dir: str | Path,
  *,
  seed: int = 0,
  sft: int = 8000,
  preference: int = 6000,
  evaluation: int = 1000,
  prompts: int = 300,
  population: str | Population = "default",
) -> dict[str, Path]:
  """Writes a world's data and returns each file's path by stem; equal arguments, equal bytes.

  sft.jsonl              {"id", "messages"}: demonstrations of mixed quality
  preference.jsonl       {"id", "prompt", "chosen", "rejected", "annotator", "family"}
  eval_preference.jsonl  the same, on held-out prompts and facts
  eval_prompts.jsonl     {"id", "prompt", "family"}, held out
  text.txt               every training prompt and response, one per line, for the tokenizer
  README.md              what this is, for who finds the folder later

  Args:
    out_dir: made if it is missing; files of the same names are replaced.
    seed: of everything drawn. Which facts are held out does not depend on it.
    sft: demonstrations.
    preference: training pairs.
    evaluation: held-out pairs.
    prompts: held-out prompts to sample completions for.
    population: who labels the pairs of both files: a name in POPULATIONS, or annotators.

  Raises:
    InputError: a count or the seed is negative or the population is unknown.
  """
  counts = {"sft": sft, "preference": preference, "evaluation": evaluation, "prompts": prompts}
  for name, number in {"seed": seed, **counts}.items():
    if number < 0:
      raise InputError(f"testbed: {name}={number} is negative; use 0 or more")
  annotators = annotator.find(population)

  # a stream of random numbers per file: asking for more of one leaves the others as they were
  streams = [np.random.default_rng([seed, stream]) for stream in range(4)]
  demonstrations = _numbered("sft", _demonstrations(streams[0]), sft)
  pairs = _numbered("preference", _pairs(streams[1], TRAINING, annotators), preference)
  eval_pairs = _numbered("eval", _pairs(streams[2], EVALUATION, annotators), evaluation)
  eval_prompts = _numbered("prompt", _prompts(streams[3]), prompts)

  contents = {
    "sft.jsonl": _jsonl(demonstrations),
    "preference.jsonl": _jsonl(pairs),
    "eval_preference.jsonl": _jsonl(eval_pairs),
    "eval_prompts.jsonl": _jsonl(eval_prompts),
    "text.txt": _text(demonstrations, pairs),
    "README.md": _card(seed, counts, population, annotators, eval_pairs),
  }
  out_dir = Path(out_dir)
  out_dir.mkdir(parents=True, exist_ok=True)
  for name, content in contents.items():
    (out_dir / name).write_text(content, encoding="utf-8", newline="\n")
  return {Path(name).stem: out_dir / name for name in contents}


def _demonstrations(rng: np.random.Generator) -> Iterator[dict]:
  while True:
    prompt = world.draw(rng, TRAINING)
    response = behaviour.realise(rng, prompt, behaviour.draw(rng, prompt))
    yield {
      "messages": [
        {"role": "user", "content": prompt.text},
        {"role": "assistant", "content": response},
      ]
    }


def _pairs(rng: np.random.Generator, split: str, annotators: Population) -> Iterator[dict]:
  while True:
    prompt = world.draw(rng, split)
    a, b = _two_responses(rng, prompt)
    choice = annotator.choose(rng, annotators, prompt.text, a, b)
    yield {
      "prompt": prompt.text,
      "chosen": choice.chosen,
      "rejected": choice.rejected,
      "annotator": choice.annotator,
      "family": prompt.family,
    }


def _two_responses(rng: np.random.Generator, prompt: Prompt) -> tuple[str, str]:
  """Two independent draws whose texts differ."""
  while True:
    a, b = (behaviour.realise(rng, prompt, behaviour.draw(rng, prompt)) for _ in range(2))
    if a != b:
      return a, b


def _prompts(rng: np.random.Generator) -> Iterator[dict]:
  while True:
    prompt = world.draw(rng, EVALUATION)
    yield {"prompt": prompt.text, "family": prompt.family}


def _numbered(kind: str, records: Iterator[dict], count: int) -> Records:
  return [{"id": f"{kind}-{i:06d}", **next(records)} for i in range(count)]


def _jsonl(records: Records) -> str:
  return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _text(demonstrations: Records, pairs: Records) -> str:
  lines = [message["content"] for record in demonstrations for message in record["messages"]]
  lines += [record[side] for record in pairs for side in ("prompt", "chosen", "rejected")]
  return "".join(line + "\n" for line in lines)


def _card(
  seed: int,
  counts: Mapping[str, int],
  population: str | Population,
  annotators: Population,
  eval_pairs: Records,
) -> str:
  bayes = annotator.bayes_accuracy(eval_pairs, annotators) if eval_pairs else float("nan")
  name = population if isinstance(population, str) else "custom"
  table = "\n".join(
    f"| {who.id} | {who.share:g} | {who.temperature:g} | {who.flip:g} | {who.length_bias:g} | {who.sycophancy_bias:g} |"
    for who in annotators
  )
  return f"""# A small assistant's world

Made by alignjax's testbed, seed {seed}. Synthetic: every prompt, response and label comes from
templates and simulated annotators, and the true worth of a response is known
(`alignjax.testbed.reward`). It is not in these files.

| file | records | content |
|---|---:|---|
| sft.jsonl | {counts["sft"]} | demonstrations of mixed quality |
| preference.jsonl | {counts["preference"]} | pairs of such responses, and the annotator's choice |
| eval_preference.jsonl | {counts["evaluation"]} | the same, on held-out prompts |
| eval_prompts.jsonl | {counts["prompts"]} | held-out prompts |
| text.txt | | training prompts and responses, one per line |

Held out: the phrasings, and {world.HELD_OUT_SHARE:.0%} of the sums, of the deeds and of who has
what thing. The best possible accuracy on the held-out pairs (Bayes) is {bayes:.4f}.

Annotators of the population "{name}":

| id | share | temperature | flip | length bias | sycophancy bias |
|---|---:|---:|---:|---:|---:|
{table}
"""
