"""A folder of Hugging Face's is a start for every kind of run, and every run can be written as one."""

import functools
import json
import math
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from alignjax.cli import main
from alignjax.commands.export import _write_tokenizer, export, plain
from alignjax.data import load_tokenizer
from alignjax.errors import InputError
from alignjax.evaluation.held_out import evaluate
from alignjax.model import ModelConfig, decoder
from alignjax.model.huggingface import weights
from alignjax.runs.build import with_sizes
from alignjax.runs.run import load, sample
from alignjax.runs.workdir import write_config
from alignjax.system.fingerprint import fingerprint
from alignjax.train import fit
from alignjax.training import metrics
from tests import smoke

_SESSION = tempfile.TemporaryDirectory(prefix="alignjax-export-")
PROMPTS = ["What is 12 + 5?"]
# Nothing in the smoke configs is like this: every size has to come from the folder.
QWEN3 = ModelConfig(
  vocab=576,
  layers=3,
  embed=32,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp=48,
  tied=False,
  query_key_norm=True,
  rope_theta=1e6,
  max_positions=256,
)


@functools.cache
def folder(head="none"):
  """A model of random weights with the smoke runs' tokenizer, as transformers would have written it."""
  path = Path(_SESSION.name) / f"qwen3-{head}"
  scores = {"head": head, "tied": True} if head == "scalar" else {}
  model = decoder.make(ModelConfig(**(QWEN3.__dict__ | scores)))
  params = jax.jit(model.init)(jax.random.key(5))
  weights.save(path, model, params, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
  (path / "tokenizer.model").write_bytes((smoke.DATA / "tokenizer.model").read_bytes())
  return str(path)


def config(name, **overrides):
  return smoke.config(name, **{"run__init": folder(), **overrides})


@functools.cache
def dpo():
  workdir = Path(_SESSION.name) / "dpo"
  return workdir, fit(config("dpo"), workdir)


@pytest.mark.long
def test_dpo_begins_with_the_folder_s_weights_at_log_2():
  workdir, run = dpo()
  assert metrics.read(workdir / "metrics.jsonl")[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
  assert run.model.config.layers == 3
  assert run.config.model.query_key_norm
  assert run.config.model.vocab == 576


@pytest.mark.long
def test_a_run_from_a_folder_continues_and_is_the_same(tmp_path):
  smoke.interrupt(config("dpo"), tmp_path, 1)
  fit(config("dpo"), tmp_path)
  assert smoke.arrays(tmp_path) == smoke.arrays(dpo()[0])


@pytest.mark.long
def test_the_next_run_takes_its_sizes_from_the_one_before(tmp_path):
  workdir, run = dpo()
  after = fit(config("dpo", run__init=str(workdir), run__steps=2), tmp_path)
  assert after.model.config == run.model.config


@pytest.mark.parametrize(
  "name", ["dpo_lora", *(pytest.param(name, marks=pytest.mark.long) for name in ("sft", "reward"))]
)
@pytest.mark.long
def test_every_kind_of_run_begins_there_and_goes_back(name, tmp_path):
  run = fit(config(name, run__steps=2), tmp_path / "run")
  export(tmp_path / "run", tmp_path / "out")
  model, params = plain(run)
  again = load(tmp_path / "out")
  assert again.model.config.head == model.config.head
  held = {key: tree for key, tree in params.items() if key in again.params}
  assert fingerprint(again.params) == fingerprint(held)
  assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (smoke.DATA / "tokenizer.model").read_bytes()


@pytest.mark.long
def test_ppo_takes_policy_and_reward_model_from_folders(tmp_path):
  rewards = {"algorithm__rewards": "reward_model+regex:0", "algorithm__reward_model": folder("scalar")}
  run = fit(config("ppo", **rewards, run__steps=2, run__eval_every=0), tmp_path)
  assert np.isfinite(run.metrics["loss"])
  export(tmp_path, tmp_path / "out")
  assert "value" not in load(tmp_path / "out").params


def test_a_folder_is_sampled_from_and_evaluated():
  run = load(folder())
  first = sample(run, PROMPTS, max_new_tokens=4)[0][0]
  assert len(first.logps) == len(first.tokens)
  assert main(["generate", "--workdir", folder(), "--prompt", PROMPTS[0], "--max-new-tokens", "4"]) == 0
  assert evaluate(folder("scalar"), data=str(smoke.DATA / "preference.jsonl"))["pairs"] > 0
  with pytest.raises(InputError, match="holds a model's weights and no run"):
    load(folder(), 3)


def test_bfloat16_is_written_on_request_and_config_says_so(tmp_path):
  assert main(["export", "--workdir", str(dpo()[0]), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
  assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
  assert {str(t.dtype) for t in weights.read_tensors(str(tmp_path / "out")).values()} == {"bfloat16"}
  assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
  with pytest.raises(InputError, match="not empty"):
    export(dpo()[0], tmp_path / "out")


def test_a_sentencepiece_tokenizer_goes_along_in_hugging_face_s_files(tmp_path):
  export(dpo()[0], tmp_path / "out")
  ours, theirs = (load_tokenizer(path) for path in (smoke.DATA / "tokenizer.model", tmp_path / "out"))
  assert (tmp_path / "out" / "tokenizer.json").exists()
  dialogue = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": PROMPTS[0]}]
  assert theirs.render(dialogue, add_generation_prompt=True) == ours.render(dialogue, add_generation_prompt=True)
  assert theirs.stop_id == ours.stop_id


def test_a_vocabulary_that_is_too_small_is_an_error_at_the_start(tmp_path):
  small = decoder.make(ModelConfig(**(QWEN3.__dict__ | {"vocab": 100})))
  params = jax.jit(small.init)(jax.random.key(5))
  weights.save(tmp_path / "small", small, params, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
  with pytest.raises(InputError, match=r"vocab=100, but data\.tokenizer=.* has 512 tokens"):
    fit(config("dpo", run__init=str(tmp_path / "small")), tmp_path / "run")


def test_a_reward_model_is_no_policy(tmp_path):
  with pytest.raises(InputError, match=r"score\.weight"):
    fit(config("dpo", run__init=folder("scalar")), tmp_path / "run")


def test_a_tokenizer_of_any_file_name_is_exported_and_not_its_neighbour(tmp_path):
  shutil.copy(smoke.DATA / "tokenizer.model", tmp_path / "other.model")
  shutil.copy(smoke.DATA / "qwen3" / "tokenizer.json", tmp_path / "other.json")
  shutil.copy(smoke.DATA / "qwen3" / "tokenizer_config.json", tmp_path)
  for name in ("tokenizer.json", "tokenizer.model"):
    (tmp_path / name).write_text("another's")
  for source in ("other.model", "other.json"):
    tokenizer, out = load_tokenizer(tmp_path / source), epath.Path(tmp_path / f"out-{source}")
    out.mkdir()
    _write_tokenizer(out, tokenizer, str(tmp_path / source))
    assert load_tokenizer(out).encode(PROMPTS[0]) == tokenizer.encode(PROMPTS[0])
    assert not any(path.read_bytes() == b"another's" for path in out.iterdir())


def test_weights_are_not_read_with_the_tokenizer_of_others(tmp_path):
  shutil.copytree(folder(), tmp_path / "weights")
  shutil.copy(smoke.DATA / "qwen3" / "tokenizer.json", tmp_path / "weights" / "tokenizer.json")
  with pytest.raises(InputError, match=r"data\.tokenizer: gives other ids than .*tokenizer\.json"):
    fit(config("dpo", run__init=str(tmp_path / "weights")), tmp_path / "run")


def test_an_ensemble_is_not_taken_from_one_head(tmp_path):
  with pytest.raises(InputError, match=r"model\.score_heads=4: .* has 1"):
    fit(config("reward", run__init=folder("scalar"), model__score_heads=4), tmp_path / "run")


@pytest.mark.long
def test_the_sizes_of_a_run_without_a_start_are_its_config_s(tmp_path):
  begun = smoke.config("sft", run__init="")
  write_config(epath.Path(tmp_path), begun)
  other = begun.replace({"model.layers": begun.model.layers + 1})
  assert with_sizes(other, epath.Path(tmp_path)) == other
  with pytest.raises(InputError, match=r"holds another run: model\.layers"):
    fit(other, tmp_path)
