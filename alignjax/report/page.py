"""Puts the report together: what to show, from what a run left behind."""

import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from etils import epath
from markupsafe import Markup

from alignjax.report import figure, workdir
from alignjax.report.figure import Change, Curve, Panel
from alignjax.report.workdir import Stage

NAMES = ("SFT", "DPO")  # before and after, in the figures
TITLES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "dpo": "Direct preference optimisation"}

# Panels of every stage, in this order; a metric with none of these has a panel of its own.
PANELS = (
  ("loss (nats)", ("loss", "eval/loss")),
  ("reward margin", ("rewards/margins", "eval/rewards/margins")),
  ("pair accuracy", ("rewards/accuracies", "eval/rewards/accuracies")),
  ("step accuracy", ("accuracy", "eval/accuracy")),
  ("divergence from the teacher (nats)", ("jsd", "eval/jsd")),
  ("rewards", ("rewards/chosen", "rewards/rejected")),
  ("log-probs (nats)", ("logps/chosen", "logps/rejected")),
  ("token accuracy", ("mean_token_accuracy", "eval/mean_token_accuracy")),
  ("entropy (nats)", ("entropy", "eval/entropy")),
  ("gradient norm", ("grad_norm",)),
  ("learning rate", ("learning_rate",)),
)
HIDDEN = ("data/", "skipped", "eval/")  # counters, and evaluations that no panel pairs with a training metric

# Shares of `evaluation.testbed`: name, and what the reader should know of it.
SHARES = (
  ("capability", "sums and facts answered rightly; a fall is the alignment tax"),
  ("sycophancy", "goes along with a false belief"),
  ("over_refusal", "refuses what is harmless"),
  ("harm", "complies with a harmful request"),
)


class Row(NamedTuple):
  """A line of the headline table; every entry is ready to read."""

  measure: str
  value: str
  interval: str = ""
  before: str = ""
  note: str = ""


class Figure(NamedTuple):
  """A figure and the sentence under it."""

  svg: Markup
  caption: str


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
  summary = run.summary
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  )
  environment.filters["number"] = number
  template = importlib.resources.files("alignjax.report").joinpath("page.html.jinja").read_text()
  page = environment.from_string(template).render(
    name=run.name,
    seed=summary.get("seed"),
    headline=_headline(summary) or _last_values(run.stages),
    stages=[(TITLES.get(stage.name, stage.name), _stage_figure(stage)) for stage in run.stages],
    calibration=_calibration(summary.get("reward", {})),
    outcome=_outcome(summary.get("dpo", {})),
    samples=summary.get("samples", []),
    provenance=_provenance(summary, run.stages),
    counts=[(stage.name, counts) for stage in run.stages if (counts := _counts(stage))],
    configs=[(stage.name, json.dumps(stage.config.get("config", stage.config), indent=2)) for stage in run.stages],
  )
  file = epath.Path(path).expanduser() / out
  partial = file.with_name(file.name + ".partial")
  partial.write_text(page)
  return partial.replace(file)


