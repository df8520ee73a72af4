"""A reward that fails costs the completions that it failed on, and is accounted for."""

import asyncio
import io
import itertools
import math
import os
import subprocess
import sys
import threading
import time
from decimal import Decimal

import numpy as np
import pytest

from alignjax.errors import InputError
from alignjax.rewards import Scores, require, score
from alignjax.rewards.scoring import MOST_HUNG

PROMPTS = ["one", [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}], "three"]
COMPLETIONS = ["a", "bb", "ccc"]
IDS = [[1], [1, 2], [1, 2, 3]]


def run(columns=None, time_limit_s=10.0, **rewards):
  lines = []
  scores = score(rewards, PROMPTS, COMPLETIONS, IDS, columns, time_limit_s=time_limit_s, report=lines.append)
  return scores, lines


def lengths(prompts, completions, token_ids, columns):
  return [float(len(ids)) for ids in token_ids]


async def lengths_async(prompts, completions, token_ids, columns):
  await asyncio.sleep(0)
  return lengths(prompts, completions, token_ids, columns)


class Awaited:
  async def __call__(self, *batch):
    return await lengths_async(*batch)


def test_rewards_are_columns_in_the_order_of_their_names():
  scores, lines = run(
    b=lengths, a=lambda p, c, t, columns: columns["answer"], columns={"answer": [5, None, True]}, c=Awaited()
  )
  assert scores.names == ("b", "a", "c")
  assert scores.values.dtype == np.float64
  np.testing.assert_array_equal(scores.values, [[1, 5, 1], [2, np.nan, 2], [3, 1, 3]])
  assert not scores.failures
  assert not lines


def test_numbers_of_other_libraries_are_numbers():
  returned = [np.float32(0.5), np.array(2.0), np.bool_(True)]
  assert run(a=lambda *batch: returned)[0].values.ravel().tolist() == [0.5, 2, 1]
  assert run(a=lambda *batch: np.arange(3))[0].values.ravel().tolist() == [0, 1, 2]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_that_raises_costs_only_the_completion_that_it_raises_for(is_async):
  def fragile(prompts, completions, token_ids, columns):
    if "bb" in completions:
      raise KeyError("no b")
    return lengths(prompts, completions, token_ids, columns)

  async def fragile_async(*batch):
    return fragile(*batch)

  scores, lines = run(fragile=fragile_async if is_async else fragile, fine=lengths)
  np.testing.assert_array_equal(scores.values, [[1, 1], [np.nan, 2], [3, 3]])
  (failure,) = scores.failures
  assert failure == ("fragile", 1, "two", "raised", "KeyError: 'no b'")
  assert scores.retried == {"fragile": "KeyError: 'no b'"}
  assert lines == [
    "reward fragile: 1 of 3 completions have none (1 raised); completion 1: KeyError: 'no b'; prompt 'two'"
  ]


def test_a_reward_that_raises_for_the_batch_alone_is_told():
  def batches_only_one(prompts, completions, token_ids, columns):
    if len(completions) > 1:
      raise ValueError("one at a time")
    return lengths(prompts, completions, token_ids, columns)

  scores, lines = run(a=batches_only_one)
  assert not scores.failures
  assert scores.values.ravel().tolist() == [1, 2, 3]
  assert lines == ["reward a: raised for the batch, not for single completions: ValueError: one at a time"]


@pytest.mark.parametrize(
  ("returned", "kind"),
  [
    ([1.0, math.nan, 3.0], "not finite"),
    ([1.0, math.inf, 3.0], "not finite"),
    ([1.0, "2", 3.0], "not a number"),
    ([1.0, [2.0], 3.0], "not a number"),
    ([1.0, 2j, 3.0], "not a number"),
    ([1.0, ValueError("v"), 3.0], "raised"),
    ([1.0, TimeoutError("of a server"), 3.0], "timed out"),
  ],
)
def test_an_entry_that_is_no_number_is_none_and_never_zero(returned, kind):
  scores, lines = run(a=lambda *batch: returned)
  np.testing.assert_array_equal(scores.values.ravel(), [1, np.nan, 3])
  assert [(failure.index, failure.kind) for failure in scores.failures] == [(1, kind)]
  assert len(lines) == 1


