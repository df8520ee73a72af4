"""Paths as people write them: `~` in every key and flag, a run's tokenizer left out, a model of the hub without hf://."""

import json

import numpy as np
import pytest
from etils import epath

from alignjax import cli
from alignjax.data import DataConfig, Dataset, load_tokenizer, read_texts, train_tokenizer
from alignjax.data import cache as cached
from alignjax.data.score_store import ScoreStore
from alignjax.environments import testbed
from alignjax.errors import InputError
from alignjax.evaluation import held_out
from alignjax.rewards import schema
from alignjax.runs import run
from alignjax.runs.build import open_tokenizer, with_sizes
from alignjax.runs.config import load_config, resolve
from alignjax.runs.workdir import whole_run, write_config
from alignjax.training import metrics
from tests import smoke


@pytest.fixture
def home(tmp_path, monkeypatch):
  """The home folder, and the process elsewhere, where nothing may be written."""
  (tmp_path / "home").mkdir()
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path / "elsewhere")
  yield tmp_path / "home"
  assert not list((tmp_path / "elsewhere").iterdir())


def test_data_and_tokenizers_may_lie_in_the_home_folder(home):
  testbed.write("~/data", sft=40, preference=40, evaluation=4, prompts=4)
  assert (home / "data" / "preference.jsonl").exists()
  train_tokenizer(read_texts(["~/data/text.txt", "~/data/sft.jsonl"]), "~/deep/t.model", 400)
  assert [path.name for path in (home / "deep").iterdir()] == ["t.model"]
  tokenizer = load_tokenizer("~/deep/t.model")
  files = {"train": "~/data/preference.jsonl", "eval": "~/data/eval_preference.jsonl", "cache": "~/kept"}
  for split, count in (("train", 40), ("eval", 4)):
    dataset = Dataset.open(DataConfig(**files, row_length=256), tokenizer, "preference", split)
    assert dataset.report["records"] == count
  assert list((home / "kept").iterdir())
  assert cached.directory("~/kept") == home / "kept"


def test_what_a_run_names_may_lie_in_the_home_folder(home, monkeypatch, capsys):
  (home / "own.py").write_text("get_config = lambda variant: {'algorithm': {'name': variant}, 'run': {'steps': 1}}")
  assert load_config("~/own.py:sft").algorithm.name == "sft"
  with pytest.raises(InputError, match=r"no file \S*/home/none\.py"):
    load_config("~/none.py")
  ScoreStore("~/scores", {}, 1).write(np.zeros((1, 32), np.uint8), np.zeros((1, 1)))
  assert (home / "scores" / "scores.sqlite").exists()
  (home / "schema.json").write_text('{"type": "object"}')
  assert schema.parsed("~/schema.json") == {"type": "object"}
  (home / "metrics.jsonl").write_text('{"step": 1}\n')
  assert metrics.read("~/metrics.jsonl") == [{"step": 1}]
  monkeypatch.setattr(held_out, "evaluate", lambda *arguments: {"loss": 1.0})
  assert cli.main(["evaluate", "--workdir", "~/run", "--out", "~/numbers.json"]) == 0
  assert json.loads((home / "numbers.json").read_text()) == {"loss": 1.0}


def config(**sections):
  return resolve({"algorithm": {"name": "sft"}} | sections)


def test_a_run_takes_the_tokenizer_of_the_run_that_it_begins_from(tmp_path):
  first = epath.Path(tmp_path / "first")
  write_config(first, config(data={"tokenizer": str(smoke.DATA / "tokenizer.model")}, run={"steps": 1}))
  second = config(run={"init": str(first), "steps": 1})
  taken = with_sizes(second, epath.Path(tmp_path / "second"))
  assert taken.data.tokenizer == str(smoke.DATA / "tokenizer.model")
  assert open_tokenizer(taken).fingerprint == load_tokenizer(smoke.DATA / "tokenizer.model").fingerprint
  own = config(run={"init": str(first), "steps": 1}, data={"tokenizer": "own.model"})
  assert with_sizes(own, epath.Path(tmp_path / "second")).data.tokenizer == "own.model"


def test_a_folder_of_weights_has_its_own_tokenizer(tmp_path, monkeypatch):
  monkeypatch.setattr("alignjax.runs.build._folder_config", lambda config, path: config.model)
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  taken = with_sizes(config(run={"init": str(tmp_path), "steps": 1}), epath.Path(tmp_path / "run"))
  assert taken.data.tokenizer == str(tmp_path)


def test_a_name_of_the_hub_without_its_scheme_is_told_what_to_write():
  hint = r"if it is a model of the hub, write hf://Qwen/Qwen3-0\.6B; "
  begun = config(run={"init": "Qwen/Qwen3-0.6B", "steps": 1})
  with pytest.raises(InputError, match=rf"run\.init=Qwen/Qwen3-0\.6B: no such run .*{hint}"):
    open_tokenizer(with_sizes(begun, epath.Path("run")))
  with pytest.raises(InputError, match=rf"run\.init=Qwen/Qwen3-0\.6B: no such run .*{hint}"):
    whole_run("run.init", "Qwen/Qwen3-0.6B")
  with pytest.raises(InputError, match=rf"not a run directory.*{hint}"):
    run.load("Qwen/Qwen3-0.6B")
