"""Gold win rate against KL from SFT, from results/objectives.json alone."""

import json
import pathlib
from collections import defaultdict
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignjax.evaluation import interval
from alignjax.report.figure import BLUE, GREEN, INK, ORANGE, STYLE

# (name in the legend, colour, marker)
FAMILIES = {
  "reference": ("pairs, with a reference", BLUE, "o"),
  "none": ("pairs, no reference", ORANGE, "s"),
  "labels": ("labelled completions", GREEN, "D"),
}
# Losses that need no reference; all other losses on pairs do.
NO_REFERENCE = {"sft", "orpo", "cpo", "simpo", "cpo_simpo", "alphapo", "tpo"}


class Point(NamedTuple):
  """An objective over its seeds.

  Attributes:
    name: of the objective.
    family: one of `FAMILIES`.
    wins: gold win rate against SFT: (value, low, high) over all comparisons.
    kl: nats a completion: likewise, over the seeds' own errors.
    seeds: (kl, win rate) of each seed: how much one run differs from the next.
  """

  name: str
  family: str
  wins: tuple[float, float, float]
  kl: tuple[float, float, float]
  seeds: list[tuple[float, float]]


def draw(path: pathlib.Path) -> pathlib.Path:
  """Writes PATH with .svg: a panel for each label noise, objectives numbered by their win rate."""
  runs = json.loads(path.read_text())["runs"]
  noises = sorted({run["label_noise"] for run in runs})
  panels = {noise: points([run for run in runs if run["label_noise"] == noise]) for noise in noises}
  most = max(map(len, panels.values()))
  with matplotlib.rc_context(STYLE | {"svg.hashsalt": "objectives"}):
    figure = Figure((10, len(noises) * max(4.2, 0.19 * most + 0.9)), layout="constrained")
    rows = figure.subplots(len(noises), 2, width_ratios=(1.9, 1), sharex="col", sharey="col", squeeze=False)
    for (left, right), (noise, found) in zip(rows, panels.items(), strict=True):
      _draw_panel(left, found)
      left.set_title("labels as the annotators gave them" if not noise else f"{noise:.0%} of the labels turned over")
      _write_table(right, found)
      left.tick_params(labelbottom=True)
    rows[0][0].legend(loc="best")
    target = path.with_suffix(".svg")
    figure.savefig(target, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
  # Legible on a light page and on a dark one: a middle grey for all that has the page's colour in a report.
  target.write_text(target.read_text().replace(INK, "#7a7a7a"))
  return target


def points(runs: list[dict[str, Any]]) -> list[Point]:
  """The objectives of one panel, best first."""
  of = defaultdict(list)
  for run in runs:
    of[run["objective"]].append(run)
  found = []
  for name, same in of.items():
    # Seeds answer the same prompts, so they are no further prompts: the intervals are those of one seed.
    prompts = min(run["prompts"] for run in same)
    wins = interval.wilson(float(np.mean([run["gold_win_rate_vs_sft"] for run in same])) * prompts, prompts)
    kl = float(np.mean([run["kl"] for run in same]))
    half = 1.96 * float(np.mean([run["kl_stderr"] for run in same]))
    seeds = [(run["kl"], run["gold_win_rate_vs_sft"]) for run in same]
    family = _family(same[0]["settings"])
    found.append(Point(name, family, (wins.value, wins.low, wins.high), (kl, kl - half, kl + half), seeds))
  return sorted(found, key=lambda point: -point.wins[0])


def _family(settings: dict[str, Any]) -> str:
  if settings["name"] == "unpaired":
    return "labels"
  return "none" if settings["loss"] in NO_REFERENCE else "reference"


def _draw_panel(axes: Axes, found: list[Point]) -> None:
  """Crosses of intervals with numbers on them; small dots are single seeds."""
  axes.axhline(0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6)
  named = set()
  for number, point in enumerate(found, 1):
    name, color, marker = FAMILIES[point.family]
    (x, *x_ends), (y, *y_ends) = point.kl, point.wins
    errors = {"xerr": np.abs(np.array([x_ends]).T - x), "yerr": np.abs(np.array([y_ends]).T - y)}
    label = None if name in named else name
    named.add(name)
    axes.errorbar(x, y, **errors, fmt=marker, color=color, markersize=11, elinewidth=1.1, capsize=0, label=label)
    axes.annotate(str(number), (x, y), ha="center", va="center_baseline", color="white", fontsize=6.5, zorder=5)
    axes.plot(*np.array(point.seeds).T, ".", color=color, alpha=0.45, markersize=4)
  axes.set_xscale("log")  # from a tenth of a nat to sixteen
  axes.xaxis.set_major_formatter("{x:g}")
  axes.set_xlabel("KL from SFT, nats per completion")
  axes.set_ylabel("preferred to SFT by the gold reward")
  axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))


def _write_table(axes: Axes, found: list[Point]) -> None:
  """The numbers' names, win rates and KL, best first."""
  axes.axis("off")
  lines = [(f"{n}", p.name, f"{p.wins[0]:.1%}", f"{p.kl[0]:.1f}") for n, p in enumerate(found, 1)]
  columns = ((0.06, "right"), (0.1, "left"), (0.78, "right"), (0.98, "right"))
  height = 1 / (len(lines) + 1)
  for row, cells in enumerate([("", "", "win rate", "KL"), *lines]):
    color = FAMILIES[found[row - 1].family][1] if row else INK
    for (x, side), text in zip(columns, cells, strict=True):
      place = dict(ha=side, va="center", transform=axes.transAxes)
      axes.text(x, 1 - (row + 0.5) * height, text, color=color, fontsize=8, **place)
