"""The benchmark of objectives: that it knows them all, runs none twice, and draws from its numbers alone."""

import json
from pathlib import Path

import pytest
from etils import epath

from alignjax.algorithms import ALGORITHMS
from alignjax.commands import quickstart
from alignjax.errors import InputError
from benchmarks import objectives, objectives_figure, result
from tests.commands.test_quickstart import shrunk  # noqa: F401  (a fixture)


def test_every_objective_that_pairs_can_feed_has_settings():
  known = objectives.objectives()
  assert set(ALGORITHMS["preference"].losses) | set(ALGORITHMS["unpaired"].losses) >= known.keys()
  assert {"dpo", "simpo", "kto"} <= known.keys()
  assert {setting.loss or name for name, setting in objectives.SETTINGS.items()} == known.keys()


@pytest.mark.parametrize("name", objectives.SETTINGS)
def test_settings_are_a_config_with_a_reason(name):
  setting = objectives.SETTINGS[name]
  config = objectives.make_config(name, epath.Path("work"), Path("pairs.jsonl"), seed=3, steps=50)
  assert config.algorithm.loss == (setting.loss or name)
  assert setting.hparams.items() <= config.hparams.items()
  assert (config.run.steps, config.run.seed, config.run.init) == (50, 3, "work/sft")
  assert setting.reason


def make_run(objective, noise, seed, wins, kl, **settings):
  settings = {"name": "preference", "loss": objective} | settings
  numbers = {"gold_win_rate_vs_sft": wins, "prompts": 100, "kl": kl, "kl_stderr": 0.1}
  return {"objective": objective, "label_noise": noise, "seed": seed, "settings": settings, **numbers}


def test_an_objectives_seeds_are_one_point():
  runs = [make_run("dpo", 0.0, seed, wins, 2.0 + seed) for seed, wins in enumerate((0.6, 0.7))]
  runs += [make_run("simpo", 0.0, 0, 0.9, 5.0), make_run("kto", 0.0, 0, 0.5, 1.0, name="unpaired")]
  best, point, last = objectives_figure.points(runs)
  assert (best.name, best.family) == ("simpo", "none")
  assert (last.name, last.family) == ("kto", "labels")
  assert (point.name, point.family) == ("dpo", "reference")
  assert point.wins[0] == pytest.approx(0.65)
  # Seeds answer the same prompts: more of them make no interval narrower.
  assert point.kl == pytest.approx((2.5, 2.5 - 1.96 * 0.1, 2.5 + 1.96 * 0.1))
  assert point.seeds == [(2.0, 0.6), (3.0, 0.7)]
  assert point.wins[1] < 0.6 < 0.7 < point.wins[2]


def test_the_figure_shows_every_objective_at_every_noise(tmp_path):
  runs = [make_run(name, noise, 0, 0.7, 3.0) for name in ("dpo", "simpo") for noise in (0.0, 0.2)]
  (tmp_path / "objectives.json").write_text(json.dumps({"runs": runs}))
  svg = objectives_figure.draw(tmp_path / "objectives.json").read_text()
  assert svg.startswith("<?xml")
  for text in ("dpo", "simpo", "70.0%", "20% of the labels turned over"):
    assert f">{text}<" in svg
  assert svg == objectives_figure.draw(tmp_path / "objectives.json").read_text()


@pytest.mark.long
def test_a_finished_run_is_not_run_again(shrunk, tmp_path, monkeypatch):  # noqa: F811
  monkeypatch.setattr(result, "RESULTS", tmp_path / "results")
  monkeypatch.setattr("sys.argv", ["objectives.py"])
  work, names = epath.Path(tmp_path / "work"), ["dpo", "kto"]
  objectives.run_all(names, work, noises=[0.0, 0.2], seeds=[0], steps=2)
  written = json.loads((tmp_path / "results" / "objectives.json").read_text())
  assert [(run["label_noise"], run["objective"]) for run in written["runs"]] == [
    (noise, name) for noise in (0.0, 0.2) for name in names
  ]
  assert not list(work.glob("steps-2/*/*/*/checkpoints"))
  clean, noisy = (work / "pairs" / f"noise-{noise}-seed-0" / "preference.jsonl" for noise in ("0", "0.2"))
  texts = [[{r["chosen"], r["rejected"]} for r in map(json.loads, p.read_text().splitlines())] for p in (clean, noisy)]
  assert texts[0] == texts[1]
  assert clean.read_text() != noisy.read_text()

  monkeypatch.setattr(objectives, "fit", lambda config, folder, name: pytest.fail(f"{name} runs again"))
  sft = quickstart.fit(quickstart.stage_config("sft", work, 0), work / "sft")
  again = objectives.one("dpo", work, sft, 0.2, 0, 2)
  assert again in written["runs"]
  monkeypatch.setitem(objectives.SETTINGS, "dpo", objectives.Setting({"beta": 0.5}, "other"))
  with pytest.raises(InputError, match=r"made with .*remove it, or change --workdir"):
    objectives.one("dpo", work, sft, 0.2, 0, 2)
