"""The members of a sweep in comparison: one table, one plot."""

import io
import itertools
import json
from typing import Any

import matplotlib
from etils import epath
from matplotlib.figure import Figure

from alignjax.system import output
from alignjax.training import metrics

MOST = 5  # columns of metrics in the table


def table(result: dict[str, Any]) -> str:
  """Formats the members from best to worst: their overrides, the metric that ranks them, and up to four more."""
  rows = result["members"]
  ranking = result["ranking"].rpartition(":")[0]
  keys = list(dict.fromkeys(key for row in rows for key in row["overrides"]))
  wanted = (ranking, "eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "loss", "rewards/margins")
  shown = [name for name in dict.fromkeys(wanted) if any(name in row.get("metrics", {}) for row in rows)][:MOST]
  lines = [["", *(key.split(".")[1] for key in keys), *shown]]
  for i in result["order"]:
    row = rows[i]
    label = f"{i:02}"
    if i == result["best"]:
      label += " *"
    overrides = [_text(row["overrides"].get(key, "")) for key in keys]
    values = [_value(row.get("metrics", {}), name) for name in shown]
    line = [label, *overrides, *values]
    if row.get("failed"):
      line.append(row["failed"])
    lines.append(line)
  columns = itertools.zip_longest(*lines, fillvalue="")
  widths = [max(map(len, column)) for column in columns]
  return "\n".join(_aligned(line, widths) for line in lines)


def _value(values: dict[str, float], name: str) -> str:
  if name in values:
    return f"{values[name]:.4f}"
  return "-"


def _aligned(line: list[str], widths: list[int]) -> str:
  return "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()


def draw(result: dict[str, Any], workdir: epath.Path, path: epath.Path) -> None:
  """Draws the ranking metric by step, a line for each member (the best one thick), and its value at the end.

  Args:
    result: of the sweep.
    workdir: the folder of the members' runs.
    path: the PNG file.
  """
  name = result["ranking"].rpartition(":")[0]
  rows = [row for row in result["members"] if not row.get("failed")]
  colors = matplotlib.colormaps["viridis"].resampled(max(len(rows), 2))
  figure = Figure((10, max(3.4, 1.0 + 0.3 * len(rows))), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(3, 2))
  order = [i for i in result["order"] if not result["members"][i].get("failed")]
  for place, i in enumerate(order):
    row = result["members"][i]
    logged = metrics.read(workdir / row["directory"] / "metrics.jsonl")
    curve = [(r["step"], r[name]) for r in logged if isinstance(r.get(name), float)]  # "nan" is text
    width, marker = (2.6, "*") if i == result["best"] else (1.2, "o")
    left.plot(*zip(*curve, strict=True), color=colors(place), linewidth=width, marker="o", markersize=3)
    right.plot(row["metrics"].get(name), place, color=colors(place), marker=marker, markersize=9)
  left.set(xlabel="step", title=name)
  right.set_yticks(range(len(order)), [_label(result["members"][i]["overrides"]) for i in order])
  right.invert_yaxis()
  right.set(xlabel=name, title="at the end")
  for axes in (left, right):
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
  image = io.BytesIO()
  figure.savefig(image, format="png", dpi=120)
  output.write(path, image.getvalue())


def _label(overrides: dict[str, Any]) -> str:
  return " ".join(f"{key.split('.')[1]}={_text(value)}" for key, value in overrides.items())


def _text(value: Any) -> str:
  if isinstance(value, str):
    return value
  return json.dumps(value)
