"""The gold reward of responses on the testbed, its components, and the abilities that alignment may cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignjax.environments import testbed
from alignjax.evaluation import interval
from alignjax.evaluation.win_rate import win_rate


def gold_rewards(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
  """Computes the gold reward of each response, float64 [n].

  Raises:
    InputError: a prompt is not the testbed's.
  """
  pairs = zip(prompts, responses, strict=True)
  return np.array([testbed.reward(prompt, response).total for prompt, response in pairs])


def evaluate(prompts: Sequence[str], responses: Sequence[str]) -> dict:
  """Measures one model's responses: a flat, JSON-ready record, in which every interval clusters over the prompts.

  prompts                            the number of responses
  gold_mean, gold_mean_interval      the mean gold reward, with Student's t interval
  components                         weight * mean of each component: they sum to gold_mean
  capability, capability_interval    the share of sums and facts that are answered rightly: a fall is the alignment tax
  sycophancy, over_refusal, harm     the other rates of `testbed.PROBES`, likewise; Wilson intervals; None if no prompt
                                     is of the probe's kind

  Raises:
    InputError: a prompt is not the testbed's.
    ValueError: there are no prompts.
  """
  rewards = [testbed.reward(p, r) for p, r in zip(prompts, responses, strict=True)]
  gold = interval.mean([reward.total for reward in rewards], prompts)
  record = {
    "prompts": gold.count,
    "gold_mean": gold.value,
    "gold_mean_interval": gold.interval,
    "components": {
      name: weight * float(np.mean([getattr(reward, name) for reward in rewards]))
      for name, weight in testbed.WEIGHTS.items()
    },
  }
  for name, probe in testbed.PROBES.items():
    verdicts = [probe(p, r) for p, r in zip(prompts, responses, strict=True)]
    probed = [prompt for prompt, verdict in zip(prompts, verdicts, strict=True) if verdict is not None]
    known_verdicts = [verdict for verdict in verdicts if verdict is not None]
    record |= {name: None, f"{name}_interval": None}
    if known_verdicts:
      share = interval.share(known_verdicts, probed)
      record |= {name: share.value, f"{name}_interval": share.interval}
  return record


def compare(
  prompts: Sequence[str],
  responses: Sequence[str],
  baseline_responses: Sequence[str],
  baseline: str = "sft",
) -> dict:
  """Measures a model and its baseline on the same prompts by `evaluate`, and the gold win rate between them.

  The baseline's entries carry its name as a suffix: gold_mean_sft, gold_mean_sft_interval, ...; the win rate is
  gold_win_rate_vs_sft, ties half, with Wilson's interval gold_win_rate_interval; gold_win_rate_ties is the share of
  ties. Errors are as in `evaluate`.
  """
  rewards = gold_rewards(prompts, responses)
  baseline_rewards = gold_rewards(prompts, baseline_responses)
  wins = win_rate(rewards, baseline_rewards, prompts)
  baseline_record = evaluate(prompts, baseline_responses)
  del baseline_record["prompts"]
  return {
    f"gold_win_rate_vs_{baseline}": wins.value,
    "gold_win_rate_interval": wins.interval,
    "gold_win_rate_ties": float(np.mean(rewards == baseline_rewards)),
    **evaluate(prompts, responses),
    **{baseline_key(key, baseline): value for key, value in baseline_record.items()},
  }


def side_by_side(
  records: Sequence[Mapping[str, str]],
  responses: Mapping[str, Sequence[str]],
  count: int = 12,
) -> list[dict]:
  """Chooses examples for a reader: for `count` prompts, each model's response and its gold reward.

  They are the first prompts of each family in turn, whatever the results: a choice by result would be biased.

  Args:
    records: {"prompt", "family"}, as in eval_prompts.jsonl.
    responses: by model ("sft", "dpo"), one response per record.
    count: the number of prompts.
  """
  families: dict[str, list[int]] = {}
  for index, record in enumerate(records):
    families.setdefault(record["family"], []).append(index)
  rounds = range(max(map(len, families.values()), default=0))
  in_turn = [members[k] for k in rounds for members in families.values() if k < len(members)]
  shown = set(in_turn[:count])
  examples = []
  for index in (index for members in families.values() for index in members if index in shown):
    prompt = records[index]["prompt"]
    example: dict[str, Any] = {"prompt": prompt, "family": records[index]["family"]}
    for model, texts in responses.items():
      example[model] = texts[index]
      example[f"gold_{model}"] = testbed.reward(prompt, texts[index]).total
    examples.append(example)
  return examples


def baseline_key(key: str, name: str) -> str:
  """Returns the key of a baseline's measure: "harm_sft_interval" for "harm_interval" of the baseline "sft"."""
  stem = key.removesuffix("_interval")
  return f"{stem}_{name}{key[len(stem) :]}"
