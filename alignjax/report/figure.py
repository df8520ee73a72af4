"""The report's figures, as inline SVG in one style.

Text, axes and grid are drawn in a placeholder colour, which becomes the page's own (`currentColor`). So a figure is
legible on a light and on a dark page. The series' colours have a contrast of at least 3:1 against both, and series that
differ in colour differ in shape or line as well.
"""

import hashlib
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignjax.evaluation import interval

BLUE = "#2b7fc4"
ORANGE = "#cf6a12"
GREEN = "#1f9163"
LINES = ((BLUE, "-"), (ORANGE, (0, (4, 1.5))), (GREEN, (0, (1, 1))))
POINTS = ((BLUE, "s"), (ORANGE, "o"), (GREEN, "^"))  # of the policies, in this order
INK = "#010203"  # replaced by the page's text colour
STYLE: dict[Any, Any] = {
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
SMOOTHED = 40  # points from which on a curve also has a moving average


class Curve(NamedTuple):
  """One line of a panel: its name, steps and values."""

  name: str
  steps: Sequence[int]
  values: Sequence[float]


class Panel(NamedTuple):
  """One small plot: a title with the unit, and a few curves."""

  title: str
  curves: Sequence[Curve]


class Drawing(NamedTuple):
  """A figure and the sentence under it."""

  svg: Markup
  caption: str


class Point(NamedTuple):
  """A measured value and its 95 % interval; low and high are None if there is none."""

  value: float
  low: float | None = None
  high: float | None = None


class Quantity(NamedTuple):
  """One quantity of several policies: its name, and its values by the policies' names."""

  name: str
  values: Mapping[str, Point]


def curves(panels: Sequence[Panel], label: str, columns: int = 3) -> Markup:
  """Draws panels in a grid; a curve of many points is thin, with its moving average over it."""
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
    marker = None
    if len(curve.values) < 12:
      marker = "o"
    axes.plot(curve.steps, curve.values, color=color, linestyle=line, marker=marker, label=curve.name)
    return
  axes.plot(curve.steps, curve.values, color=color, linewidth=0.8, alpha=0.4)
  axes.plot(curve.steps, moving_average(curve.values), color=color, linestyle=line, label=curve.name)


def moving_average(values: Sequence[float]) -> np.ndarray:
  """Averages over a window of about a twentieth of all points around each; the window narrows at the ends.

  So a linear trend stays as it is.
  """
  count = len(values)
  place = np.arange(count)
  half = np.minimum(max(1, count // 40), np.minimum(place, count - 1 - place))
  sums = np.concatenate([[0.0], np.cumsum(values)])
  return (sums[place + half + 1] - sums[place - half]) / (2 * half + 1)


def _observed(row: Mapping[str, Any]) -> Point:
  """Returns a bin's accuracy with its interval over prompts, or, for an older summary without one, over pairs."""
  if "low" in row:
    return Point(row["accuracy"], row["low"], row["high"])
  accuracy = interval.wilson(row["accuracy"] * row["count"], row["count"])
  return Point(accuracy.value, accuracy.low, accuracy.high)


def reliability(bins: Sequence[dict], label: str) -> Markup:
  """Draws observed accuracy against stated confidence, with 95 % intervals, over the number of pairs in each bin."""
  confidence = [row["confidence"] for row in bins]
  count = [row["count"] for row in bins]
  with matplotlib.rc_context(STYLE):
    figure = Figure((WIDTH * 0.55, 4.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6)
    _error_bars(top, [Point(x) for x in confidence], [_observed(row) for row in bins], BLUE, "o")
    top.set_ylabel("share that was right")
    top.set_xlim(0.49, 1.01)
    bottom.bar(confidence, count, width=0.025, color=BLUE)
    bottom.set_ylabel("pairs")
    bottom.set_xlabel("stated confidence, sigmoid(|margin|)")
    return _svg(figure, label)


def frontier(gold: Quantity, kl: Quantity, label: str) -> Markup:
  """Draws gold reward against KL from the first policy, with a line from the first policy to each of the others."""
  first, *others = gold.values
  with matplotlib.rc_context(STYLE):
    figure = Figure((WIDTH * 0.55, 3.4), layout="constrained")
    axes = figure.subplots()
    for name in others:
      ends = [(kl.values[end].value, gold.values[end].value) for end in (first, name)]
      axes.plot(*zip(*ends, strict=True), color=INK, linewidth=1, alpha=0.4)
    for (name, point), (color, marker) in zip(gold.values.items(), itertools.cycle(POINTS)):
      _error_bars(axes, [kl.values[name]], [point], color, marker, name)
    axes.set_xlabel(f"KL from {first}, nats per completion")
    axes.set_ylabel(gold.name.lower())
    axes.legend(loc="lower right")
    axes.margins(0.12, 0.2)
    return _svg(figure, label)


def comparison(rows: Sequence[Quantity], axis: str, label: str) -> Markup:
  """Draws quantities of several policies, each with a mark of its own, and their 95 % intervals if known."""
  names = list(dict.fromkeys(name for row in rows for name in row.values))
  with matplotlib.rc_context(STYLE):
    figure = Figure((WIDTH * 0.55, 0.7 + (0.16 + 0.13 * len(names)) * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = dict(zip([row.name for row in rows], range(len(rows))[::-1], strict=True))
    shifts = {name: 0.2 * ((len(names) - 1) / 2 - i) for i, name in enumerate(names)}
    for row in rows:
      (x, y), *ends = [(point.value, places[row.name] + shifts[name]) for name, point in row.values.items()]
      for end in ends:
        axes.plot([x, end[0]], [y, end[1]], color=INK, linewidth=1, alpha=0.4)
    for name, (color, marker) in zip(names, itertools.cycle(POINTS)):
      heights = [Point(places[row.name] + shifts[name]) for row in rows if name in row.values]
      points = [row.values[name] for row in rows if name in row.values]
      _error_bars(axes, points, heights, color, marker, name)
    axes.set_yticks(list(places.values()), list(places))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(axis)
    figure.legend(loc="outside upper right", ncols=len(names))
    return _svg(figure, label)


def _error_bars(axes: Axes, across: Sequence[Point], up: Sequence[Point], color, marker, name=None) -> None:
  """Draws marks with their intervals, in each direction that has any."""
  bars: dict[str, Any] = {}
  for side, points in {"xerr": across, "yerr": up}.items():
    if any(point.low is not None for point in points):
      bars[side] = np.array([_spread(point) for point in points]).T
  x = [point.value for point in across]
  y = [point.value for point in up]
  axes.errorbar(x, y, **bars, fmt=marker, color=color, elinewidth=1.4, label=name)


def _spread(point: Point) -> tuple[float, float]:
  """The distances of a value to the ends of its interval; 0 to a missing end."""
  low, high = (0.0 if end is None else abs(end - point.value) for end in (point.low, point.high))
  return low, high


def _svg(figure: Figure, label: str) -> Markup:
  """Renders a figure as an <svg> element with unique ids, and with a text for readers who cannot see it."""
  name = "f" + hashlib.blake2s(label.encode(), digest_size=4).hexdigest()
  file = io.StringIO()
  with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
  svg = file.getvalue()
  svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
  svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
  return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
