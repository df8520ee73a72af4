"""Processes a batch in parts of its rows, one after the other: less memory, the same sums."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignjax.system import sharding
from alignjax.types import Batch, Rows


def sum_over_microbatches(f: Callable, batch: Batch, microbatches: int):
  """Sums f(part) over parts of the batch's rows; every part has the totals of the whole batch."""
  if microbatches == 1:
    return f(batch)
  parts = split_rows(batch.rows, microbatches)

  def of_part(rows):
    return f(batch.replace(rows=rows))

  def add(total, rows):
    return jax.tree.map(jnp.add, total, of_part(rows)), None

  first = jax.tree.map(lambda x: x[0], parts)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, first))
  return jax.lax.scan(add, zero, parts)[0]


def map_over_microbatches(f: Callable, rows: Rows, microbatches: int):
  """Joins f(part) over parts of the rows, so that work without gradients has the same low peak of memory."""
  if microbatches == 1:
    return f(rows)
  out = jax.lax.map(f, split_rows(rows, microbatches))
  # Undo split_rows: part m holds the rows m, m + M, m + 2M, ...
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), out)


def split_rows(rows: Rows, microbatches: int) -> Rows:
  """Splits arrays [B, ...] into [M, B/M, ...].

  Part m takes rows m, m + M, ... So each device splits its own rows, and no data moves between devices.
  """

  def split(x):
    x = jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)
    return sharding.constrain(x, None, "batch", *(None,) * (x.ndim - 2))

  return jax.tree.map(split, rows)
