"""Caches the scores of a constant tree, such as the reference's log-probabilities; a complete cache replaces the tree.

Before training, the store is read for every example of every data set. Missing scores are computed in one pass, by all
devices, in the rows of an evaluation, and stored batch by batch: a pass that was killed continues where it was. Then
the store is read again, so that the run trains on the stored numbers, now and after every resume. In training, the
scores are a column of the host's batch, looked up by example.

The key of a score is the content of its example (tokens and mask) and its scorer: the weights' digest, the model's
config, the platform and its matmul precision, and the column's own settings. Another token, weight, chat template,
dtype or ld_alpha is another key; order, packing, seed, mesh, loss and beta are not part of it.

With several hosts, process 0 alone opens the store and sends its content to the others: no disk need be shared.
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
_IRRELEVANT = ("remat", "head")  # fields of a model's config that its log-probabilities do not depend on


class Columns:
  """Adds columns of stored scores to the batches of a data set.

  Args:
    tables: by name, float32 [M, ...] in the order of the data set's examples; {} leaves its batches as they are.
  """

  def __init__(self, tables: Mapping[str, np.ndarray]):
    self.tables = dict(tables)

  def __call__(self, batch: NumpyBatch) -> NumpyBatch:
    """Returns the batch with a column [B, P, ...] for each table; 0 where there is no example."""
    ids = batch["example_ids"]
    is_example = ids >= 0
    columns = {}
    for name, table in self.tables.items():
      columns[name] = np.zeros((*ids.shape, *table.shape[1:]), table.dtype)
      columns[name][is_example] = table[ids[is_example]]
    return batch | columns


def check(folder: str, algorithm: Algorithm) -> None:
  """Raises InputError if a cache is asked for, but the algorithm has no score that stays constant.

  Args:
    folder: of the cache; "": none is asked for.
    algorithm: of the run.
  """
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
) -> list[Columns]:
  """Returns the columns of each data set (none for a data set that is None), after scoring the missing examples.

  Args:
    folder: of the store; "" keeps nothing, and every batch stays as it is.
    algorithm, model: of the run.
    datasets: of the run.
    mesh: the current one.
    digests: of the constant trees, by name.
    load: name -> that tree; called only if examples are missing.

  Raises:
    InputError: the store cannot be used, or a score is not finite.
  """
  tables: list[dict[str, np.ndarray]] = [{} for _ in datasets]
  columns: Mapping[str, Column] = {}
  if folder:
    columns = algorithm.columns
  for name, column in columns.items():
    scorer = _scorer(name, column, model, digests)
    for dataset, tables_of_dataset in zip(datasets, tables, strict=True):
      if dataset is not None:
        tables_of_dataset[name] = _table(folder, scorer, column, dataset, mesh, load)
  return [Columns(by_name) for by_name in tables]


def _scorer(name: str, column: Column, model: Model, digests: Mapping[str, str]) -> dict[str, Any]:
  """Returns the part of a score's key that does not depend on the example."""
  fields = dataclasses.asdict(model.config)
  return {
    "version": 1,
    "column": name,
    "shape": list(column.shape),
    "weights": digests[column.tree],
    "model": {key: value for key, value in fields.items() if key not in _IRRELEVANT},
    "temperature": 1.0,
    # float32 matmuls give other numbers on other platforms.
    "platform": jax.devices()[0].platform,
    "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]  # declared when JAX is imported
    "settings": dict(column.settings),
  }


def _table(folder, scorer, column, dataset, mesh, load) -> np.ndarray:
  """Returns the column of every example, [M, *shape]."""
  width = math.prod(column.shape)
  store = None
  if jax.process_index() == 0:
    store = ScoreStore(folder, scorer, width)
  table = _stored(store, dataset, width)
  missing = int(np.isnan(table).any(axis=1).sum())
  if missing:
    _fill(store, table, column, dataset, mesh, load(column.tree))
    # Not as computed: if two processes scored the same examples, the store has the numbers of the first.
    table = _stored(store, dataset, width)
  if np.isnan(table).any():
    raise InputError(f"{folder}: examples that were just scored are not there; is something deleting the store?")
  if jax.process_index() == 0:
    print(f"reference cache {folder}: {len(table):,} examples, {missing:,} of them scored now", flush=True)
  return table.reshape(len(table), *column.shape)


def _stored(store: ScoreStore | None, dataset: Dataset, width: int) -> np.ndarray:
  """Returns the stored scores of every example on every process, float32 [M, width]; NaN for a missing one."""
  table = np.zeros((len(dataset), width), np.float32)
  if store:
    table = store.read(dataset.content)
  if jax.process_count() > 1:
    table = multihost_utils.broadcast_one_to_all(table)
  return np.asarray(table)


def _fill(store, table, column, dataset, mesh, params) -> None:
  """Scores the batches in which `table` [M, width] lacks an example, and stores them.

  The batches are those of the whole data set, not of the missing examples: which rows share an example's batch does not
  depend on when an earlier pass was killed.
  """
  score = jax.jit(column.score)
  started = reported = time.monotonic()
  done = 0
  for batch in dataset.epoch(0, *sharding.host_share(mesh)):
    rows = sharding.to_mesh(batch, mesh).rows
    ids = np.asarray(multihost_utils.process_allgather(rows["example_ids"], tiled=True))
    is_example = ids >= 0
    places = ids[is_example]
    if not np.isnan(table[places]).any():
      continue
    values = multihost_utils.process_allgather(score(params, rows), tiled=True)
    values = np.asarray(values).reshape(*ids.shape, -1)[is_example]
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
