"""A pod simulated on one machine: two hosts are one run, and the death of either costs only time."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from alignjax import cli
from alignjax.train import fit
from tests import smoke

POD = [sys.executable, str(smoke.ROOT / "launch" / "local_pod.py")]
TOLERANCE = 1e-5  # of a loss: other sums over devices, the same batches


def pod(*command, restarts=0, devices=2):
  """(exit status, output) of a command on two simulated hosts."""
  environ = os.environ | {"PYTHONPATH": str(smoke.ROOT), "ALIGNJAX_JOIN": "240"}
  options = ["--hosts", "2", "--devices-per-host", str(devices), "--restarts", str(restarts), "--heartbeat", "30"]
  done = subprocess.run(
    [*POD, *options, "--", *command], env=environ, cwd=smoke.ROOT, capture_output=True, text=True, timeout=1500
  )
  print(done.stdout[-6000:], done.stderr[-2000:])
  return done.returncode, done.stdout


def train(name, workdir, *overrides):
  return [sys.executable, "-m", "alignjax.cli", *smoke.arguments(name, workdir, *overrides)]


def struck(blows, name, workdir, *overrides):
  marks = workdir.with_suffix(".blows")
  marks.mkdir()
  return [sys.executable, "-m", "tests.one_host", str(marks), blows, *smoke.arguments(name, workdir, *overrides)]


def test_dry_run_prints_the_command_of_every_host():
  done = subprocess.run(
    [*POD, "--dry-run", "--", "alignjax", "train", "--x", "a b"], capture_output=True, text=True, check=True
  )
  lines = done.stdout.splitlines()
  assert [re.search(r"JAX_PROCESS_ID=(\d)", line)[1] for line in lines] == ["0", "1"]
  assert all("JAX_NUM_CPU_DEVICES=4" in line and line.endswith("alignjax.cli train --x 'a b'") for line in lines)


def test_a_mistake_is_not_tried_again():
  code = "import sys; print('once'); sys.exit(2)"
  status, output = pod(sys.executable, "-c", code, restarts=3)
  assert status == 2
  assert output.count("once") == 2  # one life of two hosts


def test_sigterm_reaches_a_host_and_nothing_starts_again():
  code = "import os, time; print('up', flush=True); time.sleep(99 * (os.environ['JAX_PROCESS_ID'] == '0'))"
  command = [*POD, "--hosts", "2", "--", sys.executable, "-c", code]
  launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  lines = [launcher.stdout.readline() for _ in range(3)]
  launcher.terminate()
  rest = launcher.communicate(timeout=60)[0]
  assert sum("up" in line for line in lines) == 2
  assert launcher.returncode == 143
  assert "local_pod: restart" not in rest


def test_restarts_are_bounded():
  status, output = pod(sys.executable, "-c", "raise SystemExit(1)", restarts=2)
  assert status == 1
  assert len(set(re.findall(r"on port (\d+)", output))) == 3
  assert "gave up after 2 restarts" in output


def test_the_host_that_was_killed_is_named_and_not_one_that_left_because_of_it():
  code = "import os; host = os.environ['JAX_PROCESS_ID']; os.kill(os.getpid(), 9) if host == '1' else os._exit(75)"
  status, output = pod(sys.executable, "-c", code)
  assert status == 1
  assert "host 1 ended first (killed by SIGKILL)" in output


def test_a_host_that_the_pod_itself_killed_is_not_named():
  code = "import os, time; time.sleep(60) if os.environ['JAX_PROCESS_ID'] == '1' else os.abort()"
  command = [*POD, "--hosts", "2", "--restarts", "0", "--heartbeat", "-14", "--", sys.executable, "-c", code]
  output = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
  assert "host 0 ended first (killed by SIGABRT)" in output
  assert "hosts [1] did not and were killed" in output


@pytest.mark.long
def test_either_host_may_be_killed_and_the_run_ends_where_one_host_does(tmp_path):
  status, output = pod(*struck("kill:1:2,kill:0:1", "dpo", tmp_path / "pod"), restarts=3)
  assert status == 0, output[-3000:]
  assert output.count("killed by SIGKILL") == 2
  assert "were killed" not in output  # the others left by themselves
  assert output.count("local_pod: restart") == 2
  np.testing.assert_allclose(smoke.losses(tmp_path / "pod"), smoke.losses(smoke.finished("dpo")[0]), atol=TOLERANCE)
  assert (tmp_path / "pod" / "checkpoints" / str(smoke.STEPS)).is_dir()


@pytest.mark.long
def test_sigterm_on_one_host_saves_the_same_step_on_all_and_one_host_goes_on(tmp_path):
  long = ("run.steps=400", "run.eval_every=0", "optimizer.schedule=constant")
  workdir = tmp_path / "pod"
  status, output = pod(*struck("term:1:1", "sft", workdir, *long), restarts=1)
  assert status == 143
  assert "stopped: the same command continues" in output
  step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
  assert 2 <= step < 400

  config = smoke.config("sft", run__steps=step + 2, run__eval_every=0, optimizer__schedule="constant")
  fit(config, workdir)
  alone = tmp_path / "alone"
  fit(config, alone)
  np.testing.assert_allclose(smoke.losses(workdir), smoke.losses(alone), atol=TOLERANCE)


@pytest.mark.slow
def test_a_checkpoint_of_one_host_goes_on_on_two(tmp_path):
  workdir = smoke.copy(smoke.interrupted("dpo", 3), tmp_path / "pod")
  status, output = pod(*train("dpo", workdir))
  assert status == 0, output[-3000:]
  np.testing.assert_allclose(smoke.losses(workdir), smoke.losses(smoke.finished("dpo")[0]), atol=TOLERANCE)


@pytest.mark.long
def test_a_checkpoint_that_one_host_cannot_read_is_passed_over_by_all(tmp_path):
  workdir = tmp_path / "pod"
  newest = workdir / "checkpoints" / str(smoke.STEPS)
  assert pod(*train("dpo", workdir))[0] == 0
  for file in (newest / "params" / "ocdbt.process_1" / "d").iterdir():  # what host 1 wrote: the other needs none of it
    file.write_bytes(b"")
  status, output = pod(*train("dpo", workdir))
  assert status == 0, output[-3000:]
  assert f"{smoke.STEPS} is skipped: another host cannot read its part" in output
  assert f"{smoke.STEPS} is skipped: ValueError: OUT_OF_RANGE" in output
  assert newest.with_suffix(".unreadable").is_dir()
  assert newest.is_dir()
  np.testing.assert_allclose(smoke.losses(workdir), smoke.losses(smoke.finished("dpo")[0]), atol=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("axis", [pytest.param("tensor", marks=pytest.mark.long), "sequence"])
def test_hosts_that_split_the_weights_or_each_row_hold_the_same_rows(axis, tmp_path):
  status, output = pod(*train("dpo", tmp_path / "pod", f"mesh.{axis}=2"), devices=1)
  assert status == 0, output[-3000:]
  np.testing.assert_allclose(smoke.losses(tmp_path / "pod"), smoke.losses(smoke.finished("dpo")[0]), atol=TOLERANCE)


@pytest.mark.long
def test_ppo_on_two_hosts_is_ppo_on_one(tmp_path):
  status, output = pod(*train("ppo", tmp_path / "pod"))
  assert status == 0, output[-3000:]
  np.testing.assert_allclose(smoke.losses(tmp_path / "pod"), smoke.losses(smoke.finished("ppo")[0]), atol=1e-4)


@pytest.mark.long
def test_hosts_of_other_hash_seeds_save_and_load_trees_in_one_order(tmp_path):
  """Two constant trees, whose order in a set of strings differs between PYTHONHASHSEED 0 and 1."""
  reward = smoke.finished("reward")[0]
  own = (f"run.init={smoke.finished('sft')[0]}", f"algorithm.reward_model={reward}", "algorithm.rewards=reward_model")
  own += ("run.steps=4", "run.save_every=2", "run.eval_every=0", "algorithm.max_new_tokens=8")
  own += ("algorithm.reward_settings={}",)
  command = struck("kill:1:2", "online_dpo", tmp_path / "pod", *own)
  status, output = pod("sh", "-c", 'PYTHONHASHSEED=$JAX_PROCESS_ID exec "$@"', "sh", *command, restarts=1)
  assert status == 0, output[-3000:]
  assert output.count("local_pod: restart") == 1
  assert cli.main(smoke.arguments("online_dpo", tmp_path / "one", *own)) == 0
  here, there = (smoke.losses(tmp_path / name) for name in ("pod", "one"))
  np.testing.assert_allclose(here, there, atol=1e-4)


JUDGED = ("--reward", "regex", "--reward-settings", '{"pattern": "in|on"}', "--n", "3", "--max-new-tokens", "8")


@pytest.mark.long
@pytest.mark.parametrize(
  "command", [pytest.param(("best-of", "--pairs", *JUDGED), marks=pytest.mark.long), ("generate", "--num", "2")]
)
def test_samples_of_two_hosts_are_those_of_one_and_written_once(command, tmp_path, capsys):
  prompts = str(smoke.DATA / "eval_prompts.jsonl")
  whole = lambda out: [*command, "--workdir", str(smoke.finished("sft")[0]), "--prompts", prompts, "--out", str(out)]
  status, output = pod(sys.executable, "-m", "tests.all_end", *whole(tmp_path / "pod.jsonl"))
  assert status == 0, output[-3000:]
  assert output.count(str(tmp_path / "pod.jsonl")) == 1
  with smoke.all_end():
    assert cli.main(whole(tmp_path / "one.jsonl")) == 0
  pod_lines, one_lines = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("pod", "one"))
  for here, there in zip(pod_lines, one_lines, strict=True):
    here, there = json.loads(here), json.loads(there)
    assert here.pop("logp", 0.0) == pytest.approx(there.pop("logp", 0.0), abs=1e-4)
    assert here == there


@pytest.mark.long
def test_rounds_on_two_hosts_are_those_on_one(tmp_path):
  policy, reward = smoke.finished("sft")[0], smoke.finished("reward")[0]
  overrides = ("run.steps=2", "run.eval_every=0", f"run.init={policy}", f"algorithm.reward_model={reward}")
  flags = smoke.arguments("rloo", tmp_path / "pod", "algorithm.rewards=reward_model+regex:0", *overrides)[1:]
  rounds = ["--rounds", "2", "--pairs-per-round", "16", "--reward-steps", "2", *JUDGED]
  status, output = pod(sys.executable, "-m", "tests.all_end", "retrain", *flags, *rounds)
  assert status == 0, output[-3000:]
  flags[flags.index(str(tmp_path / "pod"))] = str(tmp_path / "one")
  with smoke.all_end():
    assert cli.main(["retrain", *flags, *rounds]) == 0
  texts = [(tmp_path / name / "round-02" / "train.jsonl").read_text() for name in ("pod", "one")]
  assert texts[0] == texts[1]
  for run in ("round-02/reward", "round-02/policy"):
    here, there = (smoke.losses(tmp_path / name / run) for name in ("pod", "one"))
    np.testing.assert_allclose(here, there, atol=1e-4)


@pytest.mark.long
def test_a_host_with_another_config_is_named(tmp_path):
  command = " ".join(train("dpo", tmp_path / "pod"))
  status, output = pod("bash", "-c", f"{command} --config.data.rows=$((8 + 8 * JAX_PROCESS_ID))", restarts=3)
  assert status == 2
  assert re.search(r"host 1 \(.*\) differs from the others in config and code: .*data.rows is 16 there", output)
  assert "local_pod: restart" not in output
