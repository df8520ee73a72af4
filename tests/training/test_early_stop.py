"""A run that ends when its held-out signal no longer improves, and gives its best step."""

import contextlib
import functools
import re
from unittest import mock

import pytest

from alignjax import train
from alignjax.errors import InputError
from alignjax.runs import run
from alignjax.runs.build import make_model
from alignjax.runs.checkpoint import Checkpointer, load_params
from alignjax.runs.initial_params import starting_params
from alignjax.system.fingerprint import fingerprint
from alignjax.train import fit
from alignjax.training import early_stop, metrics
from tests import smoke

LOSS = early_stop.Metric("eval/loss", "min")


def watched(values, patience=2, metric=LOSS):
  """The watch after evaluations at steps 1, 2, ..., none after the one that ends the run."""
  watch = early_stop.Watch(metric, patience)
  for step, value in enumerate(values, 1):
    watch = watch.after(step, {metric.name: value})
    if watch.over:
      break
  return watch, step


@pytest.mark.parametrize(
  ("values", "best", "step", "end"),
  [
    ([3, 2, 1], 1, 3, 3),
    ([3, 2, 2.5, 2.4, 0], 2, 2, 4),
    ([3, 4, 2, 4, 4], 2, 3, 5),
    ([2, 2, 2, 0], 2, 3, 3),  # an equal value is no improvement, but the newest of the best
    ([2, float("nan"), float("inf"), 0], 2, 1, 3),
  ],
)
def test_a_run_ends_after_so_many_evaluations_without_a_better_one(values, best, step, end):
  for sign, mode in ((1, "min"), (-1, "max")):
    watch, ended = watched([sign * value for value in values], metric=early_stop.Metric("eval/x", mode))
    assert (watch.best, watch.step, ended) == (sign * best, step, end)


def test_steps_without_a_signal_end_a_run_that_never_learned_or_has_no_score():
  signal = lambda *silent: functools.reduce(early_stop.Signal.after, silent, early_stop.Signal())
  ends = lambda s: (s.lost(2), s.lost(2, scored=False))
  assert ends(signal(True)) == (False, False)
  assert ends(signal(True, True)) == (True, True)
  assert ends(signal(False, True, True)) == (False, True)
  assert ends(signal(True, True, False)) == (False, False)
  late = signal(False, True, True)
  assert [late.moved(steps) for steps in (1, 2, 3)] == [False, False, True]
  assert early_stop.Signal.recall(late.metadata()) == late
  assert early_stop.Signal.recall({}) == early_stop.Signal(0, True)


def test_nothing_finite_has_no_best():
  watch, ended = watched([float("nan")] * 3)
  assert (watch.best, ended, watch.over) == (None, 2, True)
  assert "result" not in watch.metadata(ended=True)


def test_an_evaluation_that_lacks_the_metric_is_no_improvement():
  watch, _ = watched([3])
  assert watch.after(2, {"eval/other": 1.0}) == watch._replace(waited=1)


def test_a_watch_is_recalled_as_it_was_but_not_for_another_metric():
  watch, _ = watched([3, 2.25, 2.5])
  fresh = early_stop.Watch(LOSS, 2)
  saved = watch.metadata(ended=False)
  assert fresh.recall(saved["watch"]) == watch
  assert fresh.recall(None) == fresh
  other = fresh._replace(metric=early_stop.Metric("eval/x", "min"))
  assert other.recall(saved["watch"]) == other


# --- runs ------------------------------------------------------------------------------------------------------------

SETTINGS = dict(
  run__steps=12, run__eval_every=2, run__save_every=3, run__keep_latest=1, run__early_stop="eval/loss:min"
)
CURVE = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 9.0, 12: 1.0}  # the loss that each evaluation is made to find


def config(**overrides):
  return smoke.config("sft", **(SETTINGS | dict(run__early_stop="eval/loss:min", run__patience=2) | overrides))


@contextlib.contextmanager
def curve():
  """Evaluations find the losses of `CURVE`, by the state's step."""
  original = train.make_mean_metrics

  def make(score):
    means = original(score)
    return lambda *args: means(*args) | {"loss": CURVE.get(steps[-1], 0.0)}

  steps, fetch = [0], metrics.Progress.update

  def update(self, step, *rest):
    steps.append(step)
    return fetch(self, step, *rest)

  with mock.patch.object(train, "make_mean_metrics", make), mock.patch.object(metrics.Progress, "update", update):
    yield


