"""A LoRA run holds its factors alone, finds its base again, and can be exported, merged and continued."""

import functools
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest

from alignjax.commands import adapter, reward_domain
from alignjax.commands.export import export_adapter
from alignjax.errors import InputError
from alignjax.evaluation.held_out import evaluate
from alignjax.model import lora
from alignjax.model.huggingface import peft
from alignjax.runs.initial_params import starting_params
from alignjax.runs.run import load, sample
from alignjax.runs.trust import TRUST
from alignjax.system.fingerprint import fingerprint
from alignjax.train import fit
from alignjax.training import metrics
from tests import smoke

# After a failed read Orbax leaves coroutines behind that nobody awaits.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
_SESSION = tempfile.TemporaryDirectory(prefix="alignjax-lora-")
PROMPTS = ["What is 12 + 5?"]


@functools.cache
def sft():
  """The directory of an SFT run that tests may damage the copies of."""
  return smoke.copy(smoke.finished("sft")[0], Path(_SESSION.name) / "sft")


def config(**overrides):
  return smoke.config("dpo_lora", **{"run__init": str(sft()), "optimizer__learning_rate": 0.01} | overrides)


@functools.cache
def trained():
  """DPO of factors on the SFT run: its directory, and the run."""
  workdir = Path(_SESSION.name) / "dpo"
  return workdir, fit(config(), workdir)


def test_checkpoint_holds_factors_alone_and_names_the_base():
  workdir, run = trained()
  saved = smoke.arrays(workdir)
  assert all(name.startswith("params/lora/") for name in saved if name.startswith("params/"))
  assert not (workdir / "reference").exists()
  assert run.metadata["base"]["init"] == str(sft())
  assert run.metadata["base"]["step"] == smoke.STEPS


def test_it_starts_at_log_2_and_the_base_is_the_sft_run():
  workdir, run = trained()
  first = metrics.read(workdir / "metrics.jsonl")[1]
  assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
  assert fingerprint(run.model.split(run.params)[1]) == fingerprint(smoke.finished("sft")[1].params)


@pytest.mark.long
def test_killed_run_continues_to_the_same_end(tmp_path):
  smoke.interrupt(config(), tmp_path, 5)
  run = fit(config(), tmp_path)
  workdir, whole = trained()
  assert smoke.arrays(tmp_path) == smoke.arrays(workdir)
  assert smoke.lines(tmp_path) == smoke.lines(workdir)
  assert run.metrics == whole.metrics


@pytest.mark.long
def test_loaded_evaluated_and_sampled():
  workdir, run = trained()
  loaded = load(workdir)
  assert fingerprint(loaded.params) == fingerprint(run.params)
  numbers = evaluate(workdir)
  for name, value in run.metrics.items():
    if name.startswith("eval/"):
      assert numbers[name.removeprefix("eval/")] == pytest.approx(value, rel=1e-5, abs=1e-6)
  draw = lambda run: list(sample(run, PROMPTS, max_new_tokens=4)[0][0].tokens)
  assert draw(loaded) == draw(run)


@pytest.mark.long
def test_base_that_has_changed_or_is_gone_is_refused(tmp_path):
  base, workdir = smoke.copy(sft(), tmp_path / "sft"), tmp_path / "dpo"
  fit(config(run__init=str(base), run__steps=2), workdir)
  fit(
    smoke.config("sft", run__steps=smoke.STEPS + 2, run__keep_latest=1, run__keep_best=""), base
  )  # goes on: the old step is deleted
  with pytest.raises(InputError, match=r"has no checkpoint 6; it has"):
    load(workdir)
  other = tmp_path / "other"
  fit(smoke.config("sft", run__seed=3), other)
  base.rename(tmp_path / "aside")
  other.rename(base)
  with pytest.raises(InputError, match=r"the base \(.*, step 6\) is not the one under these LoRA factors"):
    load(workdir)


@pytest.mark.long
def test_base_that_was_moved_is_named_anew(tmp_path):
  base, moved, workdir = smoke.copy(sft(), tmp_path / "sft"), tmp_path / "moved", tmp_path / "dpo"
  smoke.interrupt(config(run__init=str(base)), workdir, 3)
  base.rename(moved)
  assert fit(config(run__init=str(moved)), workdir).step == smoke.STEPS
  assert smoke.arrays(workdir) == smoke.arrays(trained()[0])
  assert load(workdir).config.run.init == str(moved)


