import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from alignjax.data.stream import Item, Layout, fill_row
from alignjax.data.transform import Encoded, Side


def side(*ids, prompt=1):
  return Side(np.array(ids, np.int32), np.array([0] * prompt + [1] * (len(ids) - prompt), np.float32))


def test_a_preference_row_by_hand():
  items = [
    Item([side(11, 12, 13), side(11, 14)], margin=2.0, weight=0.5, record_id=7, example_id=3, confidence=0.8),
    Item([side(21, 22), side(21, 23)], margin=0.0, weight=1.0, record_id=9, example_id=4),
  ]
  row = fill_row(items, Layout(kind="preference", length=12, examples=3, pad_id=0))
  assert {name: values.tolist() for name, values in row.items()} == {
    "tokens": [11, 12, 13, 11, 14, 21, 22, 21, 23, 0, 0, 0],
    "segment_ids": [1, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 0],
    "positions": [0, 1, 2, 0, 1, 0, 1, 0, 1, 0, 0, 0],
    "loss_mask": [0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0],
    "example_mask": [1, 1, 0],
    "record_ids": [7, 9, -1],
    "example_ids": [3, 4, -1],
    "weights": [0.5, 1, 0],
    "margins": [2, 0, 0],
    "confidences": [np.float32(0.8), 1, 0],
  }
  floats = ("loss_mask", "example_mask", "weights", "margins", "confidences")
  assert {row[name].dtype.name for name in row if name not in floats} == {"int32"}
  assert {row[name].dtype.name for name in floats} == {"float32"}


def test_a_row_with_a_shared_prompt_by_hand():
  completions = [([14, 15], [1, 1]), ([16], [1]), ([17, 18], [1, 1])]
  sides = Encoded([11, 12, 13], completions).sides(share_prompt=True)
  row = fill_row([Item(sides, 0.0, 1.0, 0)], Layout(kind="triple", length=12, examples=2, pad_id=0, readers=2))
  names = ("tokens", "segment_ids", "positions", "loss_mask")
  assert {name: row[name].tolist() for name in names} == {
    "tokens": [11, 12, 13, 14, 15, 13, 16, 13, 17, 18, 0, 0],  # each goes on from the prompt's last token
    "segment_ids": [1, 1, 1, 1, 1, 2, 2, 5, 5, 5, 0, 0],
    "positions": [0, 1, 2, 3, 4, 2, 3, 2, 3, 4, 0, 0],
    "loss_mask": [0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0],
  }
  assert row["readers"][:3].tolist() == [[2, 5], [2, 5], [-1, -1]]
  assert (row["readers"][2:] == -1).all()


def test_a_supervised_row_has_a_segment_per_example_and_no_margins():
  row = fill_row(
    [Item([side(1, 2)], 0, 1, 0), Item([side(3, 4)], 0, 1, 1)], Layout(kind="sft", length=5, examples=2, pad_id=0)
  )
  assert row["segment_ids"].tolist() == [1, 1, 2, 2, 0]
  assert "margins" not in row


def test_a_prompt_ends_its_row():
  row = fill_row([Item([side(1, 2, prompt=2)], 0, 1, 4)], Layout(kind="prompt", length=4, examples=1, pad_id=9))
  assert row["tokens"].tolist() == [9, 9, 1, 2]
  assert row["segment_ids"].tolist() == [0, 0, 1, 1]
  assert row["positions"].tolist() == [0, 0, 0, 1]


def test_an_empty_row_holds_nothing():
  row = fill_row([], Layout(kind="preference", length=4, examples=2, pad_id=0))
  assert not any(row[name].any() for name in row if not name.endswith("_ids"))
  assert not row["segment_ids"].any()
  assert row["record_ids"].tolist() == row["example_ids"].tolist() == [-1, -1]


PROGRAM = """
import sys, time
from alignjax.errors import watch_interrupts
from alignjax.data import DataConfig, Dataset, load_tokenizer

if __name__ == "__main__":
  path, tokenizer, workers, ending = sys.argv[1:]
  watch_interrupts()
  config = DataConfig(train=path, rows=2, row_length=128, workers=int(workers))
  batches = Dataset.open(config, load_tokenizer(tokenizer), "preference").batches()
  next(batches)
  print("ready", flush=True)
  if ending == "close":
    batches.close()
  if ending == "wait":
    time.sleep(60)
"""


@pytest.fixture
def program(tmp_path, tokenizer, pairs):
  (tmp_path / "program.py").write_text(PROGRAM)
  (tmp_path / "t.model").write_bytes(tokenizer.processor.serialized_model_proto())
  return lambda *ending: subprocess.Popen(
    [sys.executable, tmp_path / "program.py", pairs, tmp_path / "t.model", *ending],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    start_new_session=True,
  )


@pytest.mark.parametrize("ending", [("0", "leave"), ("0", "close"), ("2", "leave")])
@pytest.mark.slow
def test_a_program_ends_quietly_whether_or_not_it_closes_its_batches(program, ending):
  output, errors = program(*ending).communicate(timeout=60)
  assert (output, errors) == ("ready\n", "")


@pytest.mark.parametrize("ready", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ctrl_c_of_a_terminal_ends_a_program_and_its_workers_in_one_line(program, ready):
  with program("2", "wait") as process:
    if ready:
      assert process.stdout.readline() == "ready\n"
      children = psutil.Process(process.pid).children(recursive=True)
    else:  # while the workers start
      while len(children := psutil.Process(process.pid).children(recursive=True)) < 3:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=10)
  assert (process.returncode, errors) == (130, "alignjax: interrupted; run the same command again to go on\n")
  assert not alive


@pytest.mark.slow
def test_workers_die_with_a_killed_parent(program):
  with program("2", "wait") as process:
    assert process.stdout.readline() == "ready\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.stderr.close()
    _, alive = psutil.wait_procs(children, timeout=10)
  assert not alive
