"""Batches of random tokens in the package's layout: ragged examples packed into rows, some rows fuller than others."""

import numpy as np


def preference(rows: int, length: int, pairs: int, vocab: int, seed: int = 0) -> dict:
  """A preference batch; every other row lacks its last pair."""
  rng = np.random.default_rng(seed)
  exists = _exists(rows, pairs)
  margins = np.where(exists, rng.uniform(0, 1, exists.shape), 0).astype(np.float32)
  packed = _pack(rng, length, 2 * exists.sum(axis=1), 2 * pairs, vocab)
  return packed | _columns(rng, exists) | {"margins": margins}


def sft(rows: int, length: int, examples: int, vocab: int, seed: int = 0) -> dict:
  """An SFT batch; every other row lacks its last example."""
  rng = np.random.default_rng(seed)
  exists = _exists(rows, examples)
  return _pack(rng, length, exists.sum(axis=1), examples, vocab) | _columns(rng, exists)


def triple(rows: int, length: int, pairs: int, vocab: int, seed: int = 0) -> dict:
  """A preference batch whose pairs have a third completion each, at the end of the row."""
  rng = np.random.default_rng(seed)
  exists = _exists(rows, pairs)
  packed = _pack(rng, length, 3 * exists.sum(axis=1), 3 * pairs, vocab)
  third = packed["segment_ids"] - 2 * exists.sum(axis=1)[:, None]
  packed["segment_ids"] = np.where(third > 0, third + 2 * pairs, packed["segment_ids"]).astype(np.int32)
  margins = np.where(exists, rng.uniform(0, 1, exists.shape), 0).astype(np.float32)
  return packed | _columns(rng, exists) | {"margins": margins}


def ranked(rows: int, length: int, rankings: int, vocab: int, seed: int = 0, responses: int = 3) -> dict:
  """A batch of rankings with ties of two responses or more; every other row lacks its last ranking."""
  rng = np.random.default_rng(seed)
  exists = _exists(rows, rankings)
  counts = np.where(exists, rng.integers(2, responses + 1, exists.shape), 0)
  packed = _pack(rng, length, counts.sum(axis=1), responses * rankings, vocab)
  there = np.arange(responses) < counts[..., None]
  numbers = [np.r_[0, 1 + np.flatnonzero(row)] for row in there.reshape(rows, -1)]  # of the segments that there are
  for row in range(rows):
    packed["segment_ids"][row] = numbers[row][packed["segment_ids"][row]]
  ranks = np.where(there, rng.integers(1, responses + 1, there.shape), 0).astype(np.float32)
  return packed | _columns(rng, exists) | {"ranks": ranks}


def stepwise(rows: int, length: int, answers: int, vocab: int, seed: int = 0) -> dict:
  """A batch of answers in steps, two in three of which are right; every other row lacks its last answer."""
  batch, rng = sft(rows, length, answers, vocab, seed), np.random.default_rng(seed + 1)
  shape = batch["loss_mask"].shape
  batch["loss_mask"] *= rng.uniform(size=shape) < 0.6
  batch["step_labels"] = (batch["loss_mask"] * (rng.uniform(size=shape) < 2 / 3)).astype(np.float32)
  return batch


def mismatched(rows: int, length: int, examples: int, vocab: int, seed: int = 0) -> dict:
  """An unpaired batch with the rows of mismatched completions beside it; every other row lacks its last example."""
  batch = sft(rows, length, examples, vocab, seed)
  labels = np.random.default_rng(seed + 1).uniform(size=batch["weights"].shape) < 0.6
  batch["labels"] = (labels * batch["example_mask"]).astype(np.float32)
  return batch | beside(batch, length + length // examples)


def beside(batch: dict, length: int) -> dict:
  """Rows of `length` tokens in which each prompt has the completion of the example before it in the batch."""
  examples = []  # (row, segment, prompt, completion), in order
  for row, segment in zip(*np.nonzero(batch["example_mask"]), strict=True):
    here = batch["segment_ids"][row] == segment + 1
    tokens, mask = batch["tokens"][row, here], batch["loss_mask"][row, here] > 0
    examples.append((row, segment, tokens[~mask], tokens[mask]))
  names = {"tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "loss_mask": np.float32}
  out = {name: np.zeros((len(batch["tokens"]), length), dtype) for name, dtype in names.items()}
  filled = np.zeros(len(batch["tokens"]), int)
  for k, (row, segment, prompt, _) in enumerate(examples):
    completion = examples[k - 1][3]
    end = filled[row] + len(prompt) + len(completion)
    here = slice(filled[row], end)
    out["tokens"][row, here] = np.concatenate([prompt, completion])
    out["segment_ids"][row, here] = segment + 1
    out["positions"][row, here] = np.arange(len(prompt) + len(completion))
    out["loss_mask"][row, end - len(completion) : end] = 1
    filled[row] = end
  return {f"kl_{name}": values for name, values in out.items()}


def _exists(rows, examples):
  exists = np.ones((rows, examples), bool)
  exists[1::2, -1] = examples == 1
  return exists


def _columns(rng, exists):
  record_ids = np.where(exists, np.cumsum(exists).reshape(exists.shape) - 1, -1)
  return {
    "example_mask": exists.astype(np.float32),
    "record_ids": record_ids.astype(np.int32),
    "weights": np.where(exists, rng.uniform(0.5, 1.5, exists.shape), 0).astype(np.float32),
  }


def _pack(rng, length, segments_of_row, most_segments, vocab):
  """Rows that hold so many segments each, of 3 to length / most_segments tokens."""
  shape = (len(segments_of_row), length)
  tokens, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(3))
  loss_mask = np.zeros(shape, np.float32)
  for row, segments in enumerate(segments_of_row):
    start = 0
    for segment in range(1, segments + 1):
      end = start + rng.integers(3, length // most_segments + 1)
      tokens[row, start:end] = rng.integers(1, vocab, end - start)
      segment_ids[row, start:end] = segment
      positions[row, start:end] = np.arange(end - start)
      loss_mask[row, rng.integers(start + 1, end - 1) : end] = 1  # a prompt of one token or more
      start = end
  return {
    "tokens": tokens,
    "segment_ids": segment_ids,
    "positions": positions,
    "loss_mask": loss_mask,
  }
