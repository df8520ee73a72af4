"""From rows of data to a batch to learn from: the part of an iteration that has no gradient.

For most algorithms that is one compiled function. An online one has two, and the rewards that Python functions give
stand between them: completions, their rewards, and all that follows from both.
"""

import time
from collections.abc import Callable, Collection, Mapping

import jax
import numpy as np

from alignjax import rewards
from alignjax.algorithms.algorithm import Algorithm
from alignjax.data.loader import Dataset
from alignjax.data.tokenizer import Tokenizer
from alignjax.rewards import Reward
from alignjax.system import sharding
from alignjax.types import Batch, Params

Prepare = Callable[[dict[str, Params], Batch, jax.Array], tuple[Batch, dict[str, float]]]
Judge = Callable[[Batch], Batch]


def make_prepare(algorithm: Algorithm, judge: Judge | None = None) -> Prepare:
  """Returns f(trees, batch, key) -> (batch, seconds): of each part where there are several, else {}.

  Args:
    algorithm: whose `rollout` and `prepare` are compiled.
    judge: of `make_judge`, for an online algorithm whose rewards are Python functions.
  """
  prepare = jax.jit(algorithm.prepare)
  if algorithm.rollout is None:
    return lambda trees, batch, key: (prepare(trees, batch, key), {})
  rollout = jax.jit(algorithm.rollout)

  def parts(trees, batch, key):
    clock, seconds = time.perf_counter(), {}

    def lap(name: str) -> None:
      nonlocal clock
      now = time.perf_counter()
      seconds[name], clock = now - clock, now

    batch = jax.block_until_ready(rollout(trees, batch, key))
    lap("rollout")
    if judge:
      batch |= judge(batch)
      lap("reward")
    batch = jax.block_until_ready(prepare(trees, batch, key))
    lap("prepare")
    return batch, seconds

  return parts


def make_judge(
  functions: Mapping[str, Reward],
  learned: Collection[str],
  tokenizer: Tokenizer,
  dataset: Dataset,
  mesh: jax.sharding.Mesh,
) -> Judge | None:
  """Returns f(rollout batch) -> {"host_rewards": float32 [B, R], "host_failed": float32 [B]}; None for no rewards.

  A reward is NaN where it does not apply; a completion has failed where one that is learned from raised, hung or gave
  no number. Each process judges the rows that it holds, and prints the first failure of each reward. What rewards say
  of themselves is the attribute `facts`.

  Args:
    functions: the rewards by name, in the order of the columns.
    learned: those that are learned from.
    tokenizer: decodes the completions.
    dataset: gives the prompts and the other fields of their records.
    mesh: where the columns go.
  """
  if not functions:
    return None
  counts = np.array([name in learned for name in functions])

  def judge(batch: Batch) -> Batch:
    rows = {name: sharding.local_rows(batch[name]) for name in ("tokens", "loss_mask", "record_ids")}
    completions = [tokens[mask > 0].tolist() for tokens, mask in zip(rows["tokens"], rows["loss_mask"], strict=True)]
    there = [row for row, ids in enumerate(completions) if ids]
    records = [int(rows["record_ids"][row, 0]) for row in there]
    scores = rewards.judge(
      functions,
      [dataset.example(record).prompt for record in records],
      [tokenizer.decode(completions[row]) for row in there],
      [completions[row] for row in there],
      dataset.columns(records),
      where=lambda index: dataset.where(records[index]),
    )
    found = np.full((len(completions), len(functions)), np.nan, np.float32)
    failed = np.zeros(len(completions), np.float32)
    found[there] = scores.values
    failed[there] = (scores.failed & counts).any(axis=1)
    return sharding.to_mesh({"host_rewards": found, "host_failed": failed}, mesh)

  facts = {name: getattr(function, "facts", {}) for name, function in functions.items()}
  judge.facts = {f"data/{name}/{fact}": value for name, own in facts.items() for fact, value in own.items()}
  return judge
