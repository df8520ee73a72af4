"""Prepares the batch that a step learns from: the part of an iteration that has no gradient.

For most algorithms that is one compiled function. An online algorithm has two: the rollout, and what follows from the
completions and their rewards. Rewards that are Python functions are computed between the two.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping

import jax
import numpy as np

from alignjax import rewards
from alignjax.algorithms.algorithm import Algorithm
from alignjax.algorithms.online_rows import HostRewards, Rollout
from alignjax.data.loader import Dataset
from alignjax.data.tokenizer import Tokenizer
from alignjax.rewards import Reward
from alignjax.system import sharding
from alignjax.types import Batch, Trees

Prepare = Callable[[Trees, Batch, jax.Array], tuple[Batch, dict[str, float]]]


@dataclasses.dataclass(frozen=True)
class HostScorer:
  """Runs the rewards of an online run that are Python functions.

  Attributes:
    score: rollout -> its rewards.
    facts: those that the rewards declare, as metrics "data/REWARD/FACT".
  """

  score: Callable[[Rollout], HostRewards]
  facts: dict[str, float]

  def __call__(self, rollout: Rollout) -> HostRewards:
    """Scores the completions of a rollout."""
    return self.score(rollout)


def make_prepare(algorithm: Algorithm, scorer: Callable[[Rollout], HostRewards] | None = None) -> Prepare:
  """Returns f(trees, batch, key) -> (batch, seconds of each part by name; {} if there is one part only).

  The parts of an online algorithm are "rollout", "reward" (with a scorer) and "prepare"; each is waited for.

  Args:
    algorithm: whose `rollout` and `prepare` are compiled.
    scorer: from `make_host_scorer`, for an online algorithm whose rewards are Python functions; not called otherwise.
  """
  prepare = jax.jit(algorithm.prepare)
  if algorithm.rollout is None:
    return lambda trees, batch, key: (prepare(trees, batch, key), {})
  rollout = jax.jit(algorithm.rollout)

  def rollout_and_prepare(trees, batch, key):
    seconds: dict[str, float] = {}
    part_started = time.perf_counter()

    def end_part(name: str) -> None:
      nonlocal part_started
      now = time.perf_counter()
      seconds[name] = now - part_started
      part_started = now

    batch = jax.block_until_ready(rollout(trees, batch, key))
    end_part("rollout")
    if scorer:
      batch = batch.replace(rows=batch.rows.replace(host=scorer(batch.rows)))
      end_part("reward")
    batch = jax.block_until_ready(prepare(trees, batch, key))
    end_part("prepare")
    return batch, seconds

  return rollout_and_prepare


def make_host_scorer(
  functions: Mapping[str, Reward],
  learned: Collection[str],
  tokenizer: Tokenizer,
  dataset: Dataset,
  mesh: jax.sharding.Mesh,
) -> HostScorer | None:
  """Returns the scorer of a run's completions; None for no rewards.

  A reward is NaN if it does not apply. A completion has failed if a reward that is learned from raised, hung or gave
  no number. Each process scores the rows that it holds, and prints the first failure of each reward.

  Args:
    functions: the rewards by name, in the order of the columns.
    learned: names of the rewards that are learned from.
    tokenizer: decodes the completions.
    dataset: gives the prompts and the other fields of their records.
    mesh: where the columns go.
  """
  if not functions:
    return None
  is_learned = np.array([name in learned for name in functions])

  def score(rollout: Rollout) -> HostRewards:
    rows = {name: sharding.local_rows(rollout.texts[name]) for name in ("tokens", "loss_mask", "record_ids")}
    completions = [tokens[mask > 0].tolist() for tokens, mask in zip(rows["tokens"], rows["loss_mask"], strict=True)]
    scored_rows = [row for row, ids in enumerate(completions) if ids]
    records = [int(rows["record_ids"][row, 0]) for row in scored_rows]
    scores = rewards.score(
      functions,
      [dataset.example(record).prompt for record in records],
      [tokenizer.decode(completions[row]) for row in scored_rows],
      [completions[row] for row in scored_rows],
      dataset.columns(records),
      where=lambda index: dataset.where(records[index]),
    )
    values = np.full((len(completions), len(functions)), np.nan, np.float32)
    failed = np.zeros(len(completions), np.float32)
    values[scored_rows] = scores.values
    failed[scored_rows] = (scores.failed & is_learned).any(axis=1)
    return HostRewards(**sharding.to_mesh({"values": values, "failed": failed}, mesh).rows)

  facts = {}
  for name, function in functions.items():
    for fact, value in getattr(function, "facts", {}).items():
      facts[f"data/{name}/{fact}"] = value
  return HostScorer(score, facts)
