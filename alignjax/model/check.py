"""Checks the assumption that every algorithm makes of a model: the texts of a row do not affect each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.errors import InputError
from alignjax.model.decoder import Model
from alignjax.system.sharding import ways
from alignjax.types import Params

_REMEDIES = {
  "finite": "states of padding are not finite; mask scores with a large finite number, not with infinity",
  "causal": "a token's state changes with a later token; let it see the columns up to its own",
  "apart": "a token's state changes with another segment; let it see its own segment id alone",
  "placed": "a text's states change with the padding before it; take its places from positions, and hide segment id 0",
}


def check(model: Model, params: Params) -> None:
  """Runs a model on a few rows of made-up texts, to find states that depend on what they must not see.

  Args:
    model: its forward is called, on the current mesh, with at least one row for each of its shards.
    params: of the model.

  Raises:
    InputError: a state is not finite, or depends on what it must not see: later tokens, other segments, padding.
  """
  rows = _rows(model.config.vocab)
  copies = -(-len(rows["tokens"]) // ways("batch")) * ways("batch")
  inputs = {name: np.resize(x, (copies, x.shape[1])) for name, x in rows.items()}
  with jax.default_matmul_precision("highest"):
    gaps, finite = jax.device_get(jax.jit(_gaps, static_argnums=0)(model.forward, params, inputs))
  tolerance = max(1e-4, 4 * float(jnp.finfo(model.config.dtype).eps))
  broken = [] if finite else ["finite"]
  broken += [law for law, gap in gaps.items() if gap > tolerance]
  if broken:
    raise InputError(f"the model cannot be trained on rows of several texts: {_REMEDIES[broken[0]]}")


def _rows(vocab: int) -> dict[str, np.ndarray]:
  """Rows of two texts of 5 tokens and padding, int32 [5, 12].

  The first has both texts as they are, the next three another first text, another second text, and another last token.
  The fifth has the second text alone, behind padding.
  """
  first, second = np.random.default_rng(0).integers(0, vocab, (2, 5))
  other_first = (first + 1) % vocab
  other_second = (second + 1) % vocab
  other_last = np.concatenate([second[:-1], other_second[-1:]])
  pairs = [(first, second), (other_first, second), (first, other_second), (first, other_last)]
  tokens = [np.concatenate([*pair, [0, 0]]) for pair in pairs] + [np.concatenate([np.zeros(7), second])]
  segments = [[1] * 5 + [2] * 5 + [0] * 2] * 4 + [[0] * 7 + [1] * 5]
  places = [[*range(5), *range(5), 0, 0]] * 4 + [[0] * 7 + [*range(5)]]
  rows = {"tokens": tokens, "segment_ids": segments, "positions": places}
  return {name: np.array(x, np.int32) for name, x in rows.items()}


def _gaps(forward: Any, params: Params, rows: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
  """Measures the gaps of states of `_rows` that should be equal, as shares of the largest; and if all are finite."""
  hidden = forward(params, rows["tokens"], rows["segment_ids"], rows["positions"])[0]
  hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
  plain, other_first, other_second, other_last, alone = hidden[:5]

  def gap(x, y):
    return jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(plain[:10]))

  gaps = {
    "causal": gap(plain[5:9], other_last[5:9]),
    "apart": jnp.maximum(gap(plain[5:10], other_first[5:10]), gap(plain[:5], other_second[:5])),
    "placed": gap(plain[5:10], alone[7:]),
  }
  return gaps, jnp.isfinite(hidden).all()
