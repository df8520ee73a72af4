"""The report is one file that stands alone, shows what the run measured, and trusts nothing that it shows."""

import html.parser
import json
import re
import shutil

import numpy as np
import pytest

from alignjax.environments.testbed import WEIGHTS
from alignjax.errors import InputError
from alignjax.report import figure, outcome, render


def rows(stage, count):
  """Lines of a metrics.jsonl, with an evaluation after every tenth."""
  for i in range(1, count + 1):
    share = i / count
    row = {"step": i, "loss": 3.0 - 2 * share, "grad_norm": 1.0, "skipped": 0, "data/kept": 800, "data/dropped": 3}
    if stage != "sft":
      row |= {"rewards/chosen": share, "rewards/rejected": -share, "rewards/margins": 2 * share}
    yield row
    if i % 10 == 0:
      yield {"step": i, "eval/loss": 3.1 - 2 * share}


def write_stage(folder, stage, count=60):
  folder.mkdir(parents=True)
  record = {"config": {"algorithm": {"name": stage, "beta": 0.125}}, "versions": {"jax": "9.8.7"}, "commit": "f00d"}
  (folder / "config.json").write_text(json.dumps(record))
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(stage, count)))


def shares(suffix, value):
  for name in ("capability", "sycophancy", "over_refusal", "harm"):
    yield f"{name}{suffix}", value
    yield f"{name}{suffix}_interval", [value - 0.05, value + 0.05]


def policy(gold, kl):
  return {
    "gold_win_rate_vs_sft": 0.79,
    "gold_win_rate_interval": [0.74, 0.84],
    "kl": kl,
    "kl_stderr": 0.25,
    "gold_mean": gold,
    "gold_mean_interval": [gold - 0.25, gold + 0.25],
    "gold_mean_sft": -0.25,
    "gold_mean_sft_interval": [-0.5, 0.0],
    "components": dict.fromkeys(WEIGHTS, 0.2),
    "components_sft": dict.fromkeys(WEIGHTS, -0.1),
    **dict(shares("", 0.9)),
    **dict(shares("_sft", 0.6)),
  }


SUMMARY = {
  "seed": 17,
  "versions": {"jax": "9.8.7"},
  "commit": "cafe",
  "sft": {},
  "reward": {
    "heldout_accuracy": 0.8125,
    "heldout_interval": [0.7875, 0.8375],
    "bayes_accuracy": 0.8375,
    "ece": 0.021,
    "reliability": [
      {"confidence": 0.6, "accuracy": 0.55, "count": 40},
      {"confidence": 0.9, "accuracy": 1.0, "count": 9},
    ],
  },
  "dpo": policy(1.75, 5.5),
  "ppo": policy(2.25, 7.5) | {"gold_win_rate_vs_dpo": 0.65625, "gold_win_rate_vs_dpo_interval": [0.625, 0.6875]},
  "wall_s": {"sft": 70.5, "reward": 61.0, "dpo": 50.25, "ppo": 40.0},
  "samples": [
    {
      "prompt": "What is 2 + 2? <b>bold</b>",
      "family": "arithmetic",
      "sft": "<script>alert('sft')</script>",
      "dpo": "</td></table>{{ 7 * 7 }} & four",
      "ppo": "<i>slanted</i>",
      "gold_sft": -1.5,
      "gold_dpo": 2.5,
      "gold_ppo": 3.0625,
    }
  ],
}


@pytest.fixture
def quickstart(tmp_path):
  for stage in ("sft", "reward", "dpo", "ppo"):
    write_stage(tmp_path / stage, stage)
  (tmp_path / "data").mkdir()
  (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
  return tmp_path


class Page(html.parser.HTMLParser):
  """Collects tags, ids, text; fails on a tag that is closed out of turn."""

  VOID = frozenset({"meta", "br", "link", "img"})

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], []
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)

  def values(self, name):
    return [value for key, value in self.attributes if key == name]


