"""A kill at any write of any command that writes: the same command then ends as if nothing had been.

What is computed is stood for by something quick; what is written, and how a command goes on, is the command's own.
Kills at random moments of real trainings are in test_train.py, and `benchmarks/kill_resume.py`.
"""

import errno
import json
import os
import shutil
import types
from unittest import mock

import numpy as np
import pytest
from etils import epath

from alignjax import cli, report
from alignjax.commands import adapter, best_of, completions, export, iterate, resumable, retrain, reward_domain, rounds
from alignjax.commands import sweep as sweep_lib
from alignjax.commands.best_of import Request
from alignjax.data.sentencepiece_tokenizer import train_tokenizer
from alignjax.data.source import open_source
from alignjax.environments import testbed
from alignjax.errors import InputError
from alignjax.runs import new_run
from alignjax.runs.scorer import Drawn, Scorer, Worth, settings
from alignjax.sampling.generate import Completion
from alignjax.system import output
from alignjax.train import fit
from tests import killed, smoke
from tests.system.test_output import held_elsewhere

PROMPTS = smoke.DATA / "eval_prompts.jsonl"
REQUEST = Request(n=2, max_new_tokens=4, batch_size=8)


@pytest.fixture(autouse=True)
def data_cache(monkeypatch, tmp_path_factory):
  monkeypatch.setenv("ALIGNJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def unless_there(work):
  """`work`, which refuses what is complete."""

  def again():
    try:
      work()
    except InputError as error:
      if "is not empty" not in str(error) and "is there already" not in str(error):
        raise

  return again


def drawn(policy, source, numbers, request):
  """Stands for samples: a function of the prompt's number, as those are."""
  records = [source[number] for number in numbers for _ in range(request.n)]
  texts = [f"answer {number} {k}" for number in numbers for k in range(request.n)]
  made = [Completion(tokens=[1, 2], text=text, logps=np.zeros(2), finished=True) for text in texts]
  prompts = [[{"role": "user", "content": record["prompt"]}] for record in records]
  return [Drawn(record, prompt, [1], one) for record, prompt, one in zip(records, prompts, made, strict=True)]


def scores(samples):
  values = np.array([len(one.prompt[0]["content"]) + int(one.completion.text[-1]) for one in samples], np.float64)
  return Worth(values, {"regex": values}, np.zeros(len(samples), bool))


def fitted(config, workdir, stage=""):
  """Stands for a training."""
  output.write_json(workdir / "config.json", {"config": config.to_dict()})
  output.write(workdir / "checkpoints" / "2" / "params", b"weights")
  loss = config.hparams["learning_rate"]
  rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": loss, "eval/loss": loss}]
  output.write(workdir / "metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
  return types.SimpleNamespace(stopped=False)


@pytest.fixture
def quick(monkeypatch):
  """Samples, scores and trainings that take no time."""
  policy = types.SimpleNamespace(step=2, tokenizer=None, mesh=None)
  for module in (best_of, completions, retrain):
    monkeypatch.setattr(module, "draw", drawn)
    monkeypatch.setattr(module, "identity", lambda policy, source, request, **also: {"request": {}} | also)
  monkeypatch.setattr(best_of, "PART", 5)
  for module in (iterate, retrain):
    monkeypatch.setattr(module, "fit", fitted)
    monkeypatch.setattr(module, "check_sources", lambda *_: None)
    monkeypatch.setattr(module, "load", lambda path, **_: policy)
    monkeypatch.setattr(module, "make_scorer", lambda *_: Scorer(scores, {"rewards": "regex"}))
  monkeypatch.setattr(completions, "_check", lambda *_: None)
  return policy


def test_testbed(tmp_path):
  work = lambda: testbed.write(tmp_path / "root", sft=3, preference=3, evaluation=2, prompts=2, ranked=1)
  assert killed.at_every_write(tmp_path / "root", work) > 15


def test_tokenizer(tmp_path):
  texts = ["Why is the sky blue?\nIt is not.", "Two and two are four."] * 20
  work = lambda: train_tokenizer(texts, tmp_path / "root" / "t.model", 320)
  killed.at_every_write(tmp_path / "root", work)


def test_generate(quick, tmp_path):
  source = open_source(PROMPTS)
  out = tmp_path / "root" / "out.jsonl"
  work = unless_there(lambda: completions.write(quick, source, out, REQUEST))
  assert killed.at_every_write(tmp_path / "root", work) > 20
  assert smoke.files(tmp_path / "root").keys() == {"out.jsonl"}


@pytest.mark.parametrize("pairs", [False, True])
def test_best_of(quick, tmp_path, pairs):
  scorer = Scorer(scores, {"rewards": "regex"})
  work = lambda: best_of.best_of(quick, PROMPTS, scorer, tmp_path / "root" / "out.jsonl", REQUEST, pairs=pairs)
  assert killed.at_every_write(tmp_path / "root", work) > 20


def cut(content):
  return content[: len(content) // 2]


def changed(content):
  return content.replace(b"answer 6", b"answer 7", 1).replace(b'"rows": 5', b'"rows": 4')


@pytest.mark.parametrize("damage", [cut, lambda content: b"", changed])
@pytest.mark.parametrize("name", ["000001.jsonl", "000001.json"])
def test_a_damaged_part_is_made_again(quick, tmp_path, capsys, damage, name):
  scorer = Scorer(scores, {"rewards": "regex"})
  work = lambda: best_of.best_of(quick, PROMPTS, scorer, tmp_path / "out.jsonl", REQUEST)
  work()
  whole = smoke.files(tmp_path)
  part = tmp_path / "out.parts" / name
  part.write_bytes(damage(part.read_bytes()))
  work()
  assert smoke.files(tmp_path) == whole
  assert "000001.jsonl: is damaged; made again" in capsys.readouterr().out


def test_half_of_a_character_goes_into_a_line_and_out_again():
  for row in ({"prompt": "é"}, {"prompt": "a\ud800"}):
    assert json.loads(resumable.line_of(row).encode()) == row
  assert resumable.line_of({"prompt": "é"}) == '{"prompt": "é"}'


def test_parts_of_a_damaged_request_are_refused(quick, tmp_path):
  out = tmp_path / "out.jsonl"
  scorer = Scorer(scores, {"rewards": "regex"})
  best_of.best_of(quick, PROMPTS, scorer, out, REQUEST)
  request = tmp_path / "out.parts" / "request.json"
  request.write_bytes(cut(request.read_bytes()))
  with pytest.raises(InputError, match=r"request\.json: is damaged .*; delete .*out\.parts"):
    best_of.best_of(quick, PROMPTS, scorer, out, REQUEST)


def test_a_damaged_round_is_made_again(tmp_path, capsys):
  path = tmp_path / "round.json"
  make = lambda: {"round": 1, "loss": 0.25}
  once = lambda: rounds.once(path, make)
  assert once() == make()
  path.write_text(path.read_text().replace("0.25", "0.35"))
  assert once() == make()
  assert "round.json: is damaged; made again" in capsys.readouterr().out
  with mock.patch.object(rounds, "write_json", side_effect=AssertionError("made again")):
    assert once() == make()


def test_a_process_that_outlived_its_sweep_is_not_joined_by_another(monkeypatch, tmp_path):
  monkeypatch.setattr(sweep_lib.subprocess, "run", mock.Mock(side_effect=AssertionError("began")))
  (tmp_path / "program-00").mkdir()
  owner = b'{"pid": 7, "host": "far", "doing": "trains", "since": "noon"}'
  with held_elsewhere(tmp_path / "program-00" / output.LOCK, owner), pytest.raises(InputError, match="7 on far trains"):
    sweep_lib._in_process([], tmp_path / "program-00")


def test_a_full_disk_under_the_cache_of_data_is_one_line(monkeypatch, tmp_path):
  monkeypatch.setenv("ALIGNJAX_CACHE", str(tmp_path / "cache"))
  (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  with (
    mock.patch("numpy.save", side_effect=full),
    pytest.raises(InputError, match=r"cache cannot be written \(No space"),
  ):
    open_source(tmp_path / "a.jsonl")
  assert smoke.files(tmp_path / "cache") == {}
  assert len(open_source(tmp_path / "a.jsonl")) == 1


def test_iterate(quick, monkeypatch, tmp_path):
  def measured(plan, workdir, number):
    iterate.write_json(iterate.folder_of(workdir, number) / "heldout.json", {"score": [number]})
    return {"length": 1.0}

  monkeypatch.setattr(iterate, "evaluate", measured)
  plan = iterate.Plan(
    smoke.config("iterative_dpo", run__init="first"), settings("regex"), REQUEST, str(PROMPTS), 6, str(PROMPTS)
  )
  work = lambda: iterate.iterate(plan, tmp_path / "root", 2)
  assert killed.at_every_write(tmp_path / "root", work, most=12) > 5


@pytest.mark.parametrize("people", [False, True])
def test_retrain(quick, monkeypatch, tmp_path, people):
  first = smoke.config("reward")
  monkeypatch.setattr(retrain, "_check", lambda *_: None)
  monkeypatch.setattr(retrain, "read_config", lambda path: first)
  monkeypatch.setattr(retrain, "load_metadata", lambda path: {})
  monkeypatch.setattr(
    retrain, "evaluate", lambda *_, **__: {"pairs": 1, "heldout_accuracy": 0.5, "heldout_interval": [0.0, 1.0]}
  )
  config = smoke.config("rloo", run__init="first", algorithm__reward_model="judge")
  plan = retrain.Plan(config, None if people else settings("regex"), REQUEST, str(PROMPTS), 6, reward_steps=2)
  root = tmp_path / "root"

  def work():
    found = retrain.retrain(plan, root, 2)
    if "unlabelled" in found:
      rows = map(json.loads, found["unlabelled"].ask.read_text().splitlines())
      pairs = [{"prompt": r["prompt"], "chosen": r["responses"][0], "rejected": r["responses"][1]} for r in rows]
      output.write(found["unlabelled"].answer, "".join(f"{json.dumps(pair)}\n" for pair in pairs))
      retrain.retrain(plan, root, 2)

  assert killed.at_every_write(root, work, most=12) > 5


def test_sweep(monkeypatch, tmp_path):
  monkeypatch.setattr(sweep_lib, "fit", fitted)
  monkeypatch.setattr(
    sweep_lib,
    "fit_members",
    lambda configs, runs, workdir: [fitted(*one) for one in zip(configs, runs, strict=True)],
  )
  monkeypatch.setattr(sweep_lib.report, "draw", lambda result, workdir, path: output.write(path, b"figure"))
  overrides = [flag.removeprefix("--config.") for flag in smoke.FLAGS]
  members = sweep_lib.expand(f"{smoke.CONFIGS / 'dpo_lora'}.py:smoke", ["lr=1e-3,1e-2"], overrides)
  root = tmp_path / "root"
  assert killed.at_every_write(root, lambda: sweep_lib.sweep(members, root), most=12) > 5
  assert (root / "best" / "config.json").read_bytes() == (root / "runs" / "00" / "config.json").read_bytes()


def test_a_best_run_in_a_bucket_is_one_when_all_of_it_is_there(tmp_path):
  config, best = smoke.config("dpo"), epath.Path(tmp_path / "best")
  fitted(config, tmp_path / "run")
  count = len(list((tmp_path / "run").iterdir()))
  assert count > 2
  for last in range(1, count):
    point = mock.Mock(side_effect=[None] * (last - 1) + [smoke.Killed])
    with mock.patch.object(output, "local", return_value=False):
      with mock.patch.object(output, "_point", point), pytest.raises(smoke.Killed):
        sweep_lib._copy_best([epath.Path(tmp_path / "run")], best)
      assert len(list(best.iterdir())) == last
      sweep_lib._copy_best([epath.Path(tmp_path / "run")], best)
    assert smoke.files(tmp_path / "best") == smoke.files(tmp_path / "run")
    shutil.rmtree(best)


def test_best_that_was_trained_on_stays(tmp_path):
  config = smoke.config("dpo")
  fitted(config, tmp_path / "run")
  fitted(config, tmp_path / "best")
  output.write(tmp_path / "best" / "checkpoints" / "4" / "params", b"more")
  before = smoke.files(tmp_path / "best")
  sweep_lib._copy_best([epath.Path(tmp_path / "run")], epath.Path(tmp_path / "best"))
  assert smoke.files(tmp_path / "best") == before


def test_evaluate_and_report(monkeypatch, tmp_path):
  fitted(smoke.config("dpo"), tmp_path / "root")
  monkeypatch.setattr("alignjax.evaluation.held_out.evaluate", lambda *_: {"loss": 0.5})

  def work():
    if not (tmp_path / "root").exists():
      fitted(smoke.config("dpo"), tmp_path / "root")
    assert cli.main(["evaluate", "--workdir", "x", "--out", str(tmp_path / "root" / "found.json")]) == 0
    report.render(tmp_path / "root")

  assert killed.at_every_write(tmp_path / "root", work) > 5


@pytest.fixture(scope="module")
def sft():
  from alignjax.runs.run import load

  return load(smoke.finished("sft")[0])


def test_export(sft, tmp_path):
  root = tmp_path / "root"
  work = unless_there(lambda: export.export("run", root / "model"))
  with mock.patch.object(export, "load", return_value=sft):
    assert killed.at_every_write(root, work, most=12) > 8
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.model"} <= smoke.files(root).keys()


def test_a_run_that_is_made_as_a_whole(sft, tmp_path):
  root = tmp_path / "root"
  work = unless_there(lambda: new_run.begin(sft.config, sft.params, root / "run"))

  def outcome(root):
    return smoke.arrays(root / "run", 0), json.loads((root / "run" / "config.json").read_text())

  # The commands that make a run go this way: `adapter merge`, `domain`.
  assert killed.at_every_write(root, work, outcome, most=6) > 3
  assert {module.new_run.whole for module in (adapter, reward_domain)} == {new_run.whole}


@pytest.mark.long
def test_a_training_killed_before_its_first_step(tmp_path):
  root = tmp_path / "root"
  work = lambda: fit(smoke.config("dpo"), root / "run")
  outcome = lambda root: (smoke.arrays(root / "run"), smoke.lines(root / "run"))
  assert killed.at_every_write(root, work, outcome, most=4) > 2
