"""Puts the report together: what to show, from what a run left behind."""

import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from etils import epath

from alignjax.report import figure, outcome, workdir
from alignjax.report.figure import Curve, Drawing, Panel
from alignjax.report.text import interval, measured, number
from alignjax.report.workdir import Stage
from alignjax.system import output

TITLES = {
  "sft": "Supervised fine-tuning",
  "reward": "Reward model",
  "dpo": "Direct preference optimisation",
  "ppo": "Proximal policy optimisation",
}

# Panels of every stage, in this order; a metric with none of these has a panel of its own, and one that never changes
# is told in words. The first tell how far a run came, and stand for it where it has no summary.
ENDS = (
  ("loss", ("loss", "eval/loss")),
  ("reward margin", ("rewards/margins", "eval/rewards/margins")),
  ("pair accuracy", ("rewards/accuracies", "eval/rewards/accuracies")),
  ("step accuracy", ("accuracy", "eval/accuracy")),
  ("divergence from the teacher (nats)", ("jsd", "eval/jsd")),
  ("score of a completion", ("objective/scores", "eval/objective/scores", "objective/rlhf_reward")),
  ("KL from the reference (nats)", ("objective/kl", "eval/objective/kl")),
)
PANELS = (
  *ENDS,
  ("reward model's reward", ("rewards/reward_model", "eval/rewards/reward_model")),
  ("length of a completion (tokens)", ("completions/mean_length", "eval/completions/mean_length")),
  ("completions cut off (share)", ("completions/clipped_ratio", "eval/completions/clipped_ratio")),
  ("rewards", ("rewards/chosen", "rewards/rejected")),
  ("log-probs (nats)", ("logps/chosen", "logps/rejected")),
  ("token accuracy", ("mean_token_accuracy", "eval/mean_token_accuracy")),
  ("entropy (nats a token)", ("entropy", "eval/entropy", "policy/entropy", "eval/policy/entropy")),
  ("KL from the sampler (nats a token)", ("policy/approxkl",)),
  ("tokens clipped (share)", ("policy/clipfrac", "val/clipfrac")),
  ("losses of policy and critic", ("loss/policy", "loss/value")),
  ("squared error of the values", ("val/error", "eval/val/error")),
  ("gradient norm", ("grad_norm",)),
  ("learning rate", ("learning_rate",)),
)
HIDDEN = ("data/", "skipped", "eval/")  # counters, and evaluations that no panel pairs with a training metric


class Row(NamedTuple):
  """A line of the headline table; every entry is ready to read."""

  measure: str
  value: str
  interval: str = ""
  note: str = ""


def render(path: epath.PathLike, out: str = "report.html") -> epath.Path:
  """Writes the report of a run directory and returns where it is.

  Works on the quickstart's directory (summary.json and a folder per stage) and on that of a single training run.

  Args:
    path: the --workdir of the run.
    out: the file, relative to the run directory unless absolute.

  Raises:
    InputError: there is no run, or one of its files is malformed.
  """
  run = workdir.read(path)
  output.check_file(epath.Path(path).expanduser() / out)
  summary, samples = run.summary, run.summary.get("samples", [])
  found = outcome.records(summary)
  headline = _headline(summary.get("reward", {})) or ([] if found else _last_values(run.stages))
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  )
  environment.filters["number"] = number
  template = importlib.resources.files("alignjax.report").joinpath("page.html.jinja").read_text()
  page = environment.from_string(template).render(
    name=run.name,
    seed=summary.get("seed"),
    headline=headline,
    policies=[outcome.NAMES[name] for name in found],
    outcomes=outcome.table(found),
    stages=[(TITLES.get(stage.name, stage.name), _stage_figure(stage)) for stage in run.stages],
    calibration=_calibration(summary.get("reward", {})),
    drawings=outcome.drawings(found),
    samples=samples,
    sides={key: name for key, name in outcome.NAMES.items() if samples and key in samples[0]},
    provenance=_provenance(summary, run.stages),
    counts=[(stage.name, counts) for stage in run.stages if (counts := _counts(stage))],
    configs=[(stage.name, json.dumps(stage.config.get("config", stage.config), indent=2)) for stage in run.stages],
  )
  file = epath.Path(path).expanduser() / out
  return output.write(file, page)


