"""Processes a batch in parts of its rows, one after the other: less memory, the same sums."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignjax.system import sharding
from alignjax.types import Batch


def sum_over_microbatches(f: Callable, batch: Batch, microbatches: int):
  """Sums f(part) over parts of the batch's rows."""
  if microbatches == 1:
    return f(batch)
  first, rest = split_rows(batch, microbatches)

  def add(total, part):
    return jax.tree.map(jnp.add, total, f(part | rest)), None

  zero = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(f, jax.tree.map(lambda x: x[0], first) | rest),
  )
  return jax.lax.scan(add, zero, first)[0]


def map_over_microbatches(f: Callable, batch: Batch, microbatches: int):
  """Joins f(part) over parts of the batch's rows, so that work without gradients has the same low peak of memory."""
  if microbatches == 1:
    return f(batch)
  first, rest = split_rows(batch, microbatches)
  out = jax.lax.map(lambda part: f(part | rest), first)
  # Undo split_rows: part m holds the rows m, m + M, m + 2M, ...
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), out)


def split_rows(batch: Batch, microbatches: int) -> tuple[Batch, Batch]:
  """Splits arrays [B, ...] into [M, B/M, ...]; returns them, and the scalars, which belong to every part.

  Part m takes rows m, m + M, ... So each device splits its own rows, and no data moves between devices.
  """

  def split(x):
    x = jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)
    return sharding.constrain(x, None, "batch", *(None,) * (x.ndim - 2))

  rows = {name: split(x) for name, x in batch.items() if x.ndim}
  return rows, {name: x for name, x in batch.items() if not x.ndim}
