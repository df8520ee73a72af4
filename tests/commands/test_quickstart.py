"""The quickstart, shrunk to seconds: every stage, every number of the summary, a report that needs no network."""

import copy
import json
import re

import jax
import numpy as np
import pytest

from alignjax import train
from alignjax.commands import quickstart
from alignjax.data.loader import Dataset
from alignjax.runs.config import load_config
from alignjax.runs.run import load
from alignjax.training import metrics
from tests import smoke

STEPS = 3
STAGES, MODEL = quickstart.STAGES, quickstart.MODEL  # as they are, before the tests shrink them


@pytest.fixture(scope="module")
def shrunk():
  """The quickstart with a toy model, three steps a stage and little data."""
  stages = copy.deepcopy(quickstart.STAGES)
  for stage in stages.values():
    stage["data"].update(rows=8, row_length=128)
    stage["algorithm"].update(dict(max_new_tokens=8, minibatches=1) if stage is stages["ppo"] else {})
    stage["optimizer"].update(warmup_steps=1)
    stage["run"].update(steps=STEPS, save_every=2, log_every=1, compile_cache="")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(quickstart, "STAGES", stages)
    patch.setattr(quickstart, "MODEL", dict(layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64, tied=True))
    patch.setattr(quickstart, "VOCAB", 400)
    patch.setattr(quickstart, "MAX_NEW_TOKENS", 8)
    patch.setattr(quickstart, "DATA", dict(sft=240, preference=200, evaluation=40, prompts=12))
    yield quickstart.quickstart


@pytest.fixture(scope="module")
def whole(shrunk, tmp_path_factory):
  """(directory, summary) of a quickstart."""
  workdir = tmp_path_factory.mktemp("quickstart")
  return workdir, shrunk(workdir)


def test_summary_holds_what_the_run_must_show(whole):
  workdir, summary = whole
  assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(summary))
  reward, dpo, ppo = summary["reward"], summary["dpo"], summary["ppo"]
  for share in (reward["heldout_accuracy"], reward["bayes_accuracy"], reward["ece"]):
    assert 0 <= share <= 1
  for policy in (dpo, ppo):
    assert 0 <= policy["gold_win_rate_vs_sft"] <= 1
    assert np.isfinite([policy["kl"], *policy["kl_interval"], policy["gold_mean"], policy["gold_mean_sft"]]).all()
    assert {"capability", "capability_sft"} <= set(policy)  # the alignment tax
  intervals = reward["heldout_interval"], dpo["gold_win_rate_interval"], ppo["gold_win_rate_vs_dpo_interval"]
  for low, high in intervals:
    assert 0 <= low < high <= 1
  of_sft = [
    {key: value for key, value in policy.items() if "_sft" in key and "win" not in key} for policy in (dpo, ppo)
  ]
  assert of_sft[0] == of_sft[1]  # sampled once
  assert set(ppo) - set(dpo) == {"gold_win_rate_vs_dpo", "gold_win_rate_vs_dpo_interval"}
  assert set(summary["wall_s"]) == {"data", "sft", "reward", "dpo", "ppo", "evaluation"}
  assert {"seed", "commit", "versions", "device", "sft"} <= set(summary)
  assert {"prompt", "sft", "dpo", "ppo", "gold_sft", "gold_dpo", "gold_ppo"} <= set(summary["samples"][0])


def test_metrics_are_those_of_the_stages(whole):
  workdir, _ = whole
  rows = metrics.read(workdir / "metrics.jsonl")
  trained = [(row["stage"], row["step"]) for row in rows if "loss" in row]
  assert trained == [(stage, step) for stage in ("sft", "reward", "dpo", "ppo") for step in range(1, STEPS + 1)]
  assert {row["stage"] for row in rows if "eval/loss" in row} == {"sft", "reward", "dpo"}  # PPO's costs too much


def test_later_stages_start_from_the_policy(whole):
  workdir, _ = whole
  for stage in ("reward", "dpo", "ppo"):
    config = json.loads((workdir / stage / "config.json").read_text())["config"]
    assert config["run"]["init"] == str(workdir / "sft")
  assert config["algorithm"]["reward_model"] == str(workdir / "reward")
  first = next(row for row in metrics.read(workdir / "dpo" / "metrics.jsonl") if "loss" in row)
  assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_report_needs_no_network(whole):
  page = (whole[0] / "report.html").read_text()
  assert "</html>" in page
  assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", page)
  assert not re.findall(r"<(?:link|iframe|script)\b[^>]*\b(?:src|href)=", page)


def test_second_call_trains_nothing_and_finds_the_same(whole, shrunk, monkeypatch):
  workdir, summary = whole
  before = {stage: smoke.arrays(workdir / stage, STEPS) for stage in quickstart.STAGES}

  def batches(self, step, *share):
    assert step == STEPS, "a complete stage takes no batch"
    yield from ()

  monkeypatch.setattr(Dataset, "batches", batches)
  again = shrunk(workdir)
  assert {stage: smoke.arrays(workdir / stage, STEPS) for stage in quickstart.STAGES} == before
  timeless = lambda record: {key: value for key, value in record.items() if key not in ("wall_s", "sft", "commit")}
  assert timeless(again) == timeless(summary)
  assert again["sft"] == pytest.approx(summary["sft"])


def test_a_policy_is_judged_by_itself(whole, shrunk):
  workdir, summary = whole
  policies = {name: load(workdir / name) for name in ("sft", "dpo")}
  alone = quickstart.evaluate_policies(policies, workdir / "data" / "eval_prompts.jsonl", seed=0)
  np.testing.assert_allclose(*map(jax.tree.leaves, (alone["dpo"], summary["dpo"])), rtol=1e-6)  # whatever follows it
  assert [sample["sft"] for sample in alone["samples"]] == [sample["sft"] for sample in summary["samples"]]


def test_ppo_has_the_settings_of_its_config(monkeypatch):
  monkeypatch.setattr(quickstart, "STAGES", STAGES)
  monkeypatch.setattr(quickstart, "MODEL", MODEL)
  config = load_config(f"{smoke.CONFIGS / 'ppo.py'}").to_dict()
  stage = quickstart.stage_config("ppo", train.epath.Path("runs/quickstart"), seed=0).to_dict()
  habits = {"data": ("eval", "holdout", "cache"), "run": ("eval_every",)}
  for section, values in config.items():
    same = [key for key in values if key not in habits.get(section, ())]
    assert {key: stage[section][key] for key in same} == {key: values[key] for key in same}


def test_stop_signal_ends_it_between_steps(whole, shrunk, tmp_path, monkeypatch):
  stopped = load(whole[0] / "sft")._replace(stopped=True)
  monkeypatch.setattr(quickstart, "fit", lambda *_: stopped)
  with pytest.raises(SystemExit) as caught:
    shrunk(tmp_path)
  assert caught.value.code == 0
  assert not (tmp_path / "summary.json").exists()


@pytest.mark.long
def test_one_device_and_eight_agree(whole, shrunk, tmp_path):
  assert jax.device_count() == 8
  with smoke.devices(1):
    shrunk(tmp_path)
  for stage in quickstart.STAGES:
    np.testing.assert_allclose(smoke.losses(tmp_path / stage), smoke.losses(whole[0] / stage), rtol=0, atol=1e-4)


def test_stages_are_real_runs():
  for stage in quickstart.STAGES:
    config = quickstart.stage_config(stage, train.epath.Path("run"), seed=3)
    assert config.run.seed == 3
    assert config.data.rows % 8 == 0  # the same config on one device and on eight