@pytest.mark.parametrize(
  "value", [1e39, -1e39, 1e16, 10**400, -(10**5000), Decimal("1e400"), np.float64(3e38)], ids=range(7)
)
def test_a_number_that_no_gradient_can_be_made_of_is_a_failure_that_names_reward_value_and_record(value):
  lines = []
  scores = score(
    {"huge": lambda *batch: [1.0, value, 2.0]},
    ["a", "b", "c"],
    ["x", "y", "z"],
    [[1], [2], [3]],
    report=lines.append,
    where=lambda index: f"prompts.jsonl:{index + 1}",
  )
  assert scores.failures[0].kind in ("too large", "not finite")
  np.testing.assert_array_equal(scores.values[:, 0], [1, np.nan, 2])
  (line,) = lines
  assert line.startswith("reward huge: 1 of 3 completions have none")
  assert "returned" in line
  assert line.endswith("prompt 'b' (prompts.jsonl:2)")


@pytest.mark.parametrize("returned", [[1.0], None, "abc", 3.0, {"a": 1}])
def test_a_wrong_number_of_entries_is_no_reward(returned):
  def wrong(prompts, completions, token_ids, columns):
    return returned if len(completions) > 1 or not isinstance(returned, list) else []

  scores, _ = run(a=wrong)
  assert np.isnan(scores.values).all()
  assert {failure.kind for failure in scores.failures} == {"wrong length"}


def test_a_reward_that_ends_its_thread_is_a_failure():
  def leaves(*batch):
    raise SystemExit(3)

  scores, _ = run(a=leaves)
  assert [failure.cause for failure in scores.failures] == ["SystemExit: 3"] * 3


ENDS = [
  asyncio.CancelledError("c"),
  KeyboardInterrupt("k"),
  GeneratorExit("g"),
  StopIteration("s"),
  SystemExit(3),
  MemoryError("m"),
]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_whatever_a_reward_raises_is_raised_and_named(error, is_async):
  def ends(prompts, completions, token_ids, columns):
    if "bb" in completions:
      raise error
    return lengths(prompts, completions, token_ids, columns)

  async def ends_async(*batch):
    await asyncio.sleep(0)
    return ends(*batch)

  scores, _ = run(ends=ends_async if is_async else ends, fine=lengths)
  np.testing.assert_array_equal(scores.values, [[1, 1], [np.nan, 2], [3, 3]])
  (failure,) = scores.failures
  assert (failure.index, failure.kind) == (1, "raised")
  assert type(error).__name__ in failure.cause


def test_an_error_of_a_task_that_a_reward_began_is_raised():
  async def leaves():
    raise KeyboardInterrupt

  async def begins(*batch):
    task = asyncio.ensure_future(leaves())
    await asyncio.sleep(0.1)
    return [await task] * 3

  scores, _ = run(begins=begins, fine=lengths)
  assert [failure.kind for failure in scores.failures] == ["raised"] * 3
  assert scores.values[:, 1].tolist() == [1, 2, 3]


def test_an_exception_whose_text_raises_is_raised():
  class Silent(Exception):
    def __str__(self):
      raise ValueError

  def silent(*batch):
    raise Silent

  scores, _ = run(silent=silent)
  assert {failure.cause for failure in scores.failures} == {"Silent: its text raises ValueError"}


@pytest.mark.parametrize("hostile", ["__float__", "__array__"])
def test_an_entry_that_raises_where_it_is_read_costs_itself(hostile):
  def raises(self, *args):
    raise RuntimeError("no")

  entry = type("Entry", (), {"__float__": raises, "__str__": raises, hostile: raises})()
  scores, _ = run(a=lambda *batch: [1.0, entry, 3.0])
  assert [(failure.index, failure.kind) for failure in scores.failures] == [(1, "not a number")]
  assert scores.values[0] == 1


