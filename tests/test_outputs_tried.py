"""Every command that writes says in one line, before the work, that it cannot, or that another works there."""

import contextlib
import errno
import json
import os
from unittest import mock

import pytest

from alignjax import cli
from alignjax.environments import testbed
from alignjax.errors import InputError, exit_status
from alignjax.runs import checkpoint
from alignjax.runs.config import load_config
from alignjax.system import output
from alignjax.training.metrics import MetricWriter
from tests import smoke
from tests.system.test_output import held_elsewhere, mounted

PROMPTS = str(smoke.DATA / "eval_prompts.jsonl")
TOKENIZER = str(smoke.DATA / "tokenizer.model")
SET = tuple(smoke.FLAGS)
CONFIG = lambda name: ("--config", f"{smoke.CONFIGS / name}.py:smoke", *SET)
JUDGED = ("--reward", "regex", "--reward-settings", '{"pattern": "in"}')
ASKED = ("--judge", "runs/none", "--rubric", "helpful-harmless-honest", "--input", PROMPTS)
COMMANDS = {
  "train": lambda out: ("train", *CONFIG("sft"), "--workdir", out),
  "quickstart": lambda out: ("quickstart", "--workdir", out),
  "evaluate": lambda out: ("evaluate", "--workdir", "runs/none", "--out", f"{out}.json"),
  "generate": lambda out: ("generate", "--workdir", "runs/none", "--prompt", "a", "--out", f"{out}.jsonl"),
  "best-of": lambda out: ("best-of", "--workdir", "runs/none", "--prompts", PROMPTS, *JUDGED, "--out", f"{out}.jsonl"),
  "iterate": lambda out: (
    "iterate", *CONFIG("iterative_dpo"), "--config.run.init=runs/none", *JUDGED, "--rounds", "1", "--workdir", out
  ),
  "retrain": lambda out: ("retrain", *CONFIG("rloo"), *JUDGED, "--rounds", "1", "--workdir", out),
  "sweep": lambda out: ("sweep", *CONFIG("dpo_lora"), "--sweep", "beta=0.1,0.2", "--workdir", out),
  "compile": lambda out: ("compile", *CONFIG("sft"), "--topology", "cpu:1", "--json", f"{out}.json"),
  "export": lambda out: ("export", "--workdir", "runs/none", "--out", out),
  "export --adapter": lambda out: ("export", "--adapter", "--workdir", "runs/none", "--out", out),
  "adapter merge": lambda out: ("adapter", "merge", "--workdir", "runs/none", "--out", out),
  "domain": lambda out: ("domain", "--workdir", "runs/none", "--out", out),
  "judge pairs": lambda out: ("judge", "pairs", *ASKED, "--out", f"{out}.jsonl"),
  "judge score": lambda out: (
    "judge", "score", "--judge", "runs/none", "--rubric", "checks", "--input", PROMPTS, "--out", f"{out}.jsonl"
  ),
  "judge bias": lambda out: ("judge", "bias", *ASKED, "--out", f"{out}.json"),
  "judge agreement": lambda out: ("judge", "agreement", *ASKED, "--out", f"{out}.json"),
  "data testbed": lambda out: ("data", "testbed", "--out", out),
  "data tokenizer": lambda out: ("data", "tokenizer", "--input", PROMPTS, "--out", f"{out}.model"),
}  # fmt: skip
WORK = (
  "alignjax.train.make_mesh",
  "alignjax.runs.run.load",
  "alignjax.evaluation.held_out.evaluate",
  "alignjax.commands.sweep.run_program",
  "alignjax.preflight.command.preflight",
  "alignjax.environments.testbed.write._numbered",
  "alignjax.commands.quickstart.write_data",
  "sentencepiece.SentencePieceTrainer.train",
)