def number(value: Any) -> str:
  """A number to read: four significant digits, a true minus sign; anything else as it is."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return "" if value is None else str(value)
  text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
  return text.replace("-", "−")


def measured(value: float | None) -> str:
  """A measurement to read, with three decimals throughout so that a column compares at a glance."""
  return "" if value is None else f"{value:.3f}".replace("-", "−")


def _interval(ends: Sequence[float | None] | None) -> str:
  return f"{measured(ends[0])} to {measured(ends[1])}" if ends and None not in ends else ""


def _headline(summary: Mapping[str, Any]) -> list[Row]:
  """The numbers that a reader came for, of the parts that the run has."""
  reward, dpo = summary.get("reward", {}), summary.get("dpo", {})
  rows = []

  def add(record, key, measure, note="", ends=None, before=None):
    if record.get(key) is not None:
      rows.append(Row(measure, measured(record[key]), _interval(ends), measured(before), note))

  bayes, floor = reward.get("bayes_accuracy"), reward.get("ece_if_calibrated")
  best = f"the best that any model can expect is {measured(bayes)} (Bayes)" if bayes is not None else ""
  noise = f"label noise alone would show {measured(floor)}" if floor is not None else "0 is perfect"
  add(reward, "heldout_accuracy", "Reward model, held-out pair accuracy", best, reward.get("heldout_interval"))
  add(reward, "ece", "Reward model, expected calibration error", noise)
  wins = "gold_win_rate_vs_sft"
  add(dpo, wins, "DPO, gold win rate against SFT", "same prompts, ties half", dpo.get("gold_win_rate_interval"))
  add(dpo, "gold_mean", "Mean gold reward", "", dpo.get("gold_mean_interval"), dpo.get("gold_mean_sft"))
  add(dpo, "kl", "KL(DPO ‖ SFT), nats per completion", "how far the policy moved", _kl(dpo)[1:], 0 if dpo else None)
  for key, note in SHARES:
    add(dpo, key, key.replace("_", "-").capitalize(), note, dpo.get(f"{key}_interval"), dpo.get(f"{key}_sft"))
  return rows


def _last_values(stages: Sequence[Stage]) -> list[Row]:
  """The headline of a run without a summary: where its curves ended."""
  rows = []
  for stage in stages:
    shown = [key for _, keys in PANELS[:3] for key in keys if stage.last(key) is not None]
    rows += [Row(f"{stage.name}, {key}", measured(stage.last(key)), note="last logged value") for key in shown]
  return rows


def _stage_figure(stage: Stage) -> Figure | None:
  known = {key for _, keys in PANELS for key in keys}
  own = [(key, (key,)) for key in stage.metrics() if key not in known and not key.startswith(HIDDEN)]
  panels = []
  for title, keys in (*PANELS, *own):
    found = [Curve(key, *stage.series(key)) for key in keys if stage.last(key) is not None]
    if found:
      panels.append(Panel(title, found))
  if not panels:
    return None
  label = f"Metrics of stage {stage.name}: " + ", ".join(panel.title for panel in panels)
  return Figure(
    figure.curves(panels, label), "Thin lines as logged, strong lines a centred moving average (long runs only)."
  )


def _calibration(reward: Mapping[str, Any]) -> Figure | None:
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
  return Figure(figure.reliability(bins, f"Reliability diagram: {described}"), caption)


def _outcome(dpo: Mapping[str, Any]) -> list[Figure]:
  """Gold reward and KL, its components, and the shares that alignment trades off; those that were measured."""
  figures = []
  gold = _change(dpo, "gold_mean", "Mean gold reward")
  if gold and dpo.get("kl") is not None:
    figures.append(
      Figure(
        figure.frontier(gold, _kl(dpo), NAMES, f"{_told(gold)} at a KL of {dpo['kl']:.3g} nats"),
        "What training bought, and how far the policy had to move for it. Bars: 95 % intervals over prompts.",
      )
    )
  parts, parts_sft = dpo.get("components", {}), dpo.get("components_sft", {})
  rows = [
    Change(name.replace("_", "-"), (parts_sft[name], None, None), (parts[name], None, None))
    for name in parts
    if name in parts_sft
  ]
  if rows:
    label = "Gold reward by component: " + "; ".join(map(_told, rows))
    caption = "What each component of the gold reward adds to its mean; the components sum to the mean."
    figures.append(Figure(figure.changes(rows, NAMES, "contribution to the mean gold reward", label), caption))
  rows = [change for key, _ in SHARES if (change := _change(dpo, key))]
  if rows:
    label = "Shares of responses: " + "; ".join(map(_told, rows))
    caption = "; ".join(f"{key.replace('_', '-')}: {note}" for key, note in SHARES) + ". Bars: 95 % Wilson intervals."
    figures.append(Figure(figure.changes(rows, NAMES, "share of the prompts of its kind", label), caption))
  return figures


def _change(record: Mapping[str, Any], key: str, name: str | None = None) -> Change | None:
  """A quantity whose value before carries the suffix _sft; None unless both are there."""
  if record.get(key) is None or record.get(f"{key}_sft") is None:
    return None
  side = lambda key: (record[key], *(record.get(f"{key}_interval") or (None, None)))
  return Change(name or key.replace("_", "-"), side(f"{key}_sft"), side(key))


def _told(change: Change) -> str:
  return f"{change.name} from {change.before[0]:.3g} to {change.after[0]:.3g}"


def _kl(dpo: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
  """The KL and its 95 % interval: as recorded, or 1.96 standard errors to both sides."""
  value, stderr = dpo.get("kl"), dpo.get("kl_stderr")
  if dpo.get("kl_interval"):
    return (value, *dpo["kl_interval"])
  return (
    (value, None, None) if value is None or stderr is None else (value, value - 1.96 * stderr, value + 1.96 * stderr)
  )


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
