"""The score store: found by scorer and content, absent is NaN, damage is an error, two writers do not collide."""

import multiprocessing
import sqlite3

import numpy as np
import pytest

from alignjax.data.score_store import ScoreStore
from alignjax.errors import InputError

SCORER = {"weights": "a", "ld_alpha": 1.0}


def keys(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8)


def numbers(count, width=2, seed=1):
  return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def test_what_was_written_is_read_to_the_bit_and_the_rest_is_nan(tmp_path):
  written, values = keys(5), numbers(5)
  ScoreStore(tmp_path, SCORER, 2).write(written, values)
  found = ScoreStore(tmp_path, SCORER, 2).read(np.concatenate([written[::-1], keys(3, seed=9)]))
  np.testing.assert_array_equal(found[:5], values[::-1])
  assert np.isnan(found[5:]).all()


@pytest.mark.parametrize("other", [{"weights": "b", "ld_alpha": 1.0}, {"weights": "a", "ld_alpha": 0.5}])
def test_another_scorer_finds_nothing(other, tmp_path):
  ScoreStore(tmp_path, SCORER, 2).write(keys(3), numbers(3))
  assert np.isnan(ScoreStore(tmp_path, other, 2).read(keys(3))).all()


def test_an_example_keeps_the_numbers_that_came_first(tmp_path):
  store = ScoreStore(tmp_path, SCORER, 2)
  store.write(keys(3), numbers(3))
  store.write(keys(3), numbers(3, seed=7))
  np.testing.assert_array_equal(store.read(keys(3)), numbers(3))


def test_only_finite_numbers_are_kept(tmp_path):
  store = ScoreStore(tmp_path, SCORER, 1)
  with pytest.raises(ValueError, match="finite"):
    store.write(keys(2), np.float32([[1], [np.nan]]))
  assert np.isnan(store.read(keys(2))).all()


def write_many(folder, seeds):
  store = ScoreStore(folder, SCORER, 2)
  for seed in seeds:
    store.write(keys(20, seed), numbers(20, seed=seed))


def test_processes_write_at_the_same_time(tmp_path):
  spawn = multiprocessing.get_context("spawn")
  shares = [range(30), range(15, 45)]
  writers = [spawn.Process(target=write_many, args=(tmp_path, share)) for share in shares]
  for writer in writers:
    writer.start()
  for writer in writers:
    writer.join()
    assert writer.exitcode == 0
  store = ScoreStore(tmp_path, SCORER, 2)
  for seed in range(45):
    np.testing.assert_array_equal(store.read(keys(20, seed)), numbers(20, seed=seed))


def test_a_changed_row_and_a_file_that_is_no_store_are_one_line(tmp_path):
  store = ScoreStore(tmp_path, SCORER, 2)
  store.write(keys(1), numbers(1))
  with sqlite3.connect(store.path) as connection:
    connection.execute("UPDATE scores SET numbers = ?", (bytes(8),))
  with pytest.raises(InputError, match=r"scores.sqlite: the row of example .* is damaged; delete the file"):
    store.read(keys(1))
  store.path.write_bytes(b"no database" * 100)
  with pytest.raises(InputError, match=r"scores.sqlite: cannot be used \(file is not a database\); delete it"):
    ScoreStore(tmp_path, SCORER, 2)
  with pytest.raises(InputError, match="cannot be made"):
    ScoreStore(store.path, SCORER, 2)