def test_rewards_do_not_reach_each_other():
  """Each has copies of its own, of a second call too; the caller's stay as they are."""
  prompts = [[{"role": "user", "content": [{"text": "one"}]}] for _ in COMPLETIONS]
  ids = [list(row) for row in IDS]
  columns = {"answer": [{"a": [1]} for _ in COMPLETIONS], "tests": [["x"] for _ in COMPLETIONS]}
  seen = []
  go_on = threading.Event()

  def changes(prompts, completions, token_ids, columns):
    prompts[0][0]["content"][0]["text"] = "changed"
    prompts.clear()
    completions[0] = "changed"
    for row in token_ids:
      row.append(99)
    columns["answer"][0]["a"].append(2)
    columns["tests"][0].append("y")
    columns["new"] = []
    go_on.set()
    raise ValueError

  def sees(*batch):
    go_on.wait(10)
    seen.append(batch)
    return [0.0] * 3

  score({"a": changes, "b": sees, "c": changes}, prompts, COMPLETIONS, ids, columns, report=lambda line: None)
  wanted = (prompts, COMPLETIONS, IDS, columns)
  assert seen == [wanted]
  assert prompts[0][0]["content"][0]["text"] == "one"
  assert columns == {"answer": [{"a": [1]}] * 3, "tests": [["x"]] * 3}
  assert ids == IDS


def test_a_reward_is_asked_again_with_what_it_was_given_first():
  def changes_and_raises(prompts, completions, token_ids, columns):
    texts = list(completions)
    completions[:] = ["changed"] * len(completions)
    columns["answer"][0].append(1)
    if len(texts) > 1:
      raise ValueError
    return [float(len(texts[0]) + len(columns["answer"][0]))]

  scores, _ = run(a=changes_and_raises, columns={"answer": [[], [], []]})
  assert scores.values.ravel().tolist() == [2, 3, 4]


