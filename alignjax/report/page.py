"""Composes the report from the files of a run."""

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

# Panels of every stage, in this order. A metric of none of these has a panel of its own, and one that never changes
# is named in the caption. The first panels show the result of a run; their last values replace a missing summary.
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
HIDDEN = ("data/", "skipped", "eval/")  # counters, and evaluations without a panel


class Row(NamedTuple):
  """A line of the headline table, formatted."""

  measure: str
  value: str
  interval: str = ""
  note: str = ""


def render(path: epath.PathLike, out: str = "report.html") -> epath.Path:
  """Writes the report of a run directory and returns its path.

  Works on the quickstart's directory (summary.json and a folder per stage) and on that of a single training run.

  Args:
    path: the --workdir of the run.
    out: the file; a relative path is relative to the run directory.

  Raises:
    InputError: there is no run, or one of its files is malformed.
  """
  run = workdir.read(path)
  output.check_file(epath.Path(path).expanduser() / out)
  summary = run.summary
  samples = summary.get("samples", [])
  policies = outcome.records(summary)
  headline = _headline(summary.get("reward", {}))
  if not headline and not policies:
    headline = _last_values(run.stages)
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  )
  environment.filters["number"] = number
  template = importlib.resources.files("alignjax.report").joinpath("page.html.jinja").read_text()
  page = environment.from_string(template).render(
    name=run.name,
    seed=summary.get("seed"),
    headline=headline,
    policies=[outcome.NAMES[name] for name in policies],
    outcomes=outcome.table(policies),
    stages=[(TITLES.get(stage.name, stage.name), _stage_figure(stage)) for stage in run.stages],
    calibration=_calibration(summary.get("reward", {})),
    drawings=outcome.drawings(policies),
    samples=samples,
    sides={key: name for key, name in outcome.NAMES.items() if samples and key in samples[0]},
    provenance=_provenance(summary, run.stages),
    counts=[(stage.name, counts) for stage in run.stages if (counts := _counts(stage))],
    configs=[(stage.name, json.dumps(stage.config.get("config", stage.config), indent=2)) for stage in run.stages],
  )
  file = epath.Path(path).expanduser() / out
  return output.write(file, page)


def _headline(reward: Mapping[str, Any]) -> list[Row]:
  """Makes the headline rows of the reward model: accuracy and calibration error, if they were measured."""
  rows = []
  if (accuracy := reward.get("heldout_accuracy")) is not None:
    note = ""
    if (bayes := reward.get("bayes_accuracy")) is not None:
      note = f"the best that any model can expect is {measured(bayes)} (Bayes)"
    ends = interval(reward.get("heldout_interval"))
    rows.append(Row("Reward model, held-out pair accuracy", measured(accuracy), ends, note))
  if (error := reward.get("ece")) is not None:
    note = "0 is perfect"
    if (floor := reward.get("ece_if_calibrated")) is not None:
      note = f"label noise alone would show {measured(floor)}"
    rows.append(Row("Reward model, expected calibration error", measured(error), note=note))
  return rows


def _last_values(stages: Sequence[Stage]) -> list[Row]:
  """Makes the headline rows of a run without a summary: the last values of its curves."""
  rows = []
  for stage in stages:
    shown = [key for _, keys in ENDS for key in keys if stage.last(key) is not None]
    rows += [Row(f"{stage.name}, {key}", measured(stage.last(key)), note="last logged value") for key in shown]
  return rows


def _stage_figure(stage: Stage) -> Drawing | None:
  """Draws the metrics of a stage; None if there is none to draw."""
  in_panels = {key for _, keys in PANELS for key in keys}
  others = [(key, (key,)) for key in stage.metrics() if key not in in_panels and not key.startswith(HIDDEN)]
  panels = []
  constants = []
  for title, keys in (*PANELS, *others):
    curves = [Curve(key, *stage.series(key)) for key in keys if stage.last(key) is not None]
    if any(len(curve.values) == 1 or len(set(curve.values)) > 1 for curve in curves):
      panels.append(Panel(title, curves))
    else:
      constants += [f"{curve.name} {number(curve.values[0])}" for curve in curves]
  if not panels:
    return None
  label = f"Metrics of stage {stage.name}: " + ", ".join(panel.title for panel in panels)
  caption = "Thin lines as logged, strong lines a centred moving average (long runs only)."
  if constants:
    caption += f" Throughout: {', '.join(constants)}."
  return Drawing(figure.curves(panels, label), caption)


def _calibration(reward: Mapping[str, Any]) -> Drawing | None:
  """Draws the reliability diagram of the reward model; None if it was not measured."""
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
  """Returns pairs of a name and a value: commit, seed, time per stage, versions."""
  record: dict[str, Any] = {}
  for stage in stages:
    record |= stage.config
  record |= summary
  pairs: list[tuple[str, str]] = [(key, str(record[key])) for key in ("commit", "seed") if key in record]
  wall = summary.get("wall_s", {})
  pairs += [(f"{stage}, seconds", number(seconds)) for stage, seconds in wall.items()]
  if len(wall) > 1 and "total" not in wall:
    pairs.append(("all, seconds", number(float(sum(wall.values())))))
  return pairs + sorted(record.get("versions", {}).items())


def _counts(stage: Stage) -> list[tuple[str, str]]:
  """Returns the counts of the stage's records and steps: kept, cut, dropped, skipped."""
  keys = [key for key in stage.metrics() if key.startswith("data/") or key == "skipped"]
  return [(key.removeprefix("data/"), number(stage.last(key))) for key in keys]
