"""A sweep is its members' solo runs: the same numbers, in fewer programs, each left as a run of its own."""

import functools
import json
import shlex
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from etils import epath

from alignjax import cli
from alignjax.algorithms import preference
from alignjax.commands.sweep import _copy_best, _newest, expand, explain, group, rank, sweep
from alignjax.errors import InputError
from alignjax.evaluation.held_out import evaluate
from alignjax.model import decoder, lora
from alignjax.model.lora import LoraConfig
from alignjax.report.sweep import table
from alignjax.runs import reference_cache
from alignjax.runs.config import load_config
from alignjax.runs.run import load
from alignjax.runs.workdir import read_config, write_config
from alignjax.train import fit
from alignjax.training import loop
from alignjax.training.optim import OptimizerConfig
from alignjax.types import Batch
from tests import made, smoke

# After a failed read Orbax leaves coroutines behind that nobody awaits.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
_SESSION = tempfile.TemporaryDirectory(prefix="alignjax-sweep-")
CONFIG = f"{smoke.CONFIGS / 'dpo_lora'}.py:smoke"
OVERRIDES = [flag.removeprefix("--config.") for flag in smoke.FLAGS]
AXES = ("beta=0.1,0.5", "lr=1e-3,1e-2")


def members(*axes):
  return expand(CONFIG, axes or AXES, OVERRIDES)


@functools.cache
def swept():
  """A sweep on one device that nothing disturbed: its directory and its result."""
  workdir = Path(_SESSION.name) / "sweep"
  with smoke.devices(1):
    return workdir, sweep(members(), workdir)


def test_grid_is_the_product_with_every_member_checked():
  found = members("beta=0.1,0.3", "optimizer.learning_rate=1e-5", "lora.seed=0,1")
  assert [m.overrides for m in found] == [
    {"algorithm.beta": beta, "optimizer.learning_rate": 1e-5, "lora.seed": seed}
    for beta in (0.1, 0.3)
    for seed in (0, 1)
  ]
  assert [m.config.hparams["beta"] for m in found] == [0.1, 0.1, 0.3, 0.3]
  assert found[0].name == "algorithm.beta=0.1 optimizer.learning_rate=1e-05 lora.seed=0"


def test_listed_commands_train_the_members_alone(capsys):
  axes = ["beta=0.1,0.3", "loss=dpo,dpo:0.8+sft", "lora.seed=1"]
  command = ["sweep", "--config", CONFIG, "--workdir", "gs://bucket/a sweep/", "--sweep", *axes]
  command.append("--config.run.steps=3")
  assert cli.main([*command, "--list"]) == 0
  lines = capsys.readouterr().out.splitlines()
  expected = [member.config for member in expand(CONFIG, axes, ["run.steps=3"])]
  assert len(lines) == len(expected) == 4
  for number, (line, config) in enumerate(zip(lines, expected, strict=True)):
    program, *arguments = shlex.split(line)
    assert (program, arguments[:5]) == (
      "alignjax",
      ["train", "--config", CONFIG, "--workdir", f"gs://bucket/a sweep/{number:02}"],
    )
    assert load_config(CONFIG, [argument.removeprefix("--config.") for argument in arguments[5:]]) == config
  assert cli.main([*command, "--list", "launch/tpu_vm.sh --name dpo-{} --"]) == 0
  launched = capsys.readouterr().out.splitlines()
  assert launched == [
    line.replace("alignjax", f"launch/tpu_vm.sh --name dpo-{number:02} --", 1) for number, line in enumerate(lines)
  ]


@pytest.mark.parametrize(
  ("axis", "said"),
  [
    ("seed=0,1", "one of lora.seed, run.seed"),
    ("betta=0.1", "no such key; the nearest is beta"),
    ("algorithm.betta=0.1", "no key algorithm.betta; the nearest is algorithm.beta"),
    ("beta", "algorithm.beta=VALUE,VALUE"),
    ("beta=high", "beta"),
    ("algorithm.label_smoothing=0.7", "share of flipped labels"),
  ],
)
def test_axis_that_can_not_be_is_one_line(axis, said):
  with pytest.raises(InputError, match=said):
    members(axis)


