"""Proxy and gold reward against the distance from SFT, from results/overoptimisation.json alone."""

import json
import pathlib
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignjax.evaluation import interval
from alignjax.report.figure import BLUE, GREEN, INK, ORANGE, STYLE

# (colour, line, marker)
LOOKS = {
  "plain": (ORANGE, "-", "o"),
  "kl": (BLUE, "-", "s"),
  "ensemble": (GREEN, "-", "D"),
  "length": ("#a04fb5", "-", "^"),
  "price": ("#c77fd8", "--", "v"),
  "retraining": ("#b8860b", "-", "P"),
  "longer": ("#b8860b", ":", "x"),
}
NAMES = {"plain": "small KL coefficient", "kl": "KL coefficient x 50", "ensemble": "ensemble of 4 heads"}
NAMES |= {"length": "length costs 1/8 a token", "price": "length costs what it is overpaid"}
NAMES |= {"retraining": "retrained on current samples", "longer": "reward model trained as long, first pairs"}


def draw(path: pathlib.Path) -> pathlib.Path:
  """Writes PATH with .svg: on the left what the reward model pays, on the right what it is worth."""
  record = json.loads(path.read_text())
  with matplotlib.rc_context(STYLE | {"svg.hashsalt": "overoptimisation"}):
    figure = Figure((9.6, 4.8), layout="constrained")
    panels = dict(zip(("proxy", "gold"), figure.subplots(1, 2), strict=True))
    for quantity, axes in panels.items():
      for name, (color, line, marker) in LOOKS.items():
        if curves := [r["curve"] for r in record["runs"] if r["condition"] == name]:
          _draw_runs(axes, curves, quantity, color, line, marker, NAMES[name])
      if record["best_of_n"]:
        _draw_best_of_n(axes, [found["curve"] for found in record["best_of_n"]], quantity)
      seen = [point[quantity] for r in record["runs"] for point in r["curve"]]
      axes.set_ylim(min(seen) - 0.3, max(seen) + 0.3)  # an interval of three seeds may be wider
      axes.set_xlabel("√KL from SFT, nats½ per completion")
    panels["proxy"].set_title("what the reward model pays")
    panels["gold"].set_title("what it is worth: the gold reward")
    figure.legend(*panels["proxy"].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    target = path.with_suffix(".svg")
    figure.savefig(target, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
  # Legible on a light page and on a dark one: a middle grey for all that has the page's colour in a report.
  target.write_text(target.read_text().replace(INK, "#7a7a7a"))
  return target


def _draw_runs(axes: Axes, curves: list[list[dict[str, Any]]], quantity: str, color, line, marker, name: str) -> None:
  """The mean over seeds, every seed as a thin line, a ring where the mean is highest, 95 % there and last."""
  of = lambda key: np.array([[point[key] for point in curve] for curve in curves])
  x, y = np.sqrt(np.maximum(of("kl"), 0)), of(quantity)
  for own_x, own_y in zip(x, y, strict=True):
    axes.plot(own_x, own_y, color=color, linewidth=0.9, alpha=0.55)
  x, mean = x.mean(axis=0), y.mean(axis=0)
  axes.plot(x, mean, color=color, linestyle=line, marker=marker, markersize=3, label=name)
  top = int(np.argmax(mean))
  if quantity == "gold":
    axes.plot(x[top], mean[top], "o", color=color, markersize=11, fillstyle="none")
  for at in sorted({top, len(mean) - 1}) if len(curves) > 2 else ():
    found = interval.mean(y[:, at])
    axes.errorbar(x[at], found.value, yerr=found.high - found.value, color=color, elinewidth=0.9, capsize=3)


def _draw_best_of_n(axes: Axes, curves: list[list[dict[str, Any]]], quantity: str) -> None:
  """The mean over seeds, each point with its n."""
  x = np.sqrt([point["kl"] for point in curves[0]])
  y = np.mean([[point[quantity] for point in curve] for curve in curves], axis=0)
  axes.plot(x, y, color=INK, linestyle=(0, (4, 3)), linewidth=1.2, alpha=0.7, label="best of n by the reward model")
  for at, value, point in zip(x, y, curves[0], strict=True):
    axes.annotate(f"{point['n']}", (at, value), fontsize=6.5, xytext=(0, 3), textcoords="offset points", ha="center")