@pytest.fixture(autouse=True)
def curved():
  with curve():
    yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The directory of an undisturbed run that ends early, and what it gave."""
  workdir = tmp_path_factory.mktemp("early") / "run"
  with curve():
    return workdir, fit(config(), workdir)


def test_a_run_ends_early_and_gives_its_best_step(whole):
  workdir, found = whole
  assert (found.step, found.stopped) == (4, False)
  assert found.metrics["eval/loss"] == 3.0
  rows = metrics.read(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows if "eval/loss" in row] == [2, 4, 6, 8]
  assert max(row["step"] for row in rows) == 8
  with contextlib.closing(Checkpointer(workdir / "checkpoints", save_every=1)) as saved:
    assert saved.steps == [4, 8]
  loaded = run.load(workdir)
  assert loaded.step == 4
  assert fingerprint(loaded.params) == fingerprint(found.params)
  last, _ = load_params(workdir / "checkpoints", loaded.model.abstract(loaded.mesh), step=8)
  assert fingerprint(last) != fingerprint(found.params)
  assert run.load(workdir, step=8).step == 8


def test_the_same_command_finds_it_complete(whole, tmp_path):
  done, first = whole
  workdir = smoke.copy(done, tmp_path / "run")
  again = fit(config(), workdir)
  assert (again.step, again.stopped) == (4, False)
  assert fingerprint(again.params) == fingerprint(first.params)
  assert {k: v for k, v in first.metrics.items() if k.startswith("eval/")} == again.metrics
  assert smoke.lines(workdir) == smoke.lines(done)


@pytest.mark.parametrize("step", [3, 7])  # before the best is found, and while it waits
@pytest.mark.long
def test_a_killed_run_ends_where_it_would_have(step, whole, tmp_path):
  expected, first = whole
  smoke.interrupt(config(), tmp_path / "run", step)
  found = fit(config(), tmp_path / "run")
  assert (found.step, found.metrics) == (first.step, first.metrics)
  assert smoke.lines(tmp_path / "run") == smoke.lines(expected)
  for kept in (4, 8):
    assert smoke.arrays(tmp_path / "run", kept) == smoke.arrays(expected, kept)
  assert fingerprint(found.params) == fingerprint(first.params)


@pytest.mark.long
def test_more_patience_goes_on_from_where_it_ended(whole, tmp_path):
  workdir = smoke.copy(whole[0], tmp_path / "run")
  found = fit(config(run__patience=4), workdir)
  assert (found.step, found.metrics["eval/loss"]) == (12, 1.0)
  fit(config(run__patience=4), tmp_path / "undisturbed")
  assert smoke.lines(workdir) == smoke.lines(tmp_path / "undisturbed")
  assert smoke.arrays(workdir, 12) == smoke.arrays(tmp_path / "undisturbed", 12)


@pytest.mark.long
def test_a_run_that_comes_to_its_last_step_gives_its_best_too(tmp_path):
  found = fit(config(run__steps=6), tmp_path / "run")
  assert (found.step, run.load(tmp_path / "run").step) == (4, 4)


def test_another_run_starts_from_the_best_step(whole):
  workdir, found = whole
  other = smoke.config("reward", run__init=str(workdir))
  model = make_model(other, found.tokenizer)
  begun, step = starting_params(other, model, found.tokenizer, model.abstract(found.mesh))
  assert step == 4
  assert fingerprint(begun["embed"]) == fingerprint(found.params["embed"])


@pytest.mark.long
def test_an_online_run_watches_a_reward(tmp_path):
  settings = SETTINGS | dict(run__early_stop="eval/rewards/regex:max", run__steps=2, run__eval_every=1)
  found = fit(smoke.config("grpo", **settings, run__patience=1), tmp_path / "run")
  values = [row["eval/rewards/regex"] for row in metrics.read(tmp_path / "run/metrics.jsonl") if "eval/loss" in row]
  assert found.metrics["eval/rewards/regex"] == max(values)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (dict(run__early_stop="eval/loss"), "run.early_stop='eval/loss': write METRIC:min or METRIC:max"),
    (dict(run__eval_every=0), "set run.eval_every"),
    (dict(data__eval="", data__holdout=0.0), "data.eval or data.holdout"),
    (dict(run__keep_best="eval/accuracy:max"), "leave run.keep_best empty"),
    (dict(run__early_stop="eval/gold:max", run__keep_best=""), "evaluations have no eval/gold; they have eval/"),
    (
      dict(run__early_stop="", run__keep_best="eval/lss:min"),
      "run.keep_best=eval/lss:min: evaluations have no",
    ),
    (dict(run__patience=0), "run.patience=0: must be at least 1"),
  ],
)
def test_what_can_not_be_watched_is_refused(overrides, message, tmp_path):
  with pytest.raises(InputError, match=re.escape(message)):
    fit(config(**overrides), tmp_path / "run")


def test_a_metric_that_some_batches_lack_is_looked_for_in_all():
  asked = []

  def evaluate(most):
    asked.append(most)
    return {"eval/loss": 1.0} if most else {"eval/loss": 1.0, "eval/rewards/rejected": 0.0}

  early_stop.check("run.keep_best", early_stop.Metric("eval/loss", "min"), evaluate)
  assert asked == [1]
  early_stop.check("run.keep_best", early_stop.Metric("eval/rewards/rejected", "min"), evaluate)
  with pytest.raises(InputError, match=r"have no eval/lss; .*; the nearest is eval/loss$"):
    early_stop.check("run.keep_best", early_stop.Metric("eval/lss", "min"), evaluate)
