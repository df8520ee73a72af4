"""The report's figures, as inline SVG in one style.

Text, axes and grid are drawn in a stand-in colour that becomes the page's own (`currentColor`), so a figure is
legible on a light and on a dark page alike; the series' colours have a contrast of at least 3:1 against both, and every
distinction of colour is one of shape or line as well.
"""

import hashlib
import io
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignjax.evaluation import interval

BLUE, ORANGE, GREEN = "#2b7fc4", "#cf6a12", "#1f9163"
LINES = ((BLUE, "-"), (ORANGE, (0, (4, 1.5))), (GREEN, (0, (1, 1))))
INK = "#010203"  # stands for the page's text colour
STYLE = {
  "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
  "text.parse_math": False,  # names of metrics are not formulas
  "font.size": 9.5,
  "axes.titlesize": 10,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.labelsize": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.linewidth": 0.7,
  "axes.grid": True,
  "axes.axisbelow": True,
  "axes.facecolor": "none",
  "figure.facecolor": "none",
  "grid.alpha": 0.13,
  "grid.linewidth": 0.7,
  "legend.frameon": False,
  "legend.fontsize": 8.5,
  "lines.linewidth": 1.8,
  "lines.markersize": 5,
  "errorbar.capsize": 2.5,
  **dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "grid.color"),
    INK,
  ),
}
WIDTH = 9.6  # inches; the page scales a figure to its column
SMOOTHED = 40  # points from which a curve also gets a moving average


class Curve(NamedTuple):
  """One line of a panel: its name, steps and values."""

  name: str
  steps: Sequence[int]
  values: Sequence[float]


class Panel(NamedTuple):
  """One small plot: a title that carries the unit, and up to a few curves."""

  title: str
  curves: Sequence[Curve]


class Change(NamedTuple):
  """A quantity before and after, each as (value, low, high); low and high are None where there is no interval."""

  name: str
  before: tuple[float, float | None, float | None]
  after: tuple[float, float | None, float | None]


def curves(panels: Sequence[Panel], label: str, columns: int = 3) -> Markup:
  """Panels in a grid; a curve of many points is drawn thin, with its moving average over it."""
  rows = -(-len(panels) // columns)
  with matplotlib.rc_context(STYLE):
    figure = Figure((WIDTH, 2.3 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
      axes.set_visible(False)
    for axes, panel in zip(grid, panels, strict=False):
      axes.set_title(panel.title)
      axes.set_xlabel("step")
      for curve, (color, line) in zip(panel.curves, itertools.cycle(LINES)):
        _draw_curve(axes, curve, color, line)
      if len(panel.curves) > 1:
        axes.legend()
      axes.locator_params(nbins=5)
      axes.yaxis.set_major_formatter("{x:g}")
    return _svg(figure, label)


def _draw_curve(axes: Axes, curve: Curve, color: str, line) -> None:
  if len(curve.values) < SMOOTHED:
    marker = "o" if len(curve.values) < 12 else None
    axes.plot(curve.steps, curve.values, color=color, linestyle=line, marker=marker, label=curve.name)
    return
  axes.plot(curve.steps, curve.values, color=color, linewidth=0.8, alpha=0.4)
  axes.plot(curve.steps, moving_average(curve.values), color=color, linestyle=line, label=curve.name)


def moving_average(values: Sequence[float]) -> np.ndarray:
  """Means over a window around each point, about a twentieth of all; narrower at the ends, so no trend is bent."""
  count = len(values)
  place = np.arange(count)
  half = np.minimum(max(1, count // 40), np.minimum(place, count - 1 - place))
  sums = np.concatenate([[0.0], np.cumsum(values)])
  return (sums[place + half + 1] - sums[place - half]) / (2 * half + 1)


def reliability(bins: Sequence[dict], label: str) -> Markup:
  """Observed accuracy against stated confidence, with 95 % intervals, over the number of pairs in each bin."""
  confidence = [row["confidence"] for row in bins]
  count = [row["count"] for row in bins]
  observed = [interval.wilson(row["accuracy"] * row["count"], row["count"]) for row in bins]
  with matplotlib.rc_context(STYLE):
    figure = Figure((WIDTH * 0.55, 4.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6)
    _error_bars(top, confidence, [(e.value, e.low, e.high) for e in observed], BLUE, "o")
    top.set_ylabel("share that was right")
    top.set_xlim(0.49, 1.01)
    bottom.bar(confidence, count, width=0.025, color=BLUE)
    bottom.set_ylabel("pairs")
    bottom.set_xlabel("stated confidence, sigmoid(|margin|)")
    return _svg(figure, label)


def frontier(gold: Change, kl: tuple[float, float | None, float | None], names: tuple[str, str], label: str) -> Markup:
  """Gold reward against KL from the reference: where training began, and where it went."""
  with matplotlib.rc_context(STYLE):
    figure = Figure((WIDTH * 0.55, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, kl[0]], [gold.before[0], gold.after[0]], color=INK, linewidth=1, alpha=0.5)
    _error_bars(axes, [0.0], [gold.before], BLUE, "s", names[0])
    _error_bars(axes, [kl[0]], [gold.after], ORANGE, "o", names[1])
    if kl[1] is not None:
      axes.plot(kl[1:], [gold.after[0]] * 2, color=ORANGE, linewidth=1.4)
    axes.set_xlabel(f"KL({names[1]} ‖ {names[0]}), nats per completion")
    axes.set_ylabel("mean gold reward")
    axes.legend(loc="lower right")
    axes.margins(0.12, 0.2)
    return _svg(figure, label)


def changes(rows: Sequence[Change], names: tuple[str, str], axis: str, label: str) -> Markup:
  """Quantities before (square) and after (disc), with their 95 % intervals where they have them."""
  with matplotlib.rc_context(STYLE):
    figure = Figure((WIDTH * 0.55, 0.7 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    for place, row in zip(places, rows, strict=True):
      axes.plot([row.before[0], row.after[0]], [place + 0.1, place - 0.1], color=INK, linewidth=1, alpha=0.4)
    for side, shift, color, marker in ((0, 0.1, BLUE, "s"), (1, -0.1, ORANGE, "o")):
      points = [(row.before, row.after)[side] for row in rows]
      _error_bars(axes, places + shift, points, color, marker, names[side], horizontal=True)
    axes.set_yticks(places, [row.name for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(axis)
    figure.legend(loc="outside upper right", ncols=2)
    return _svg(figure, label)


def _error_bars(axes: Axes, places, points, color, marker, name=None, horizontal=False) -> None:
  values = np.array([value for value, _, _ in points])
  ends = [(value if low is None else low, value if high is None else high) for value, low, high in points]
  spread = np.abs(np.array(ends).T - values)
  at = (values, places) if horizontal else (places, values)
  error = {"xerr" if horizontal else "yerr": spread}
  axes.errorbar(*at, **error, fmt=marker, color=color, elinewidth=1.4, label=name)


def _svg(figure: Figure, label: str) -> Markup:
  """The figure as an <svg> element whose ids are its own, with a text for those who can not see it."""
  name = "f" + hashlib.blake2s(label.encode(), digest_size=4).hexdigest()
  file = io.StringIO()
  with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
  svg = file.getvalue()
  svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
  svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
  return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