def test_what_a_reward_changes_of_the_process_is_put_back(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("KEPT", "1")
  (tmp_path / "elsewhere").mkdir()
  limit, output = sys.getrecursionlimit(), sys.stdout

  def changes(*batch):
    os.chdir("elsewhere")
    os.environ["NEW"] = "1"
    del os.environ["KEPT"]
    sys.setrecursionlimit(limit + 1)
    sys.stdout = io.StringIO()
    return [0.0] * 3

  _, lines = run(changes=changes)
  assert os.getcwd() == str(tmp_path)
  assert (os.environ.get("NEW"), os.environ["KEPT"]) == (None, "1")
  assert sys.getrecursionlimit() == limit
  assert sys.stdout is output
  assert lines == [
    "reward changes: changed the working directory, the environment, the recursion limit, stdout of the process, "
    "which is put back; wrap it in alignjax.rewards.isolated"
  ]
  assert run(fine=lengths)[1] == []


@pytest.mark.parametrize("how", ["sys.stdout.close()", "os.close(1)", "os.close(1); kept.append(open(os.devnull))"])
def test_a_reward_that_closes_stdout_does_not_end_the_run(how):
  program = (
    "import os, sys\nfrom alignjax.rewards import score\nkept = []\n"
    f"def closes(*batch):\n  {how}\n  raise ValueError\n"
    "print(score({'closes': closes}, ['p'], ['c'], [[]]).failures[0].kind, 'is said', flush=True)"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert "raised is said" in done.stdout
  assert "changed stdout of the process" in done.stdout


def test_a_reward_without_an_end_or_an_order_is_a_wrong_number():
  scores, _ = run(endless=lambda *batch: itertools.repeat(1.0), set=lambda *batch: {1.0, 2.0, 3.0})
  assert {failure.kind for failure in scores.failures} == {"wrong length"}
  assert len(scores.failures) == 6


def test_what_hangs_is_cut_off_and_the_others_are_kept():
  release = threading.Event()

  def hangs(*batch):
    release.wait(20)
    return [0.0, 0.0, 0.0]

  cancelled = []

  async def hangs_async(*batch):
    try:
      await asyncio.sleep(20)
    except asyncio.CancelledError:
      cancelled.append(True)
      raise

  began = time.monotonic()
  scores, lines = run(hangs=hangs, hangs_async=hangs_async, fine=lengths, time_limit_s=0.5)
  assert time.monotonic() - began < 5
  release.set()
  np.testing.assert_array_equal(scores.values, [[np.nan, np.nan, 1], [np.nan, np.nan, 2], [np.nan, np.nan, 3]])
  assert {failure.kind for failure in scores.failures} == {"timed out"}
  assert "no answer within 0.5 s" in lines[0]
  assert scores.seconds["hangs"] >= 0.5
  for _ in range(50):
    if cancelled:
      break
    time.sleep(0.05)
  assert cancelled


def test_what_was_answered_before_the_limit_is_kept():
  release = threading.Event()

  def one_hangs(prompts, completions, token_ids, columns):
    if len(completions) > 1:
      raise ValueError("one at a time")
    if completions == ["ccc"]:
      release.wait(20)
    return [1.0]

  scores, _ = run(a=one_hangs, time_limit_s=0.5)
  release.set()
  np.testing.assert_array_equal(scores.values.ravel(), [1, 1, np.nan])


def test_a_reward_that_hangs_again_and_again_stops_the_run():
  release = threading.Event()

  def hangs(*batch):
    release.wait(20)

  try:
    for _ in range(MOST_HUNG):
      run(stuck=hangs, time_limit_s=0.01)
    with pytest.raises(InputError, match=f"reward stuck: {MOST_HUNG} of its calls still run .*isolated"):
      run(stuck=hangs, time_limit_s=0.01)
  finally:
    release.set()


def test_async_rewards_wait_together():
  met = threading.Barrier(2)

  def waits(*batch):
    met.wait(10)
    return [0.0] * 3

  async def waits_async(*batch):
    await asyncio.to_thread(met.wait, 10)
    return [0.0] * 3

  assert not run(a=waits, b=waits_async)[0].failures


def test_judge_works_inside_a_running_loop():
  async def notebook():
    return run(a=lengths_async)[0]

  assert asyncio.run(notebook()).values.ravel().tolist() == [1, 2, 3]


def test_a_reward_may_change_its_own_lists():
  def greedy(prompts, completions, token_ids, columns):
    for entries in (prompts, completions, token_ids, columns["x"]):
      entries.clear()
    return [0.0] * 3

  for _ in range(3):
    scores, _ = run(greedy=greedy, a=lengths, columns={"x": [1, 2, 3]})
    assert scores.values[:, 1].tolist() == [1, 2, 3]


def test_lists_of_different_lengths_are_refused():
  with pytest.raises(ValueError, match=r"\[2, 3\] entries"):
    run(a=lengths, columns={"answer": [1, 2]})


def test_nothing_is_judged_without_rewards_or_without_completions():
  assert run()[0].values.shape == (3, 0)
  scores = score({"a": lengths}, [], [], [])
  assert scores.values.shape == (0, 1)
  assert scores.total({"a": 1.0}).shape == (0,)


def test_totals_leave_out_what_does_not_apply_and_are_unknown_where_something_failed():
  scores, _ = run(
    a=lambda *batch: [1.0, None, None],
    b=lambda *batch: [10.0, 20.0, None],
    monitor=lambda *batch: [math.nan, 1.0, 1.0],
  )
  np.testing.assert_array_equal(scores.total({"a": 1.0, "b": 0.5, "monitor": 0.0}), [6, 10, np.nan])
  np.testing.assert_array_equal(scores.total({"a": 1.0, "b": 0.5, "monitor": 1.0}), [np.nan, 11, 1])
  np.testing.assert_array_equal(scores.total({"a": 0.0, "b": 0.0, "monitor": 0.0}), [np.nan] * 3)


def test_metrics_count_what_is_missing_and_what_failed():
  metrics = Scores(("a",), np.array([[1.0], [3.0], [np.nan], [np.nan]])).metrics()
  assert metrics == {"rewards/a/mean": 2, "rewards/a/std": 1, "rewards/a/none": 0.5, "rewards/a/failed": 0}
  metrics = run(a=lambda *batch: [None, math.nan, math.nan])[0].metrics()
  assert math.isnan(metrics["rewards/a/mean"])
  assert metrics["rewards/a/failed"] == pytest.approx(2 / 3)


def test_a_column_that_is_missing_is_found_before_the_run():
  def reads(*batch):
    return [0.0] * 3

  reads.needs = ("answer",)
  require({"a": reads, "b": lengths}, ["question", "answer"])
  with pytest.raises(InputError, match="reward a needs the field 'answer' in the prompts' records; they have question"):
    require({"a": reads}, ["question"])