def test_the_page_stands_alone(quickstart):
  text = render(quickstart).read_text()
  page = Page(text)
  assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
  references = page.values("href") + page.values("src") + page.values("xlink:href") + re.findall(r"url\((.*?)\)", text)
  assert all(reference.startswith("#") for reference in references)
  ids = page.values("id")
  assert len(ids) == len(set(ids))
  assert {reference[1:] for reference in references} <= set(ids)
  assert [line for line in re.findall(r"https?://[^\"' ]+", text) if "www.w3.org" not in line] == []
  assert not any(name.startswith("on") for name, _ in page.attributes)


def test_every_figure_is_told_in_words(quickstart):
  page = Page(render(quickstart).read_text())
  assert page.tags.count("svg") == 8  # three outcomes, calibration, four stages
  labels = page.values("aria-label")
  assert len(labels) == len(set(labels)) == 8
  assert any("stated 0.60, right 0.55 of 40" in label for label in labels)
  assert any(
    "Mean gold reward: SFT -0.25, DPO 1.75, PPO 2.25; KL, nats per completion: SFT 0, DPO 5.5" in x for x in labels
  )
  assert page.tags.count("figcaption") == 8


def test_what_was_measured_is_shown(quickstart):
  text = " ".join(Page(render(quickstart).read_text()).text)
  for shown in (
    "0.812",
    "0.787 to 0.838",
    "can expect is 0.838",
    "0.790",
    "1.750",
    "−0.250",
    "5.500",
    "2.250",
    "0.656",
  ):
    assert shown in text
  assert "5.010 to 5.990" in text  # of kl_stderr
  assert "0.625 to 0.688" in text
  for provenance in ("cafe", "9.8.7", "seed 17", "70.5", "221.8", '"beta": 0.125', "dropped", "800"):
    assert provenance in text


def test_what_a_model_wrote_is_text(quickstart):
  source = render(quickstart).read_text()
  text = "".join(Page(source).text)
  assert "<script>alert('sft')</script>" in text
  assert "</td></table>{{ 7 * 7 }} & four" in text
  assert "What is 2 + 2? <b>bold</b>" in text
  assert "<script" not in source
  assert "<i>slanted</i>" in text
  assert "<b>" not in source
  assert "<i>" not in source


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(quickstart):
  assert render(quickstart).read_bytes() == render(quickstart, "again.html").read_bytes()
  assert not list(quickstart.glob("*.partial"))


def test_a_training_run_alone_has_a_report(tmp_path):
  write_stage(tmp_path / "run", "dpo")
  path = render(tmp_path / "run")
  page = Page(path.read_text())
  assert str(path) == str(tmp_path / "run" / "report.html")
  assert page.tags.count("svg") == 1
  text = " ".join(page.text)
  for shown in ("run, eval/loss", "1.100", "f00d", "9.8.7"):
    assert shown in text


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
  write_stage(tmp_path / "run", "sft", count=0)
  assert "No metrics were logged." in render(tmp_path / "run").read_text()


@pytest.mark.parametrize(
  ("stage", "keys"),
  [
    ("dpo", ["components"]),
    ("dpo", ["components_sft", "kl_stderr", "harm", "harm_interval"]),
    ("dpo", ["kl", "kl_stderr", "gold_mean_interval"]),
    ("dpo", list(SUMMARY["dpo"])),
    ("ppo", ["components_sft", "gold_mean_sft", "capability_sft", "gold_win_rate_interval"]),
    ("reward", ["reliability", "bayes_accuracy", "heldout_interval"]),
  ],
)
def test_what_was_not_measured_is_left_out(tmp_path, stage, keys):
  summary = SUMMARY | {stage: {k: v for k, v in SUMMARY[stage].items() if k not in keys}}
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  Page(render(tmp_path).read_text())