def test_sizes_that_another_run_decides_are_not_swept():
  with pytest.raises(InputError, match=r"with run\.init=another the model is that one's"):
    expand(CONFIG, ["model.layers=1,2"], [*OVERRIDES, "run.init=another"])
  assert len(expand(CONFIG, ["model.remat=none,full"], [*OVERRIDES, "run.init=another"])) == 2


def test_what_is_traced_is_one_program_and_the_rest_is_not():
  assert group(members("beta=0.1,0.3", "lr=1e-5,1e-4", "lora.seed=0,1")) == [list(range(8))]
  assert group(members("lora.rank=2,4", "beta=0.1,0.3")) == [[0, 1], [2, 3]]
  for axis in ("algorithm.loss=dpo,ipo", "data.rows=8,16", "run.seed=0,1", "optimizer.b2=0.9,0.99"):
    assert group(members(axis)) == [[0], [1]]
  assert group(members("lora.rank=0", "beta=0.1,0.3")) == [[0], [1]]


def test_what_is_no_part_of_the_program_is_said():
  say = lambda *axes: "\n".join(explain(found := members(*axes), group(found)))
  assert "4 members in 1 program(s) of 4" in say()
  assert "lora.rank: not traced, so every value is a program and a process of its own" in say("lora.rank=2,4")
  assert "full weights are not vectorised" in say("lora.rank=0", "beta=0.1,0.3")


# Matmuls of K members have other shapes than those of one, and sum in another order: float32 rounding, in six steps of
# Adam at learning rates of 1e-3 and 1e-2. Measured: 2e-6 in losses; 2e-6 and 5e-5 in factors of size 0.15.
@pytest.mark.long
def test_member_equals_its_solo_run(tmp_path):
  workdir, result = swept()
  for k in (0, 3):
    with smoke.devices(1):
      solo = fit(members()[k].config, tmp_path / str(k))
    np.testing.assert_allclose(
      smoke.losses(workdir / "runs" / f"{k:02}"), smoke.losses(tmp_path / str(k)), rtol=0, atol=2e-5
    )
    for name, value in solo.metrics.items():
      if name.startswith("eval/") and "accuracies" not in name:
        assert result["members"][k]["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-4)
    with smoke.devices(1):
      own = load(workdir / "runs" / f"{k:02}")
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=3e-4), own.params["lora"], solo.params["lora"]
    )


def test_members_differ_and_begin_alike():
  workdir, _ = swept()
  losses = np.array([smoke.losses(workdir / "runs" / f"{k:02}") for k in range(4)])
  np.testing.assert_allclose(losses[:, 0], np.log(2), atol=1e-5)
  assert len({round(value, 6) for value in losses[:, -1].tolist()}) == 4


def test_best_is_an_ordinary_run():
  workdir, result = swept()
  best = result["members"][result["best"]]
  with smoke.devices(1):
    run = load(workdir / "best")
    assert run.step == smoke.STEPS
    assert run.config.hparams["beta"] == best["overrides"]["algorithm.beta"]
    numbers = evaluate(workdir / "best")
    assert fit(run.config, workdir / "best").step == smoke.STEPS  # complete: not trained again
  assert numbers["loss"] == pytest.approx(best["metrics"]["eval/loss"], rel=1e-5)


