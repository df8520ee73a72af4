"""The benchmark beside TRL and Tunix: its intervals, what it refuses, and that a turn of each side is the same work."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import environments, peers, result
from tests import trl_environment

MODEL = {"vocab": 64, "layers": 2, "embed": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 96, "tied": False}
TINY = peers.WORK | {
  "model": MODEL | {"rope_theta": 1e6, "norm_eps": 1e-6},
  "pairs": 2,
  "length": 16,
  "prompts": 8,
  "prompt_length": 8,
  "new_tokens": 16,
  "batch": 3,
  "batch_prompt_length": 8,
  "batch_new_tokens": 8,
  "learning_rate": 1e-5,
}


@pytest.mark.parametrize(
  ("n", "least", "coverage"),
  [(1, 0, 0.0), (5, 0, 1 - 2 / 2**5), (6, 0, 1 - 2 / 2**6), (8, 0, 1 - 2 / 2**8), (9, 1, 1 - 2 * 10 / 2**9)],
)
def test_the_interval_is_the_narrowest_that_covers_the_median(n, least, coverage):
  values = np.random.default_rng(0).permutation(n).astype(float)
  assert peers.median_interval(values) == (least, n - 1 - least, pytest.approx(coverage))


def test_ratios_are_taken_within_a_round():
  slow_rounds = np.array([1.0, 10.0, 1.0])
  ours, theirs = ({"seconds": s * slow_rounds, "cpu_seconds": slow_rounds, "peak_mb": 100.0 * s} for s in (2.0, 3.0))
  found = peers.part(ours, theirs)
  assert found["tokens_per_s"]["min"] == found["tokens_per_s"]["max"] == 1.5
  assert found["peak_mb"] == pytest.approx(2 / 3)


def test_a_turn_counts_the_tokens_that_it_trains_on_or_samples():
  counts = {task: peers.tokens_per_turn(task, TINY) for task in peers.TASKS}
  assert counts == {"dpo": 2 * 2 * 16, "reward": 2 * 2 * 16, "ppo": 8 * 16, "generate": 3 * 8}


def test_the_table_says_what_was_not_measured():
  speed = {"median": 2.0, "interval": [1.5, 2.5]}
  over = {"trl": {"tokens_per_s": speed, "peak_mb": 0.5}}
  lines = peers.table({"dpo": {"float32": {"alignjax_over": over}}, "reward": {}}).splitlines()
  assert lines[:2] == ["| beside | DPO step | reward-model step |", "| --- | --- | --- |"]
  assert lines[2] == "| TRL, float32 | 2.00 [1.50, 2.50]; 0.50 | not measured |"
  assert lines[3:] == [
    f"| {row} | not measured | not measured |" for row in ("TRL, bfloat16", "Tunix, float32", "Tunix, bfloat16")
  ]


def test_docs_hold_the_table_of_the_numbers():
  numbers = json.loads((result.RESULTS / "peers.json").read_text())
  assert peers.table(numbers["tasks"]) in (result.RESULTS.parent.parent / "docs" / "results.md").read_text()


def test_other_work_is_no_result():
  agree = lambda task, ours, theirs, key: peers.disagreement(
    task, "float32", {"alignjax": {key: ours}, "trl": {key: theirs}}
  )
  assert agree("dpo", [0.5, 0.4, 0.3], [0.5001, 0.4], "losses") == ""  # TRL's last one comes a turn later
  assert "trl's losses" in agree("dpo", [0.5, 0.4], [0.5, 0.41], "losses")
  assert agree("dpo", [0.5], [float("nan")], "losses")
  assert agree("dpo", [0.5], [], "losses")
  assert agree("ppo", [10.0, 12.0], [12.0], "kl") == ""
  assert agree("ppo", [10.0, 12.0], [15.0], "kl")
  assert agree("generate", [[1, 2, 3]], [[1, 2, 3]], "greedy") == ""
  assert agree("generate", [[1, 2, 3]], [[1, 2, 4]], "greedy")
  assert agree("generate", [[1, 2, 3]], [[1, 2]], "greedy")


WORKER = """
from peer_turns import Turns
turns = Turns("numpy")
print("noise")
while True:
  turns.begin(losses=[0.5])
  turns.end()
"""


def test_a_worker_answers_every_request_and_ends_with_its_input():
  command = [sys.executable, "-c", WORKER]
  options = {"input": "{}\n{}\n", "cwd": environments.FOLDER, "capture_output": True, "text": True, "check": True}
  done = subprocess.run(command, **options)
  ready, *turns = map(json.loads, done.stdout.splitlines())
  assert ready["versions"]["numpy"]
  assert "seconds" not in ready
  assert len(turns) == 2
  for answer in turns:
    assert answer["seconds"] > 0
    assert answer["losses"] == [0.5]
    assert answer["peak_mb"] >= ready["peak_mb"] >= ready["imported_mb"] > 1
  assert "noise" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("task", peers.TASKS)
def test_a_turn_here_does_the_work_of_one_in_trl(tmp_path, task):
  trl_environment.python(peers.requirements("trl", task))
  peers.write_work(tmp_path, TINY)
  found = peers.compare(tmp_path, task, "float32", rounds=1, sides=("alignjax", "trl"))  # exits if they disagree
  assert found["alignjax_over"]["trl"]["tokens_per_s"]["median"] > 0
  for side in ("alignjax", "trl"):
    assert found[side]["peak_mb"] > found[side]["imported_mb"]
  if task in ("dpo", "reward"):
    ours, theirs = (np.array(found["found"][side]["losses"]) for side in ("alignjax", "trl"))
    np.testing.assert_allclose(ours[: len(theirs)], theirs, rtol=0, atol=1e-4)
    assert abs(ours[0] - np.log(2)) > 0.01  # policy and reference are not the same
    assert len(set(theirs)) > 1
