"""A resumed metrics file equals an uninterrupted one, and the progress line counts what it says."""

import io
import json
import os
import subprocess
import sys

import pytest

from alignjax.errors import InputError
from alignjax.training import metrics
from alignjax.training.metrics import MetricWriter, Progress
from benchmarks import environments
from tests import smoke


def log(workdir, steps, resume_step=0):
  writer = MetricWriter(workdir, resume_step=resume_step)
  for step in steps:
    writer.write(step, {"loss": 1 / (step + 3), "count": step})
    writer.write_timing(step, {"tokens_per_s": 1e3})
  return writer


def test_resumed_file_is_byte_for_byte_the_uninterrupted_one(tmp_path):
  log(tmp_path / "whole", range(1, 11)).close()
  log(tmp_path / "killed", range(1, 8)).flush()  # and never closed
  with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 8, "lo')
  log(tmp_path / "killed", range(5, 11), resume_step=4).close()
  whole, killed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "killed"))
  assert killed.read_bytes() == whole.read_bytes()
  assert [row["step"] for row in metrics.read(tmp_path / "killed" / "timing.jsonl")] == list(range(1, 11))
  assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["metrics.jsonl", "timing.jsonl"]


def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
  log(tmp_path, [0, 1, 2]).flush()
  log(tmp_path, [0, 1]).close()
  assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [0, 1]


def test_floats_are_exact_and_the_rest_is_json(tmp_path):
  values = {"third": 1 / 3, "tiny": 5e-324, "nan": float("nan"), "inf": -float("inf"), "n": 3}
  writer = MetricWriter(tmp_path)
  writer.write(1, values)
  writer.close()
  line = (tmp_path / "metrics.jsonl").read_text()
  row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
  assert (row["third"], row["tiny"], row["n"]) == (1 / 3, 5e-324, 3)
  assert (row["nan"], row["inf"]) == ("nan", "-inf")


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "1"}'])
def test_a_foreign_line_is_named(tmp_path, line):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
  with pytest.raises(InputError, match=r"metrics.jsonl:2: .*remove this line"):
    MetricWriter(tmp_path, resume_step=5)


def test_unknown_and_missing_loggers_are_errors(tmp_path, monkeypatch):
  with pytest.raises(InputError, match="'tensorbord' is not known; choose from tensorboard, wandb, trackio, mlflow"):
    MetricWriter(tmp_path, loggers=("tensorbord",))
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(InputError, match=r"tensorboardX cannot be imported .*; pip install 'alignjax\[tensorboard\]'"):
    MetricWriter(tmp_path, loggers=("tensorboard",))


def test_loggers_get_every_metric(tmp_path, monkeypatch):
  got = []
  logger = metrics.Logger(lambda step, values: got.append((step, dict(values))), lambda: got.append("closed"))
  monkeypatch.setitem(metrics.LOGGERS, "list", lambda workdir, resume_step: logger)
  writer = MetricWriter(tmp_path, loggers=("list",))
  writer.write(1, {"loss": 0.5})
  writer.write_timing(1, {"tokens_per_s": 1.0})
  writer.close()
  assert got == [(1, {"loss": 0.5}), "closed"]


def test_a_logger_that_does_not_begin_is_one_line(tmp_path, monkeypatch):
  def raises(workdir, resume_step):
    raise ConnectionError("no\nroute")

  monkeypatch.setitem(metrics.LOGGERS, "wandb", raises)
  with pytest.raises(InputError, match=r"^run\.loggers=wandb: does not begin: ConnectionError: no route; see to it"):
    MetricWriter(tmp_path, loggers=("wandb",))


def test_a_logger_that_fails_later_does_not_end_the_run(tmp_path, monkeypatch, capsys):
  calls = []

  def write(step, values):
    calls.append(step)
    raise OSError("gone")

  monkeypatch.setitem(metrics.LOGGERS, "mlflow", lambda workdir, resume_step: metrics.Logger(write, list))
  writer = MetricWriter(tmp_path, loggers=("mlflow",))
  writer.write(1, {"loss": 0.5})
  writer.write(2, {"loss": 0.25})
  writer.close()
  assert calls == [1]
  assert capsys.readouterr().err == "logger mlflow: OSError: gone; it gets no more, metrics.jsonl has everything\n"
  assert len(metrics.read(tmp_path / "metrics.jsonl")) == 2