def test_table_and_plot_and_json():
  workdir, result = swept()
  assert json.loads((workdir / "sweep.json").read_text()) == result
  assert (workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")
  lines = table(result).splitlines()
  assert lines[0].split()[:3] == ["beta", "learning_rate", "eval/rewards/accuracies"]
  assert [int(line[:2]) for line in lines[1:]] == result["order"]
  accuracy = [result["members"][i]["metrics"]["eval/rewards/accuracies"] for i in result["order"]]
  assert accuracy == sorted(accuracy, reverse=True)


def test_members_rank_by_what_is_asked():
  rows = [
    {"metrics": {"loss": 2.0}},
    {"failed": "status 2"},
    {"metrics": {"loss": 1.0}},
    {"metrics": {"loss": float("nan")}},
  ]
  assert rank(rows, "loss:min") == [2, 0, 1, 3]
  assert rank(rows, "loss:max") == [0, 2, 1, 3]
  with pytest.raises(InputError, match="no member ended with that metric; they have loss"):
    rank(rows, "eval/loss:min")


@pytest.mark.long
def test_killed_sweep_continues_to_the_same_end(tmp_path):
  workdir, result = swept()
  with smoke.devices(1):
    smoke.interrupted_by(lambda: sweep(members(), tmp_path), 5)
    again = sweep(members(), tmp_path)
  assert again["members"] == result["members"]
  for k in range(4):
    name = f"runs/{k:02}"
    assert smoke.arrays(tmp_path / name) == smoke.arrays(workdir / name)
    assert smoke.lines(tmp_path / name) == smoke.lines(workdir / name)


@pytest.mark.long
def test_a_finished_sweep_says_the_same_again(tmp_path):
  axes = ("beta=0.1,0.5", "run.steps=2", "data.holdout=0")
  with smoke.devices(1):
    first = sweep(members(*axes), tmp_path)
    assert first["ranking"] == "rewards/accuracies:max"
    best = load(tmp_path / "best").config
    assert fit(best.replace({"run.steps": 3}), tmp_path / "best").step == 3  # trained on, which is not lost
    assert sweep(members(*axes), tmp_path) == first
    assert load(tmp_path / "best").step == 3
    losses = [row["metrics"]["loss"] for row in first["members"]]
    other = "loss:max" if losses[first["best"]] == min(losses) else "loss:min"
    with pytest.raises(InputError, match=r"best: holds what this sweep did not write, .* move it away"):
      sweep(members(*axes), tmp_path, other)
    assert load(tmp_path / "best").step == 3
    (tmp_path / "best").rename(tmp_path / "kept")
    assert sweep(members(*axes), tmp_path, other)["best"] == 1 - first["best"]
    assert load(tmp_path / "best").step == 2


def test_a_copy_of_another_member_goes_and_nothing_else(tmp_path):
  def run(name, beta, *steps):
    folder = tmp_path / name
    write_config(epath.Path(folder), members(f"beta={beta}")[0].config)
    for step in steps:
      (folder / "checkpoints" / str(step)).mkdir(parents=True)
    lines = [json.dumps({"step": step, "beta": beta}) + "\n" for step in range(1, max(steps, default=0) + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return epath.Path(folder)

  beta = lambda: read_config(best).hparams["beta"]
  runs, best = [run("a", 0.1, 2, 4), run("b", 0.5, 2, 4)], epath.Path(tmp_path / "best")
  for ranked in (runs, runs[::-1]):
    _copy_best(ranked, best)
    assert (beta(), _newest(best)) == (read_config(ranked[0]).hparams["beta"], 4)
  shutil.rmtree(best)
  _copy_best(runs, run("best", 0.5, 2))  # as the second run once was
  assert beta() == 0.1
  for name, steps in ((0.5, (2, 6)), (0.9, (2,)), (0.5, ())):
    shutil.rmtree(best)
    run("best", name, *steps)
    with pytest.raises(InputError, match=r"holds what this sweep did not write, .* not as far as, or another than"):
      _copy_best(runs, best)
  (best / "metrics.jsonl").write_text("{}\n")
  (best / "checkpoints" / "2").mkdir(parents=True)  # trained on from the copy of step 1, and not yet as far
  with pytest.raises(InputError, match="holds what this sweep did not write"):
    _copy_best(runs, best)


@pytest.mark.long
def test_members_share_a_reference_cache_with_their_solo_runs(tmp_path):
  cached = [*OVERRIDES, f"run.reference_cache={tmp_path / 'cache'}"]
  with smoke.devices(1), mock.patch.object(reference_cache, "_fill", side_effect=reference_cache._fill) as fill:
    found = expand(CONFIG, AXES, cached)
    fit(found[0].config, tmp_path / "solo")
    scored = fill.call_count
    fit(found[0].config.replace({"lora.rank": 0, "run.steps": 2}), tmp_path / "whole")  # the same reference
    result = sweep(found, tmp_path / "sweep")
  assert scored == fill.call_count == 2  # the training examples and the held-out ones, once
  live = swept()[1]
  for k in range(4):
    for name in ("loss", "eval/loss", "eval/rewards/margins"):
      value = live["members"][k]["metrics"][name]
      assert result["members"][k]["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-4)


def test_a_sweep_refuses_seeds_that_draw_nothing(tmp_path):
  with pytest.raises(InputError, match=r"lora\.seed: draws factors, but lora\.init=adapter brings them"):
    sweep(members("lora.seed=0,1", "lora.init=adapter"), tmp_path)


def test_a_sweep_refuses_what_takes_one_run_of_a_process(tmp_path):
  with pytest.raises(InputError, match=r"run\.loggers=wandb: it takes one run of a process"):
    sweep(members("beta=0.1,0.5", "run.loggers=wandb"), tmp_path)


def test_a_sweep_refuses_another_reference_than_its_base(tmp_path):
  with pytest.raises(InputError, match=r"run\.reference=another: the reference is the base under the factors"):
    sweep(members("beta=0.1,0.5", "run.reference=another"), tmp_path)


@pytest.mark.long
def test_a_sweep_traces_the_steps_that_are_asked_for(tmp_path):
  with smoke.devices(1):
    sweep(members("beta=0.1,0.5", "run.profile=1", "run.eval_every=0"), tmp_path)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_sweep_refuses_moments_on_the_host(tmp_path):
  with pytest.raises(InputError, match=r"optimizer\.offload: a sweep's members keep their few moments on the device"):
    sweep(members("beta=0.1,0.5", "optimizer.offload=True"), tmp_path)


def test_directory_of_another_sweep_is_refused(tmp_path):
  workdir = smoke.copy(swept()[0], tmp_path / "sweep")
  with pytest.raises(InputError, match="holds another sweep"):
    sweep(members("beta=0.1"), workdir)
  with pytest.raises(InputError, match="is not empty and holds no sweep"):
    sweep(members(), smoke.copy(workdir / "best", tmp_path / "run"))


def test_the_reference_is_computed_once_for_all_members(config, preference_batch, one_device):
  model = lora.adapt(decoder.make(config), LoraConfig(rank=2))
  algorithm = made.make(preference.RECIPE, model)
  _, held = model.split(model.abstract())
  hparams = made.hparams(preference.RECIPE) | {"learning_rate": 1e-3}

  def flops(count):
    program = loop.of_members(OptimizerConfig(), 9, model, algorithm, one_device, tuple(range(count)))
    arguments = (
      Batch(preference_batch),
      program.stack([hparams] * count),
      {"reference": held},
      held,
      jax.random.key(0),
    )
    return program.update.lower(program.state, *arguments).cost_analysis()["flops"]

  one, four = flops(1), flops(4)
  assert four < 3.4 * one


@pytest.mark.long
def test_programs_that_differ_are_processes_of_their_own(tmp_path, capsys):
  command = ["sweep", "--config", CONFIG, "--workdir", str(tmp_path / "sweep"), *smoke.FLAGS]
  assert cli.main([*command, "--sweep", "lora.rank=0,2", "beta=0.1,0.5", "--best", "eval/loss:min"]) == 0
  assert "4 members in 3 program(s) of 1, 1, 2" in capsys.readouterr().out
  result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
  assert [row["program"] for row in result["members"]] == [0, 1, 2, 2]
  for row in result["members"]:
    assert evaluate(tmp_path / "sweep" / row["directory"])["loss"] == pytest.approx(
      row["metrics"]["eval/loss"], rel=1e-5
    )