def test_merged_run_is_the_same_policy(tmp_path):
  workdir, run = trained()
  adapter.merge(workdir, tmp_path)
  merged = load(tmp_path)
  assert merged.config.lora.rank == 0
  assert fingerprint(merged.params) == fingerprint(lora.merge(run.params, run.config.lora))
  numbers = evaluate(tmp_path)
  assert numbers["loss"] == pytest.approx(run.metrics["eval/loss"], abs=1e-5)
  assert numbers["rewards/margins"] == pytest.approx(run.metrics["eval/rewards/margins"], abs=1e-4)
  fit(config(run__init=str(tmp_path), run__steps=2), tmp_path / "next")
  assert metrics.read(tmp_path / "next" / "metrics.jsonl")[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
  with pytest.raises(InputError, match="is not empty"):
    adapter.merge(workdir, tmp_path)


def test_a_loss_of_the_users_own_is_neither_needed_nor_asked_for(tmp_path, monkeypatch):
  monkeypatch.delenv(TRUST, raising=False)
  workdir = smoke.copy(trained()[0], tmp_path / "run")
  record = json.loads((workdir / "config.json").read_text())
  del record["sha256"]  # as whoever changes it does
  record["config"]["algorithm"]["loss"] = "absent_losses:mine"
  (workdir / "config.json").write_text(json.dumps(record))
  adapter.merge(workdir, tmp_path / "merged")
  assert load(tmp_path / "merged").config.algorithm.loss == "absent_losses:mine"
  assert (tmp_path / "merged" / "reference").exists()
  with pytest.raises(InputError, match="is not the run of a reward model of pairs"):
    reward_domain.write(workdir)
  with pytest.raises(InputError, match="is Python that only the record of a run names"):
    evaluate(tmp_path / "merged")


def test_factors_alone_are_no_start(tmp_path):
  workdir, _ = trained()
  with pytest.raises(InputError, match="alignjax adapter merge --workdir"):
    fit(config(run__init=str(workdir)), tmp_path)


@pytest.mark.long
def test_exported_factors_are_a_start(tmp_path):
  workdir, run = trained()
  export_adapter(workdir, tmp_path / "adapter", base="someone/llama")
  record = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
  assert record["base_model_name_or_path"] == "someone/llama"
  again = fit(config(lora__init=str(tmp_path / "adapter"), run__steps=2), tmp_path / "run")
  first = metrics.read(tmp_path / "run" / "metrics.jsonl")[1]
  assert abs(first["loss"] - math.log(2)) > 1e-4  # not at the reference
  assert fingerprint(load(tmp_path / "run").params) == fingerprint(again.params)
  assert np.isfinite(run.metrics["loss"])


@pytest.mark.long
def test_reward_model_of_factors_trains_its_head_and_merges(tmp_path):
  reward = smoke.config("reward", run__init=str(sft()), lora__rank=4, model__param_dtype="bfloat16")
  run = fit(reward, tmp_path / "run")
  names = {name.split("/")[1] for name in smoke.arrays(tmp_path / "run") if name.startswith("params/")}
  assert names == {"lora", "score"}
  assert np.abs(np.asarray(run.params["score"])).max() > 0
  assert str(run.params["layers"]["q"].dtype) == "bfloat16"
  assert "heldout_accuracy" in evaluate(tmp_path / "run")
  adapter.merge(tmp_path / "run", tmp_path / "merged")
  assert "heldout_accuracy" in evaluate(tmp_path / "merged")


@pytest.mark.long
def test_reward_model_of_factors_goes_through_peft_s_files_with_its_head(tmp_path):
  reward = smoke.config("reward", run__init=str(sft()), lora__rank=4, model__score_heads=2, run__steps=2)
  run = fit(reward, tmp_path / "run")
  export_adapter(tmp_path / "run", tmp_path / "adapter")
  again = reward.replace({"lora.init": str(tmp_path / "adapter")})
  whole = run.model.abstract(run.mesh)
  assert fingerprint(starting_params(again, run.model, run.tokenizer, whole)[0]) == fingerprint(run.params)


@pytest.mark.parametrize("name", ["bco", pytest.param("distillation", marks=pytest.mark.long)])
@pytest.mark.long
def test_merged_run_has_all_that_its_evaluation_takes(name, tmp_path):
  of_sft = {"data__train": str(smoke.DATA / "sft.jsonl"), "algorithm__name": name, "algorithm__loss": ""}
  settings = {
    "bco": {"algorithm__name": "unpaired", "algorithm__loss": "bco"},
    "distillation": of_sft | {"algorithm__teacher": str(sft())},
  }
  run = fit(config(run__steps=2, **settings[name]), tmp_path / "run")
  adapter.merge(tmp_path / "run", tmp_path / "merged")
  assert evaluate(tmp_path / "merged")["loss"] == pytest.approx(run.metrics["eval/loss"], abs=1e-5)
  assert (tmp_path / "merged" / "reference").exists() == (name == "bco")
  assert (tmp_path / "merged" / "teacher").exists() == (name == "distillation")


def test_teacher_of_factors_alone_is_refused(tmp_path):
  workdir, _ = trained()
  student = smoke.config("gkd", algorithm__loss="jsd", algorithm__teacher=str(workdir))
  with pytest.raises(InputError, match=r"algorithm\.teacher=.* LoRA factors .*`alignjax adapter merge --workdir"):
    fit(student, tmp_path)


def test_adapter_without_a_rank_is_refused():
  with pytest.raises(InputError, match=r"lora\.init=somewhere: there are no factors to start; set lora\.rank"):
    smoke.config("dpo", lora__init="somewhere")


def test_run_without_factors_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"has no LoRA factors \(lora\.rank=0\)"):
    export_adapter(sft(), tmp_path / "adapter")


def test_reference_that_follows_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"lora\.rank"):
    fit(config(algorithm__reference="sync"), tmp_path)