def _headline(reward: Mapping[str, Any]) -> list[Row]:
  """What a reader wants to know of the reward model first; what was measured of it."""
  bayes, floor = reward.get("bayes_accuracy"), reward.get("ece_if_calibrated")
  best = f"the best that any model can expect is {measured(bayes)} (Bayes)" if bayes is not None else ""
  noise = f"label noise alone would show {measured(floor)}" if floor is not None else "0 is perfect"
  rows = (
    ("heldout_accuracy", "Reward model, held-out pair accuracy", reward.get("heldout_interval"), best),
    ("ece", "Reward model, expected calibration error", None, noise),
  )
  found = [row for row in rows if reward.get(row[0]) is not None]
  return [Row(measure, measured(reward[key]), interval(ends), note) for key, measure, ends, note in found]


def _last_values(stages: Sequence[Stage]) -> list[Row]:
  """The headline of a run without a summary: where its curves ended."""
  rows = []
  for stage in stages:
    shown = [key for _, keys in ENDS for key in keys if stage.last(key) is not None]
    rows += [Row(f"{stage.name}, {key}", measured(stage.last(key)), note="last logged value") for key in shown]
  return rows


def _stage_figure(stage: Stage) -> Drawing | None:
  known = {key for _, keys in PANELS for key in keys}
  own = [(key, (key,)) for key in stage.metrics() if key not in known and not key.startswith(HIDDEN)]
  panels, still = [], []
  for title, keys in (*PANELS, *own):
    found = [Curve(key, *stage.series(key)) for key in keys if stage.last(key) is not None]
    if any(len(curve.values) == 1 or len(set(curve.values)) > 1 for curve in found):
      panels.append(Panel(title, found))
    else:
      still += [f"{curve.name} {number(curve.values[0])}" for curve in found]
  if not panels:
    return None
  label = f"Metrics of stage {stage.name}: " + ", ".join(panel.title for panel in panels)
  caption = "Thin lines as logged, strong lines a centred moving average (long runs only)."
  if still:
    caption += f" Throughout: {', '.join(still)}."
  return Drawing(figure.curves(panels, label), caption)


def _calibration(reward: Mapping[str, Any]) -> Drawing | None:
  bins = reward.get("reliability")
  if not bins:
    return None
  described = "; ".join(
    f"stated {row['confidence']:.2f}, right {row['accuracy']:.2f} of {row['count']}" for row in bins
  )
  caption = (
    "How often the reward model is right about held-out pairs, against how sure it is: on the dashed line its "
    "confidence can be taken at its word. Bars: 95 % Wilson intervals."
  )
  return Drawing(figure.reliability(bins, f"Reliability diagram: {described}"), caption)


def _provenance(summary: Mapping[str, Any], stages: Sequence[Stage]) -> list[tuple[str, str]]:
  """Pairs of a name and a value: commit, seed, time per stage, versions."""
  record = functools.reduce(lambda found, stage: found | stage.config, stages, {}) | dict(summary)
  pairs = [("commit", record["commit"])] if "commit" in record else []
  pairs += [("seed", str(record["seed"]))] if "seed" in record else []
  wall = summary.get("wall_s", {})
  pairs += [(f"{stage}, seconds", number(seconds)) for stage, seconds in wall.items()]
  pairs += [("all, seconds", number(float(sum(wall.values()))))] if len(wall) > 1 and "total" not in wall else []
  return pairs + sorted(record.get("versions", {}).items())


def _counts(stage: Stage) -> list[tuple[str, str]]:
  """What happened to the stage's records and steps: kept, cut, dropped, skipped."""
  keys = [key for key in stage.metrics() if key.startswith("data/") or key == "skipped"]
  return [(key.removeprefix("data/"), number(stage.last(key))) for key in keys]