def said(capsys, command, out):
  """The one line of a command that must not come to its work."""
  begun = AssertionError("the work began")
  with contextlib.ExitStack() as stack:
    for name in WORK:
      stack.enter_context(mock.patch(name, side_effect=begun))
    assert exit_status(cli.main, [str(part) for part in COMMANDS[command](str(out))]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1, lines
  return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_is_said_before_the_work(command, capsys, tmp_path):
  (tmp_path / "file").write_text("")
  (tmp_path / "loop").symlink_to(tmp_path / "loop")
  for place in (tmp_path / "file" / "out", tmp_path / "loop" / "out", "/proc/out", "/proc/out/deep"):
    line = said(capsys, command, place)
    assert str(place) in line, line
    assert any(part in line for part in ("--out", "--workdir", "--json")), line
  assert smoke.files(tmp_path) == {"file": b""}
  assert sorted(child.name for child in tmp_path.iterdir()) == ["file", "loop"]


def test_a_full_or_frozen_disk_is_said_before_the_work(capsys, tmp_path):
  with mounted(tmp_path / "small", "size=64k") as small:
    with contextlib.suppress(OSError), (small / "filling").open("wb", buffering=0) as filling:
      while True:
        filling.write(bytes(4096))
    for command in COMMANDS:
      assert "the disk is full" in said(capsys, command, small / "out"), command
    (small / "filling").unlink()
    assert not list(small.iterdir())
  with mounted(tmp_path / "frozen", "ro") as frozen:
    for command in COMMANDS:
      assert "read-only" in said(capsys, command, frozen / "out"), command


@pytest.mark.parametrize(
  ("command", "doing", "lock"),
  [
    ("train", "trains", "out/.lock"),
    ("iterate", "iterates", "out/.lock"),
    ("sweep", "sweeps", "out/.lock"),
    ("evaluate", "writes", "out.json.partial"),
    ("data tokenizer", "writes", "out.model.partial"),
  ],
)
def test_the_second_of_two_commands_is_refused(command, doing, lock, capsys, tmp_path):
  path = tmp_path / lock
  path.parent.mkdir(exist_ok=True)
  owner = {"pid": 7, "host": "far", "doing": doing, "since": "noon"}
  with held_elsewhere(path, json.dumps(owner).encode()):
    before = smoke.files(tmp_path)
    assert f"process 7 on far {doing} here since noon; wait for it, stop it" in said(capsys, command, tmp_path / "out")
    assert smoke.files(tmp_path) == before


def test_samples_of_two_commands_do_not_go_into_one_file(monkeypatch, tmp_path):
  from alignjax.commands import best_of, completions

  folder = tmp_path / "out.parts"
  folder.mkdir()
  with held_elsewhere(folder / output.LOCK, b'{"pid": 7, "host": "far", "doing": "samples", "since": "noon"}'):
    with pytest.raises(InputError, match="process 7 on far samples here"):
      completions.write(None, None, tmp_path / "out.jsonl", best_of.DEFAULT)
    with pytest.raises(InputError, match="process 7 on far samples here"):
      best_of.best_of(None, PROMPTS, None, tmp_path / "out.jsonl")


def test_an_input_that_is_wrong_leaves_no_folder(capsys, tmp_path):
  config = ("--config.data.train=none.jsonl",)
  arguments = ["train", *CONFIG("sft"), *config, "--workdir", str(tmp_path / "runs" / "a")]
  assert exit_status(cli.main, arguments) == 2
  assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_metrics_are_written_is_one_line_and_the_lines_go_on(tmp_path):
  writer = MetricWriter(tmp_path)
  writer.write(1, {"loss": 1.0})
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  with mock.patch("os.fsync", side_effect=full), pytest.raises(InputError, match=r"metrics.jsonl: .* disk is full"):
    writer.close()
  writer = MetricWriter(tmp_path, resume_step=1)
  writer.write(2, {"loss": 0.5})
  writer.close()
  assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_disk_that_fills_under_a_testbed_leaves_the_old_files(tmp_path):
  few = dict(sft=2, preference=2, evaluation=2, prompts=2)
  testbed.write(tmp_path / "data", **few)
  before = smoke.files(tmp_path)
  wrote, full = os.fsync, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  calls = iter(range(100))

  def filling(fd):
    if next(calls) == 7:
      raise full
    wrote(fd)

  with mock.patch("os.fsync", filling), pytest.raises(InputError, match="the disk is full"):
    testbed.write(tmp_path / "data", **few)
  assert smoke.files(tmp_path) == before


def test_a_config_that_changed_since_it_was_written_is_named(tmp_path):
  from alignjax.runs.workdir import read_config, write_config

  write_config(tmp_path, load_config(f"{smoke.CONFIGS / 'dpo'}.py:smoke"))
  assert read_config(tmp_path).algorithm.name == "preference"
  path = tmp_path / "config.json"
  path.write_text(path.read_text().replace('"steps": 6', '"steps": 7'))
  with pytest.raises(InputError, match=r"config\.json: is damaged \(it changed since it was written"):
    read_config(tmp_path)


def test_a_checkpoint_folder_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / "checkpoints").write_text("")
  with pytest.raises(InputError, match="checkpoints"):
    checkpoint.Checkpointer(tmp_path / "checkpoints", save_every=1)