@pytest.mark.parametrize("absent", ["dpo", "ppo"])
def test_a_quickstart_with_one_policy_less_has_a_report(quickstart, absent):
  summary = {key: value for key, value in SUMMARY.items() if key != absent}
  summary["samples"] = [{k: v for k, v in sample.items() if absent not in k} for sample in SUMMARY["samples"]]
  (quickstart / "summary.json").write_text(json.dumps(summary))
  shutil.rmtree(quickstart / absent)
  source = render(quickstart).read_text()
  assert Page(source).tags.count("svg") == 7
  assert absent.upper() not in source


def test_what_was_measured_of_the_first_policy_is_in_the_sections_of_the_others():
  found = outcome.records(SUMMARY)
  assert list(found) == ["sft", "dpo", "ppo"]
  assert found["sft"]["gold_mean"] == -0.25
  assert found["sft"]["harm_interval"] == pytest.approx([0.55, 0.65])
  assert outcome.records({"sft": {"eval/loss": 1.0}}) == {}


def test_policies_differ_in_colour_and_in_shape():
  colors, shapes = zip(*figure.POINTS, strict=True)
  assert len(set(colors)) == len(set(shapes)) >= len(outcome.NAMES)


def test_a_summary_alone_has_a_report(tmp_path):
  (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
  assert Page(render(tmp_path).read_text()).tags.count("svg") == 4


def test_a_metric_without_a_panel_gets_one_of_its_own(tmp_path):
  write_stage(tmp_path / "ppo", "ppo")
  with (tmp_path / "ppo" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 61, "objective/kl": 0.25, "own/metric": 1, "own/rate": 8, "broken": NaN}\n')
    file.write('{"step": 62, "own/metric": 2, "own/rate": 8}\n{"step": 63, "unfin')
  source = render(tmp_path).read_text()
  for panel in ("KL from the reference", "own/metric"):
    assert panel in source
  assert "Throughout: grad_norm 1, own/rate 8." in source  # lines would say no more
  assert "broken" not in source  # never a finite number
  assert "unfin" not in source  # still being written


@pytest.mark.parametrize(
  ("file", "content", "message"),
  [
    ("sft/metrics.jsonl", '{"step": 1}\n{"step": 2,\n', r"metrics.jsonl:2: not JSON"),
    ("sft/metrics.jsonl", '{"loss": 1.0}\n', r'metrics.jsonl:1: no integer "step"'),
    ("sft/metrics.jsonl", "[1]\n", r"metrics.jsonl:1: expected a JSON object, found list"),
    ("summary.json", "{", r"summary.json: not JSON"),
  ],
)
def test_a_malformed_file_is_named(quickstart, file, content, message):
  (quickstart / file).write_text(content)
  with pytest.raises(InputError, match=message):
    render(quickstart)


def test_a_place_without_a_run_is_named(tmp_path):
  with pytest.raises(InputError, match=r"neither metrics.jsonl nor summary.json"):
    render(tmp_path)
  with pytest.raises(InputError, match="no such directory"):
    render(tmp_path / "nowhere")


def test_a_moving_average_keeps_level_and_trend():
  line = np.linspace(1.0, 3.0, 200)
  np.testing.assert_allclose(figure.moving_average(line), line)
  noisy = line + np.random.default_rng(0).normal(0, 1, 200)
  smooth = figure.moving_average(noisy)
  assert smooth.shape == (200,)
  assert np.std(np.diff(smooth)) < 0.3 * np.std(np.diff(noisy))


@pytest.mark.parametrize("color", [figure.BLUE, figure.ORANGE, figure.GREEN])
@pytest.mark.parametrize("paper", ["#ffffff", "#14171c"])
def test_colours_stand_out_on_a_light_and_a_dark_page(color, paper):
  def luminance(code):
    channels = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear)) + 0.05

  contrast = luminance(color) / luminance(paper)
  assert max(contrast, 1 / contrast) >= 3  # WCAG 2.1, 1.4.11
