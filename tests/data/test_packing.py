import time

import numpy as np
import pytest

from alignjax.data.packing import deal, examples_of_row, make_plan, pack_in_order


def rows_of(plan, seed, epoch):
  dealt = deal(plan, seed, epoch)
  return [examples_of_row(plan, dealt, r).tolist() for r in range(plan.rows)]


@pytest.mark.parametrize("max_examples", [1, 3, 8])
def test_every_epoch_holds_each_example_once_in_rows_that_fit(max_examples):
  lengths = np.random.default_rng(0).integers(1, 65, 500).astype(np.int32)
  plan = make_plan(lengths, 64, max_examples)
  for epoch in range(3):
    rows = rows_of(plan, 0, epoch)
    assert sorted(m for row in rows for m in row) == list(range(500))
    assert all(1 <= len(row) <= max_examples and lengths[row].sum() <= 64 for row in rows)


def test_a_deal_depends_on_seed_and_epoch_alone():
  plan = make_plan(np.random.default_rng(0).integers(1, 65, 100).astype(np.int32), 64, 8)
  assert rows_of(plan, 3, 1) == rows_of(plan, 3, 1)
  assert rows_of(plan, 3, 1) != rows_of(plan, 3, 2)
  assert rows_of(plan, 3, 1) != rows_of(plan, 4, 1)


def test_companions_change_from_epoch_to_epoch():
  plan = make_plan(np.full(64, 16, np.int32), 64, 8)
  first, second = ({tuple(sorted(row)) for row in rows_of(plan, 0, epoch)} for epoch in (0, 1))
  assert len(first & second) <= 1


def test_the_order_is_the_same_for_ever():
  """A change here breaks the resumption of every run: numbers written once, by this code."""
  plan = make_plan(np.array([5, 9, 2, 5, 3, 8, 5, 1], np.int32), 10, 4)
  assert rows_of(plan, seed=0, epoch=0) == [[1, 7], [5], [0, 6], [3, 4, 2]]
  assert rows_of(plan, seed=7, epoch=2) == [[1, 7], [6, 0], [3, 4, 2], [5]]


def test_best_fit_fills_the_fullest_row_first():
  plan = make_plan(np.array([6, 7, 3, 4], np.int32), 10, 4)
  lengths = np.array([6, 7, 3, 4])
  assert sorted(sorted(lengths[row].tolist()) for row in rows_of(plan, 0, 0)) == [[3, 7], [4, 6]]
  assert plan.padding_share == 0


def test_without_packing_an_epoch_is_a_permutation():
  plan = make_plan(np.array([3, 1, 2], np.int32), 4, 1)
  assert plan.rows == 3
  assert {tuple(m for row in rows_of(plan, seed, 0) for m in row) for seed in range(60)} == {
    (a, b, c) for a in range(3) for b in range(3) for c in range(3) if {a, b, c} == {0, 1, 2}
  }


def test_packing_in_order_keeps_the_order_and_the_limits():
  lengths = np.array([5, 5, 1, 9, 1, 1, 1, 1, 10])
  assert pack_in_order(lengths, 10, 3) == [range(2), range(2, 4), range(4, 7), range(7, 8), range(8, 9)]


@pytest.mark.slow
def test_a_million_examples_are_planned_and_dealt_in_seconds():
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(5.5, 0.7, 1_000_000), 8, 2048).astype(np.int32)
  started = time.monotonic()
  plan = make_plan(lengths, 2048, 16)
  planned = time.monotonic()
  deal(plan, 0, 0)
  assert planned - started < 5
  assert time.monotonic() - planned < 3
  assert plan.padding_share < 0.03
