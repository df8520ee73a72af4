"""Scores given completions with a model, in batches of similar lengths: a handful of programs serves any list."""

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
  """Scores each completion after its prompt; returns one row per completion, in the given order.

  Args:
    score: (tokens, segment_ids, positions), all int32 [B, W] -> [B, ...]; a text begins in column 0 of its row.
    prompts: token ids.
    completions: token ids, one for each prompt.
    batch_size: texts in a batch; rounded up to what the mesh splits.

  Returns:
    The row of `score` for each text: if it has a dimension W, the entries behind the text are of padding.

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
    batch = order[start : start + rows]
    width = bucket(max(len(texts[index]) for index in batch))
    tokens, segment_ids = np.zeros((2, rows, width), np.int32)
    for row, index in enumerate(batch):
      tokens[row, : len(texts[index])] = texts[index]
      segment_ids[row, : len(texts[index])] = 1
    positions = np.where(segment_ids > 0, np.arange(width, dtype=np.int32), 0)
    scores = multihost_utils.process_allgather(score(tokens, segment_ids, positions), tiled=True)
    for row, index in enumerate(batch):
      scored[index] = scores[row]
  return scored


def completion_rewards(
  model: Model,
  params: Params,
  prompts: Sequence[Sequence[int]],
  completions: Sequence[Sequence[int]],
  *,
  batch_size: int = 64,
) -> np.ndarray:
  """Computes the rewards of each completion by each head of a reward model, float32 [n, heads].

  Args:
    model, params: of the reward model, on the current mesh.
    prompts, completions, batch_size: as in `rescore`.

  Raises:
    InputError: as `rescore`.
  """
  rows = rescore(functools.partial(_make_rewards(model), params), prompts, completions, batch_size=batch_size)
  if not rows:
    return np.zeros((0, model.config.score_heads), np.float32)
  return np.stack(rows)


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
  """Computes the reward of each completion from its steps, by a process reward model, float32 [n].

  Args:
    model, params: of the process reward model, on the current mesh.
    prompts, completions, batch_size: as in `rescore`.
    special: the tokens that end a completion and its steps.
    kind: how the steps' rewards are combined, as in `algorithm.step_reward`.

  Raises:
    InputError: as `rescore`.
  """
  rows = rescore(functools.partial(_make_steps(model), params), prompts, completions, batch_size=batch_size)
  combined = np.zeros(len(rows), np.float32)
  for index, (logits, prompt, completion) in enumerate(zip(rows, prompts, completions, strict=True)):
    tokens, mask = np.zeros((2, 1, len(logits)), np.int32)
    tokens[0, len(prompt) : len(prompt) + len(completion)] = completion
    mask[0, len(prompt) : len(prompt) + len(completion)] = 1
    combined[index] = _together(logits[None], tokens, mask, special, kind)[0]
  return combined


@functools.partial(jax.jit, static_argnames=("special", "kind"))
def _together(logits, tokens, mask, special: Special, kind: str) -> jax.Array:
  return step_reward.together(logits, step_reward.ends(tokens, mask, special.stop_id, special.step_ends), kind)


@functools.cache
def _make_steps(model: Model) -> Callable[..., jax.Array]:
  @jax.jit
  def score(params, tokens, segment_ids, positions):
    rows = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
    return step_reward.scores(model, params, rows)

  return score


@functools.cache
def _make_rewards(model: Model) -> Callable[..., jax.Array]:
  @jax.jit
  def score(params, tokens, segment_ids, positions):
    rows = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
    return head_rewards(model, params, rows | {"example_mask": segment_ids[:, :1]}, 1)[:, 0, 0]

  return score