def test_a_missing_logger_is_named_before_the_work(monkeypatch):
  for name, package in metrics.PACKAGES.items():
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"run\.loggers={name}: .*; pip install 'alignjax\[{name}\]'"):
      metrics.check_loggers(name)
  metrics.check_loggers("")
  assert metrics.PACKAGES.keys() == metrics.LOGGERS.keys()


@pytest.mark.long
@pytest.mark.parametrize("name", metrics.LOGGERS)
def test_each_logger_in_its_current_release_keeps_one_run_with_every_value(name, tmp_path):
  also = ["tensorboard"] if name == "tensorboard" else []  # which reads what tensorboardX writes
  try:
    python = environments.of_packages(metrics.PACKAGES[name], *also)
  except environments.NotInstalled as error:
    pytest.skip(str(error))
  local = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
  setting = os.environ | environments.SETTINGS | local | {"PYTHONPATH": str(smoke.ROOT), "HOME": str(tmp_path)}
  setting.pop("MLFLOW_TRACKING_URI", None)
  command = [python, "-m", "tests.logged", name, str(tmp_path / "run"), str(tmp_path / "read.json")]
  for part in ("begin", "resume", "read"):
    done = subprocess.run([*command, part], cwd=tmp_path, env=setting, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{part}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
  found = json.loads((tmp_path / "read.json").read_text())
  assert found["runs"] == 1
  assert {int(step): value for step, value in found["loss"].items()} == {step: 1 / 2**step for step in range(7)}
  assert found["eval/loss"] == {"6": 0.25}


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_tells_rate_and_time_left_without_the_compilation():
  clock, stream = Clock(), io.StringIO()
  progress = Progress("dpo", 100, stream=stream, clock=clock, every_s=10)
  assert progress.rates() == {}
  for step, now in enumerate((60.0, 62.0, 64.0, 72.0), 1):  # the first step compiled for a minute
    clock.now = now
    progress.update(step, 0.5, 3000)
  assert progress.rates() == {"seconds_per_step": 4.0, "tokens_per_s": 750.0}
  assert stream.getvalue().splitlines() == [
    "dpo 0/100  compiling",
    "dpo 1/100  1%  loss 0.5000",
    "dpo 4/100  4%  ETA 6:24  750 tokens/s  loss 0.5000",
  ]


def test_an_evaluation_does_not_count_as_a_slow_step():
  clock = Clock()
  progress = Progress("dpo", 100, stream=io.StringIO(), clock=clock)
  for step in range(1, 5):
    clock.now += 2
    progress.update(step, 0.5, 100)
    clock.now += 60
    progress.note(step, {"eval/loss": 0.6})
  assert progress.rates() == {"seconds_per_step": 2.0, "tokens_per_s": 50.0}


def test_progress_stays_on_one_line_of_a_terminal():
  clock, stream = Clock(), Terminal()
  progress = Progress("sft", 3, start=1, stream=stream, clock=clock)
  for step in (2, 3):
    clock.now += 1
    progress.update(step, 1.25, 10)
    if step == 2:
      progress.note(step, {"eval/loss": 1.5})
  progress.close()
  written = stream.getvalue()
  assert written.count("\n") == 2
  assert "\x1b[Ksft 2/3  eval/loss 1.5000\n" in written
  assert written.endswith("\x1b[Ksft 3/3  100%  ETA 0:00  10 tokens/s  loss 1.2500\n")


def test_flops_and_utilisation():
  # A multiply-add is two operations; scores and values are two matmuls over the attended positions.
  assert metrics.forward_flops_per_token(weights=1000, layers=2, heads=4, head_dim=8, attended=16) == 2000 + 4096
  assert metrics.mfu(6096.0, 100.0, 1219200.0) == 0.5
