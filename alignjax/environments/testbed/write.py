"""Writes the testbed to files: ordinary JSONL, without the gold reward."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from alignjax.environments.testbed import annotator, behaviour, gold, judge, world
from alignjax.environments.testbed.annotator import Population
from alignjax.environments.testbed.phrasing import EVALUATION, TRAINING
from alignjax.environments.testbed.world import Prompt
from alignjax.system import output, ranges

Records = list[dict]
RESPONSES = 4  # in a ranking


def write(
  out_dir: str | Path,
  *,
  seed: int = 0,
  sft: int = 8000,
  preference: int = 6000,
  evaluation: int = 1000,
  prompts: int = 300,
  ranked: int = 0,
  stepwise: int = 0,
  judged: int = 0,
  population: str | Population = "default",
) -> dict[str, Path]:
  """Writes a world's data and returns each file's path by stem; equal arguments give equal bytes.

  sft.jsonl              {"id", "messages"}: demonstrations of mixed quality
  preference.jsonl       {"id", "prompt", "chosen", "rejected", "annotator", "family"}
  eval_preference.jsonl  the same, on held-out prompts and facts
  eval_prompts.jsonl     {"id", "prompt", "family"}, held out
  ranked.jsonl           {"id", "prompt", "responses", "rankings", "family"}: ranked by the gold reward
  stepwise.jsonl         {"id", "prompt", "completions", "labels"}: sums said one to three times, right or wrong, and
                         filler that is neither
  judged.jsonl           {"id", "prompt", "completions", "gold", "quality", "agrees", "authors", "family"}: held-out
                         pairs with their true worth, to measure judges on
  text.txt               every training prompt and response, one per line, for the tokenizer
  README.md              a description of the folder

  Args:
    out_dir: made if it is missing; files of the same names are replaced.
    seed: of all random draws; the held-out facts do not depend on it.
    sft: number of demonstrations.
    preference: number of training pairs.
    evaluation: number of held-out pairs.
    prompts: number of held-out prompts, for which completions are sampled.
    ranked: number of training prompts with RESPONSES responses each; 0 writes no such file.
    stepwise: number of training answers in steps; 0 writes no such file.
    judged: number of held-out pairs for judges; 0 writes no such file.
    population: the annotators of the pairs in both files: a name in POPULATIONS, or annotators.

  Raises:
    InputError: a count or the seed is negative or the population is unknown.
  """
  counts = {"sft": sft, "preference": preference, "evaluation": evaluation, "prompts": prompts}
  counts |= {"ranked": ranked, "stepwise": stepwise, "judged": judged}
  for name, number in {"seed": seed, **counts}.items():
    ranges.check(f"testbed: {name}", number, ranges.Seed if name == "seed" else ranges.Whole)
  annotators = annotator.find(population)
  output.check_folder(out_dir, "--out")

  # One stream of random numbers for each file, so that a larger count of one does not change the others.
  streams = [np.random.default_rng([seed, stream]) for stream in range(7)]
  demonstrations = _numbered("sft", _demonstrations(streams[0]), sft)
  pairs = _numbered("preference", _pairs(streams[1], TRAINING, annotators), preference)
  eval_pairs = _numbered("eval", _pairs(streams[2], EVALUATION, annotators), evaluation)
  eval_prompts = _numbered("prompt", _prompts(streams[3]), prompts)

  more = {"ranked": _rankings(streams[4]), "stepwise": _answers(streams[5]), "judged": _judged(streams[6])}
  contents = {f"{name}.jsonl": _jsonl(_numbered(name, more[name], counts[name])) for name in more if counts[name]}
  contents |= {
    "sft.jsonl": _jsonl(demonstrations),
    "preference.jsonl": _jsonl(pairs),
    "eval_preference.jsonl": _jsonl(eval_pairs),
    "eval_prompts.jsonl": _jsonl(eval_prompts),
    "text.txt": _text(demonstrations, pairs),
    "README.md": _card(seed, counts, population, annotators, eval_pairs),
  }
  out_dir = Path(out_dir).expanduser()
  for name, content in contents.items():
    output.write(out_dir / name, content, "--out")
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
  """Draws two responses independently until their texts differ."""
  while True:
    a, b = (behaviour.realise(rng, prompt, behaviour.draw(rng, prompt)) for _ in range(2))
    if a != b:
      return a, b


def _rankings(rng: np.random.Generator) -> Iterator[dict]:
  while True:
    prompt = world.draw(rng, TRAINING)
    responses: list[str] = []
    while len(responses) < RESPONSES:
      response = behaviour.realise(rng, prompt, behaviour.draw(rng, prompt))
      responses += [response] * (response not in responses)
    worth = [round(gold.reward(prompt.text, response).total, 6) for response in responses]
    rankings = [1 + sorted(set(worth), reverse=True).index(value) for value in worth]
    yield {"prompt": prompt.text, "responses": responses, "rankings": rankings, "family": prompt.family}


def _answers(rng: np.random.Generator) -> Iterator[dict]:
  while True:
    prompt = world.draw(rng, TRAINING)
    if prompt.family != "arithmetic":
      continue
    steps: list[tuple[str, bool | None]] = []
    for right in rng.random(rng.integers(1, 4)) < 0.6:
      if rng.random() < 0.3:
        steps.append((behaviour.FILLERS[rng.integers(len(behaviour.FILLERS))], None))
      act = behaviour.Behaviour("answer" if right else "err", "plain", 0)
      steps.append((behaviour.realise(rng, prompt, act), bool(right)))
    completions, labels = map(list, zip(*steps, strict=True))
    yield {"prompt": prompt.text, "completions": completions, "labels": labels}


def _judged(rng: np.random.Generator) -> Iterator[dict]:
  while True:
    prompt = world.draw(rng, EVALUATION)
    pair = _two_responses(rng, prompt)
    quality = [round(gold.reward(prompt.text, response).total, 6) for response in pair]
    better = "tie"
    if quality[0] != quality[1]:
      better = ("first", "second")[int(quality[1] > quality[0])]
    yield {
      "prompt": prompt.text,
      "completions": list(pair),
      "gold": better,
      "quality": quality,
      "agrees": [gold.agrees(prompt.text, response) for response in pair],
      "authors": [judge.author(response) for response in pair],
      "family": prompt.family,
    }


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
  """Writes the README.md of a folder."""
  bayes = float("nan")
  if eval_pairs:
    bayes = annotator.bayes_accuracy(eval_pairs, annotators)
  name = population if isinstance(population, str) else "custom"
  table = "\n".join(
    f"| {who.id} | {who.share:g} | {who.temperature:g} | {who.flip:g} | {who.length_bias:g} | {who.sycophancy_bias:g} |"
    for who in annotators
  )
  said = {
    "ranked": f"{RESPONSES} responses to a prompt, ranked by their true worth",
    "stepwise": "sums said one to three times, and whether each is right",
    "judged": "held-out pairs with their true worth, to measure judges on",
  }
  more = "".join(f"| {file}.jsonl | {counts[file]} | {what} |\n" for file, what in said.items() if counts[file])
  return f"""# A small assistant's world

Made by alignjax's testbed, seed {seed}. Synthetic: every prompt, response and label comes from
templates and simulated annotators, and the true worth of a response is known
(`alignjax.testbed.reward`). It is in no file that is trained on.

| file | records | content |
|---|---:|---|
| sft.jsonl | {counts["sft"]} | demonstrations of mixed quality |
| preference.jsonl | {counts["preference"]} | pairs of such responses, and the annotator's choice |
| eval_preference.jsonl | {counts["evaluation"]} | the same, on held-out prompts |
| eval_prompts.jsonl | {counts["prompts"]} | held-out prompts |
{more}| text.txt | | training prompts and responses, one per line |

Held out: the phrasings, and {world.HELD_OUT_SHARE:.0%} of the sums, of the deeds and of who has
what thing. The best possible accuracy on the held-out pairs (Bayes) is {bayes:.4f}.

Annotators of the population "{name}":

| id | share | temperature | flip | length bias | sycophancy bias |
|---|---:|---:|---:|---:|---:|
{table}
"""
