"""What a constant tree says of an example, computed once and kept on disk: with all of it there, no run loads the tree.

Before the loop the store is asked for every example of every data set. Whatever it lacks is scored in one pass, by all
devices, in the rows that an evaluation takes, and stored batch by batch: a pass that was killed goes on where it was.
What is read again afterwards is what the run trains on, then and after every resume. In the loop the numbers are a
column of the host's batch, found by example.

A number is found by the content of its example (tokens and mask) and by its scorer: the weights' digest, the model's
config, the platform and its matmul precision, and the column's own settings. Another token, weight, chat template,
dtype or ld_alpha is another key; order, packing, seed, mesh, loss and beta are none.

With several hosts, process 0 alone opens the store and tells the others what it holds: no disk need be shared.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignjax.algorithms import Algorithm
from alignjax.algorithms.algorithm import Column
from alignjax.data.loader import Dataset
from alignjax.data.score_store import ScoreStore
from alignjax.data.stream import NumpyBatch
from alignjax.errors import InputError
from alignjax.model.decoder import Model
from alignjax.system import sharding
from alignjax.types import Params

_EVERY = 10.0  # seconds between lines of progress
_NO_NUMBERS = ("remat", "head")  # fields of a model's config that its log-probabilities do not depend on


class Columns:
  """Adds columns to the batches of a data set: what is known of their examples.

  Args:
    tables: by name, float32 [M, ...] in the order of the data set's examples; {} leaves its batches as they are.
  """

  def __init__(self, tables: Mapping[str, np.ndarray]):
    self.tables = dict(tables)

  def __call__(self, batch: NumpyBatch) -> NumpyBatch:
    """The batch with a column [B, P, ...] for each table; 0 where there is no example."""
    ids = batch["example_ids"]
    held = ids >= 0
    columns = {}
    for name, table in self.tables.items():
      columns[name] = np.zeros((*ids.shape, *table.shape[1:]), table.dtype)
      columns[name][held] = table[ids[held]]
    return batch | columns


def check(folder: str, algorithm: Algorithm) -> None:
  """Raises InputError where a cache is asked for, but no number of the algorithm stays the same."""
  if not folder or algorithm.columns:
    return
  if "reference" in algorithm.synced:
    why = "its reference moves"
  elif algorithm.constant:
    why = f"it takes more from its {algorithm.constant[0]} than one number for each completion of a record"
  else:
    why = "it scores nothing with a constant reference"
  raise InputError(f"run.reference_cache={folder}: nothing to keep for this loss, {why}; leave it empty")


def open_columns(
  folder: str,
  algorithm: Algorithm,
  model: Model,
  datasets: Sequence[Dataset | None],
  mesh: jax.sharding.Mesh,
  digests: Mapping[str, str],
  load: Callable[[str], Params],
) -> list[Columns | None]:
  """The columns of each data set (None where there is none), after what is missing has been scored.

  Args:
    folder: of the store; "" keeps nothing, and every batch stays as it is.
    algorithm, model: of the run.
    datasets: of the run.
    mesh: the current one.
    digests: of the constant trees, by name.
    load: name -> that tree; called only if there is something to score.

  Raises:
    InputError: the store can not be used, or a score is not finite.
  """
  tables: list[dict[str, np.ndarray]] = [{} for _ in datasets]
  for name, column in algorithm.columns.items() if folder else ():
    scorer = _scorer(name, column, model, digests)
    for dataset, found in zip(datasets, tables, strict=True):
      if dataset is not None:
        found[name] = _table(folder, scorer, column, dataset, mesh, load)
  return [dataset and Columns(found) for dataset, found in zip(datasets, tables, strict=True)]


def _scorer(name: str, column: Column, model: Model, digests: Mapping[str, str]) -> dict[str, Any]:
  """All that decides a column but the example."""
  fields = dataclasses.asdict(model.config)
  return {
    "version": 1,
    "column": name,
    "shape": list(column.shape),
    "weights": digests[column.tree],
    "model": {key: value for key, value in fields.items() if key not in _NO_NUMBERS},
    "temperature": 1.0,
    # float32 matmuls are not the same numbers everywhere.
    "platform": jax.devices()[0].platform,
    "matmul_precision": jax.config.jax_default_matmul_precision,
    "settings": dict(column.settings),
  }


def _table(folder, scorer, column, dataset, mesh, load) -> np.ndarray:
  """The column of every example, [M, *shape]."""
  width = math.prod(column.shape)
  store = ScoreStore(folder, scorer, width) if jax.process_index() == 0 else None
  read = lambda: store.read(dataset.content) if store else np.zeros((len(dataset), width), np.float32)
  shared = lambda table: multihost_utils.broadcast_one_to_all(table) if jax.process_count() > 1 else table
  table = np.asarray(shared(read()))
  missing = int(np.isnan(table).any(axis=1).sum())
  if missing:
    _fill(store, table, column, dataset, mesh, load(column.tree))
    table = np.asarray(shared(read()))  # not as computed: of two processes that scored the same, one was first
  if np.isnan(table).any():
    raise InputError(f"{folder}: examples that were just scored are not there; is something deleting the store?")
  if jax.process_index() == 0:
    print(f"reference cache {folder}: {len(table):,} examples, {missing:,} of them scored now", flush=True)
  return table.reshape(len(table), *column.shape)


def _fill(store, table, column, dataset, mesh, params) -> None:
  """Scores the batches in which `table` [M, width] lacks an example, and stores them.

  Batches are those of the whole data set, not of what is missing: the rows that an example meets do not depend on
  where an earlier pass was killed.
  """
  score = jax.jit(column.score)
  started = reported = time.monotonic()
  done = 0
  for batch in dataset.epoch(0, *sharding.host_share(mesh)):
    batch = sharding.to_mesh(batch, mesh)
    ids = np.asarray(multihost_utils.process_allgather(batch["example_ids"], tiled=True))
    held = ids >= 0
    places = ids[held]
    if not np.isnan(table[places]).any():
      continue
    values = multihost_utils.process_allgather(score(params, batch), tiled=True)
    values = np.asarray(values).reshape(*ids.shape, -1)[held]
    for place in places[~np.isfinite(values).all(axis=1)]:
      where = dataset.where(int(dataset.examples.records[place]))
      raise InputError(
        f"{where}: the reference gives it no finite log-probability; look at run.init, or at this record"
      )
    if store:
      store.write(dataset.content[places], values)
    done += len(places)
    if time.monotonic() - reported > _EVERY and jax.process_index() == 0:
      reported = time.monotonic()
      speed = done / (reported - started)
      print(f"reference cache: {done:,} examples scored, {speed:,.0f} a second", flush=True)
