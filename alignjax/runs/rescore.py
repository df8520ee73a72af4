"""What a model says of given completions: batches of similar lengths, so that a handful of programs serves any list."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignjax.algorithms import step_reward
from alignjax.algorithms.algorithm import Special
from alignjax.algorithms.reward import head_rewards
from alignjax.errors import InputError
from alignjax.model import Model
from alignjax.sampling.generate import bucket
from alignjax.system.sharding import ways
from alignjax.types import Params


def rescore(
  score: Callable[..., jax.Array],
  prompts: Sequence[Sequence[int]],
  completions: Sequence[Sequence[int]],
  *,
  batch_size: int = 64,
) -> list[np.ndarray]:
  """Of each completion after its prompt, the row of score(tokens, segment_ids, positions), all three [B, W].

  Raises:
    InputError: a prompt or a completion without tokens.
  """
  for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
    if not len(prompt) or not len(completion):
      raise InputError(f"completion {index} (from 0): prompt and completion need a token each")
  texts = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
  shards = ways("batch")
  rows = -(-min(batch_size, max(len(texts), 1)) // shards) * shards
  order = sorted(range(len(texts)), key=lambda index: bucket(len(texts[index])))
  scored: list[np.ndarray] = [np.empty(0)] * len(texts)
  for start in range(0, len(order), rows):
    chosen = order[start : start + rows]
    width = bucket(max(len(texts[index]) for index in chosen))
    tokens, segment_ids = np.zeros((2, rows, width), np.int32)
    for row, index in enumerate(chosen):
      tokens[row, : len(texts[index])] = texts[index]
      segment_ids[row, : len(texts[index])] = 1
    positions = np.where(segment_ids > 0, np.arange(width, dtype=np.int32), 0)
    found = multihost_utils.process_allgather(score(tokens, segment_ids, positions), tiled=True)
    for row, index in enumerate(chosen):
      scored[index] = found[row]
  return scored


def completion_rewards(
  model: Model,
  params: Params,
  prompts: Sequence[Sequence[int]],
  completions: Sequence[Sequence[int]],
  *,
  batch_size: int = 64,
) -> np.ndarray:
  """What each head of a reward model gives each completion, float32 [n, heads]; errors as in `rescore`."""
  rows = rescore(functools.partial(_make_rewards(model), params), prompts, completions, batch_size=batch_size)
  return np.stack(rows) if rows else np.zeros((0, model.config.score_heads), np.float32)


def completion_steps(
  model: Model,
  params: Params,
  prompts: Sequence[Sequence[int]],
  completions: Sequence[Sequence[int]],
  special: Special,
  kind: str,
  *,
  batch_size: int = 64,
) -> np.ndarray:
  """What the steps of each completion come to by a process reward model, float32 [n]; errors as in `rescore`."""
  rows = rescore(functools.partial(_make_steps(model), params), prompts, completions, batch_size=batch_size)
  found = np.zeros(len(rows), np.float32)
  for index, (logits, prompt, completion) in enumerate(zip(rows, prompts, completions, strict=True)):
    tokens, mask = np.zeros((2, 1, len(logits)), np.int32)
    tokens[0, len(prompt) : len(prompt) + len(completion)] = completion
    mask[0, len(prompt) : len(prompt) + len(completion)] = 1
    found[index] = _together(logits[None], tokens, mask, special, kind)[0]
  return found


@functools.partial(jax.jit, static_argnames=("special", "kind"))
def _together(logits, tokens, mask, special: Special, kind: str) -> jax.Array:
  return step_reward.together(logits, step_reward.ends(tokens, mask, special.stop_id, special.step_ends), kind)


@functools.cache
def _make_steps(model: Model) -> Callable[..., jax.Array]:
  @jax.jit
  def score(params, tokens, segment_ids, positions):
    batch = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
    return step_reward.scores(model, params, batch)

  return score


@functools.cache
def _make_rewards(model: Model) -> Callable[..., jax.Array]:
  @jax.jit
  def score(params, tokens, segment_ids, positions):
    batch = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
    return head_rewards(model, params, batch | {"example_mask": segment_ids[:, :1]}, 1)[:, 0, 0]

  return score
