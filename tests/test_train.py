"""A run is a function of its config: killed, stopped or moved to other devices, it ends as it would have."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest

from alignjax import train
from alignjax.algorithms.unpaired import RUNNING
from alignjax.data import read_texts, train_tokenizer
from alignjax.data.loader import Dataset
from alignjax.errors import InputError
from alignjax.evaluation.held_out import evaluate
from alignjax.runs.build import make_model
from alignjax.runs.checkpoint import load_items
from alignjax.runs.frozen_params import load_reference, save_reference
from alignjax.runs.initial_params import starting_params
from alignjax.system.fingerprint import fingerprint
from alignjax.system.preemption import Preemption
from alignjax.train import fit
from alignjax.training import metrics
from alignjax.training.problem import not_finite
from benchmarks import kill_resume
from tests import smoke, struck

# After a failed read Orbax leaves coroutines behind that nobody awaits.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def batches(monkeypatch):
  """Record ids [B, P] of the batches that a run takes from now on, by step."""
  taken, original = {}, Dataset.batches

  def recorded(self, step, *share):
    with contextlib.closing(original(self, step, *share)) as found:
      for number, batch in enumerate(found, step + 1):
        taken[number] = batch["record_ids"].tolist()
        yield batch

  monkeypatch.setattr(Dataset, "batches", recorded)
  return taken


def assert_same_end(workdir, expected):
  """Parameters, optimizer state, counters and key to the bit, and the metrics to the byte."""
  assert smoke.arrays(workdir) == smoke.arrays(expected)
  assert smoke.lines(workdir) == smoke.lines(expected)


# Before the first checkpoint (the reference is there), between two, and after the second.
@pytest.mark.parametrize(("name", "step"), [("dpo", 1), ("reward", 3), ("sft", 5)])
def test_killed_run_continues_to_the_same_end(name, step, tmp_path):
  workdir = smoke.copy(smoke.interrupted(name, step), tmp_path / "run")
  expected, whole = smoke.finished(name)
  run = fit(smoke.config(name), workdir)
  assert (run.step, run.stopped) == (smoke.STEPS, False)
  assert_same_end(workdir, expected)
  assert fingerprint(run.params) == fingerprint(whole.params)
  assert run.metrics == whole.metrics


# Place inside an iteration, and its how-manieth time in a process: before the first checkpoint, after it, and in the
# second save. Each life goes on from where the last one ended.
LIVES = (("rollout", 1), ("reward", 2), ("update", 3), ("prepare", 1), ("save", 1))


@pytest.mark.parametrize("name", ["ppo"])
@pytest.mark.slow
def test_online_run_killed_inside_iterations_continues_to_the_same_end(name, tmp_path):
  def blow():
    raise smoke.Killed

  for place, number in LIVES:
    with struck.struck(place, number, blow), pytest.raises(smoke.Killed):
      fit(smoke.config(name), tmp_path)
  run = fit(smoke.config(name), tmp_path)
  assert run.metrics == smoke.finished(name)[1].metrics
  assert_same_end(tmp_path, smoke.finished(name)[0])


@pytest.mark.parametrize(
  "name", [pytest.param("ppo", marks=pytest.mark.long), pytest.param("online_dpo", marks=pytest.mark.long)]
)
def test_online_process_killed_9_inside_iterations_continues_to_the_same_end(name, tmp_path):
  for place, number in LIVES:
    command = [sys.executable, "-m", "tests.struck", place, str(number), *smoke.arguments(name, tmp_path)]
    done = subprocess.run(command, cwd=smoke.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
  fit(smoke.config(name), tmp_path)
  assert_same_end(tmp_path, smoke.finished(name)[0])


# What a run carries beside parameters and moments: a reference that follows the policy, running statistics, or nothing;
# and a loss whose pairs meet in the batch, for which `prepare` needs the policy.
CARRIED = {
  "synced": {"algorithm__reference": "sync", "algorithm__sync_every": 2},
  "coupled": {"algorithm__loss": "aot_unpaired"},
  "free": {"algorithm__loss": "simpo"},
  "factors": {"lora__rank": 4, "run__init": ""},
  "running": {"algorithm__name": "unpaired", "algorithm__loss": "bco"},
}


REPEATS = ("coupled", "free")  # they carry nothing that the others do not


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.long if name in REPEATS else ()) for name in CARRIED])
def carried(request):
  """The config of a run that carries something of its own."""
  return request.param, smoke.config("dpo", **CARRIED[request.param])


@pytest.mark.slow
def test_killed_run_keeps_what_it_carries(carried, tmp_path):
  name, config = carried
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  end = fit(config, whole)
  smoke.interrupt(config, killed, 5)
  assert fit(config, killed).metrics == end.metrics
  assert_same_end(killed, whole)
  assert (whole / "reference").exists() == (name in ("coupled", "running"))
  evaluated = evaluate(whole)
  assert {key: evaluated[key.removeprefix("eval/")] for key in end.metrics if key.startswith("eval/")} == pytest.approx(
    {key: value for key, value in end.metrics.items() if key.startswith("eval/")}, rel=1e-5, abs=1e-6
  )
  rows = [row for row in metrics.read(whole / "metrics.jsonl") if "loss" in row]
  if name == "running":
    saved = load_items(whole / "checkpoints", {"running": dict.fromkeys(RUNNING, jax.ShapeDtypeStruct((), np.float32))})
    trained = sum(row["share/chosen"] + row["share/rejected"] for row in rows)
    assert saved["running"]["ratio_count"] >= 8 * trained  # examples, of 8 rows a step; an evaluation adds none
    assert rows[-1]["delta"] == pytest.approx(0.1 * float(saved["running"]["mean_ratio"]), rel=1e-5)
    assert len({row["delta"] for row in rows}) == smoke.STEPS
  if name == "synced":  # the reference is the policy's own start until it moves after steps 2, 4 and 6
    saved = load_items(whole / "checkpoints", {"synced": {"reference": end.model.abstract(end.mesh)}})
    step4 = load_items(whole / "checkpoints", {"synced": {"reference": end.model.abstract(end.mesh)}}, step=4)
    expected = jax.tree.map(lambda p, r: 0.6 * p + 0.4 * r, end.params, step4["synced"]["reference"])
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), saved["synced"]["reference"], expected
    )


def test_complete_run_is_not_trained_again(tmp_path, batches):
  done, whole = smoke.finished("dpo")
  batches.clear()  # of that run, if no test had asked for it before
  workdir = smoke.copy(done, tmp_path / "run")
  run = fit(smoke.config("dpo"), workdir)
  assert not set(batches) & set(range(1, smoke.STEPS + 1))
  assert {k: v for k, v in whole.metrics.items() if k.startswith("eval/")} == run.metrics
  assert_same_end(workdir, done)


@pytest.mark.slow
def test_sigterm_saves_and_exits_0_and_the_run_goes_on(tmp_path, capsys):
  asked = Preemption.requested

  def terminated(self, step):
    if step == 3:  # not a multiple of run.save_every
      os.kill(os.getpid(), signal.SIGTERM)
    return asked(self, step)

  command = smoke.arguments("sft", tmp_path)[1:]
  with mock.patch.object(Preemption, "requested", terminated):
    assert train.main(command) == 0
  assert "stopped at step 3" in capsys.readouterr().out
  assert (tmp_path / "checkpoints" / "3").is_dir()
  assert train.main(command) == 0
  assert_same_end(tmp_path, smoke.finished("sft")[0])


def test_newest_checkpoint_damaged_is_skipped_by_name(tmp_path):
  done = smoke.finished("sft")[0]
  workdir = smoke.copy(done, tmp_path / "run")
  truncate(workdir / "checkpoints" / "6")
  with pytest.warns(UserWarning, match=r"checkpoints/6 is skipped: .*"):
    fit(smoke.config("sft"), workdir)
  assert_same_end(workdir, done)


def test_no_checkpoint_readable_is_an_error_and_none_is_touched(tmp_path):
  workdir = smoke.copy(smoke.interrupted("reward", 3), tmp_path / "run")
  truncate(workdir / "checkpoints" / "2")
  before = smoke.files(workdir)
  with pytest.raises(InputError, match="no checkpoint can be read"), pytest.warns(UserWarning, match="is skipped"):
    fit(smoke.config("reward"), workdir)
  assert smoke.files(workdir) == before


def truncate(checkpoint):
  """Cuts the largest file of the parameters in half."""
  data = max((p for p in (checkpoint / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  os.truncate(data, data.stat().st_size // 2)


@pytest.mark.slow
def test_another_reference_is_refused(tmp_path):
  workdir = smoke.copy(smoke.interrupted("dpo", 5), tmp_path / "run")
  shutil.rmtree(workdir / "reference")
  with jax.set_mesh(smoke.finished("sft")[1].mesh):
    save_reference(workdir / "reference", smoke.finished("sft")[1].params)
  with pytest.raises(InputError, match=r"reference: is not the reference that this run began with"):
    fit(smoke.config("dpo"), workdir)


@pytest.mark.slow
def test_reference_is_where_the_run_began(tmp_path):
  start, sft = smoke.finished("sft")
  run = fit(smoke.config("dpo", run__init=str(start), run__steps=2), tmp_path)
  reference = load_reference(tmp_path / "reference", run.model.abstract(run.mesh), run.metadata["reference"])
  assert fingerprint(reference) == fingerprint(sft.params)
  assert fingerprint(reference) != fingerprint(run.params)
  first = metrics.read(tmp_path / "metrics.jsonl")[1]
  assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
  assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_reward_model_starts_from_the_policy_with_a_head_of_its_own():
  start, sft = smoke.finished("sft")
  config = smoke.config("reward", run__init=str(start))
  model = make_model(config, sft.tokenizer)
  with jax.set_mesh(sft.mesh):
    params, step = starting_params(config, model, sft.tokenizer, model.abstract(sft.mesh))
  assert step == smoke.STEPS
  head = params.pop("score")
  assert fingerprint(params) == fingerprint(sft.params)
  assert head.shape == (config.model.embed, 1)


@pytest.mark.parametrize("name", ["dpo", *(pytest.param(name, marks=pytest.mark.long) for name in ("sft", "reward"))])
def test_one_device_and_eight_agree(name, tmp_path):
  with smoke.devices(1):
    run = fit(smoke.config(name), tmp_path)
  assert run.mesh.size == 1
  expected, whole = smoke.finished(name)
  assert whole.mesh.size == 8
  np.testing.assert_allclose(smoke.losses(tmp_path), smoke.losses(expected), rtol=0, atol=1e-4)
  assert run.metrics["eval/loss"] == pytest.approx(whole.metrics["eval/loss"], abs=1e-4)


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.slow
def test_run_continues_on_fewer_devices_with_the_same_batches(count, tmp_path, batches):
  expected = smoke.finished("dpo")[0]
  workdir = smoke.copy(smoke.interrupted("dpo", 5), tmp_path / "run")
  with smoke.devices(count):
    run = fit(smoke.config("dpo"), workdir)
  assert run.mesh.size == count
  np.testing.assert_allclose(smoke.losses(workdir), smoke.losses(expected), rtol=0, atol=1e-4)
  moved = {step: batches[step] for step in (5, 6)}
  batches.clear()
  fit(smoke.config("dpo"), smoke.copy(smoke.interrupted("dpo", 5), tmp_path / "eight"))
  assert {step: batches[step] for step in (5, 6)} == moved


def test_steps_without_a_gradient_end_the_run(tmp_path):
  records = [json.loads(line) for line in (smoke.DATA / "sft.jsonl").read_text().splitlines()]
  data = tmp_path / "weightless.jsonl"
  data.write_text("".join(json.dumps(record | {"weight": 0}) + "\n" for record in records))
  config = smoke.config("sft", data__train=str(data), run__max_skipped=2)
  message = r"nothing to learn from in 2 steps in a row \(to step 2\): loss 0 has no gradient"
  with pytest.raises(InputError, match=message):
    fit(config, tmp_path / "run")


def test_steps_that_are_not_finite_end_the_run_and_blame_no_good_records(tmp_path):
  config = smoke.config("sft", optimizer__learning_rate=1e30, run__max_skipped=2)
  with pytest.raises(InputError, match="not finite for 2 steps in a row") as caught:
    fit(config, tmp_path)
  message = str(caught.value)
  assert "\n" not in message
  rows = {row["step"]: row for row in metrics.read(tmp_path / "metrics.jsonl") if "loss" in row}
  bad = [step for step, row in rows.items() if row["skipped_in_a_row"]]
  assert [rows[step]["skipped"] for step in bad] == [1, 2]
  assert max(rows) == bad[-1]
  assert f"(to step {bad[-1]})" in message
  assert "no single record is in all of their batches: lower optimizer.learning_rate" in message
  assert "learning_rate=1e+30" in message
  assert "sft.jsonl:" not in message


def test_records_of_every_bad_batch_are_named():
  dataset = mock.MagicMock(where="pairs.jsonl:{}".format)
  dataset.__len__.return_value = 9
  found = {"loss": float("nan"), "grad_norm": float("nan"), "skipped_in_a_row": 2}
  say = lambda *ids: not_finite(5, found, [(3, [8]), (4, ids[0]), (5, ids[1])], dataset, {"beta": 0.1})
  assert say([[1, 2], [-1, 3]], [[2, 4], [3, -1]]).endswith("were pairs.jsonl:2, pairs.jsonl:3: look at these records")
  assert "no single record is in all of their batches" in say([1, 2], [3, 4])
  first = not_finite(2, found, [(1, [1]), (2, [2])], dataset, {"beta": 0.1})
  assert first.endswith("look at the settings (beta=0.1) and at what the run began with (run.init)")
  passes = found | {"skipped_in_a_row": 16, "passes/steps": 16.0}  # all of one iteration's optimizer steps
  assert "all were on one batch: lower" in not_finite(3, passes, [(2, [1]), (3, [1])], dataset, {})
  assert "none was finite before" in not_finite(1, passes, [(1, [1])], dataset, {})


def test_what_the_data_lost_is_in_the_first_line_of_metrics():
  workdir, _ = smoke.finished("dpo")
  first = metrics.read(workdir / "metrics.jsonl")[0]
  assert first["step"] == 0
  assert first["data/examples"] > 0
  assert first["data/dropped/over-long example"] > 0


def test_directory_is_claimed_only_by_a_run_that_can_start(tmp_path):
  with pytest.raises(InputError, match="no such file"):
    fit(smoke.config("sft", data__train="absent.jsonl"), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_directory_of_another_run_is_refused_and_kept(tmp_path):
  workdir = smoke.copy(smoke.interrupted("reward", 3), tmp_path / "run")
  before = smoke.files(workdir)
  for other in (smoke.config("reward", run__seed=1), smoke.config("dpo")):
    with pytest.raises(InputError, match=r"holds another run: .*; choose another --workdir"):
      fit(other, workdir)
  assert smoke.files(workdir) == before


@pytest.mark.parametrize("key", ["train", "eval"])
def test_changed_data_is_refused(tmp_path, key):
  data = tmp_path / "sft.jsonl"
  shutil.copy(smoke.DATA / "sft.jsonl", data)
  config = smoke.config("sft", **{f"data__{key}": str(data)})
  smoke.interrupt(config, tmp_path / "run", 3)
  data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
  with pytest.raises(InputError, match=rf"what is behind data\.{key} has changed"):
    fit(config, tmp_path / "run")


@pytest.mark.slow
def test_moved_data_is_the_same_data(tmp_path):
  data, moved = tmp_path / "sft.jsonl", tmp_path / "moved.jsonl"
  shutil.copy(smoke.DATA / "sft.jsonl", data)
  smoke.interrupt(smoke.config("sft", data__train=str(data)), tmp_path / "run", 3)
  data.rename(moved)
  config = smoke.config("sft", data__train=str(moved))
  assert fit(config, tmp_path / "run").step == config.run.steps


def trainer(workdir, *overrides):
  """A process of `alignjax train`."""
  command = [sys.executable, "-m", "alignjax.train", *smoke.arguments("sft", workdir, *overrides)[1:]]
  return subprocess.Popen(command, cwd=smoke.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process, path, seconds=240):
  """Returns when `path` exists."""
  deadline = time.monotonic() + seconds
  while not path.exists():
    assert process.poll() is None, process.stdout.read()
    assert time.monotonic() < deadline, f"no {path} after {seconds} s"
    time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_ends_a_process_in_good_order(tmp_path):
  process = trainer(tmp_path, "run.steps=100000", "run.eval_every=0")
  wait_for(process, tmp_path / "checkpoints" / "2")
  process.terminate()
  output, _ = process.communicate(timeout=240)
  assert process.returncode == 0, output
  step = int(re.search(r"stopped at step (\d+)", output)[1])
  assert (tmp_path / "checkpoints" / str(step)).is_dir()
  process = trainer(tmp_path, f"run.steps={step + 2}", "run.eval_every=0")
  output, _ = process.communicate(timeout=240)
  assert process.returncode == 0, output
  rows = [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl") if "loss" in row]
  assert rows == list(range(1, step + 3))


def test_rows_beyond_the_model_s_positions_are_said(tmp_path, capsys):
  train.fit(smoke.config("sft", model__max_positions=100, run__steps=2), tmp_path)
  assert "model: made for texts of 100 tokens; rows have up to 128" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_the_first_step(name, tmp_path):
  train.fit(smoke.config(name, run__eval_every=0, run__save_every=100), tmp_path)
  compiled = [row["programs_compiled"] for row in metrics.read(tmp_path / "timing.jsonl")]
  assert len(compiled) == smoke.STEPS
  assert set(compiled[1:-1]) == {compiled[0]}  # behind the last step come evaluation and checkpoint


@pytest.mark.long
def test_kill_9_at_random_moments_changes_nothing(tmp_path):
  rng = random.Random(0)

  def complete(name, kills, within_s):
    arguments = kill_resume.command(f"{smoke.CONFIGS}/dpo.py:smoke", tmp_path / name, [])
    return kill_resume.complete(arguments, tmp_path / name, kills, within_s, rng)

  complete("warm", 0, 0.0)
  began = time.monotonic()
  complete("whole", 0, 0.0)
  within_s, name = time.monotonic() - began, "killed"
  while not complete(name, 3, within_s):  # it was done before the first kill: that run says nothing
    name, within_s = f"{name}_sooner", 0.8 * within_s
  assert kill_resume.differences(kill_resume.outcome(tmp_path / "whole"), kill_resume.outcome(tmp_path / name)) == []


@pytest.mark.long
def test_hh_rlhf_reward_model_takes_three_steps(tmp_path):
  folder = os.environ.get("ALIGNJAX_DATA")
  if not folder:
    pytest.skip("ALIGNJAX_DATA names no folder of real data")
  pairs, tokenizer = os.path.join(folder, "hh-rlhf", "harmless.jsonl.gz"), tmp_path / "tokenizer.model"
  train_tokenizer(read_texts([pairs]), tokenizer, 4096)
  config = train.config_lib.load_config(
    f"{smoke.CONFIGS}/reward.py",
    [f"data.tokenizer={tokenizer}", "run.init=", "run.steps=3", "optimizer.warmup_steps=1", "run.log_every=1"]
    + [flag.removeprefix("--config.") for flag in smoke.FLAGS],
  )
  run = fit(config, tmp_path / "run")
  assert config.data.train == pairs
  assert len(smoke.losses(tmp_path / "run")) == 3
  assert np.isfinite([run.metrics["loss"], run.metrics["eval/loss"]]).all()


@pytest.mark.long
def test_a_trace_of_some_steps_is_written_on_request(tmp_path):
  fit(smoke.config("sft", run__profile=1, run__eval_every=0), tmp_path)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
