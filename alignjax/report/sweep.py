"""The members of a sweep beside each other: one table, one plot."""

import io
import json
from typing import Any

import matplotlib
from etils import epath
from matplotlib.figure import Figure

from alignjax.system import output
from alignjax.training import metrics

MOST = 5  # columns of metrics in the table


def table(result: dict[str, Any]) -> str:
  """The members from best to worst: their own keys, the metric that ranks them, and a few more."""
  rows, ranking = result["members"], result["ranking"].rpartition(":")[0]
  keys = list(dict.fromkeys(key for row in rows for key in row["overrides"]))
  wanted = (ranking, "eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "loss", "rewards/margins")
  shown = [name for name in dict.fromkeys(wanted) if any(name in row.get("metrics", {}) for row in rows)][:MOST]
  lines = [["", *(key.split(".")[1] for key in keys), *shown]]
  for i in result["order"]:
    numbers = [f"{rows[i]['metrics'][name]:.4f}" if name in rows[i].get("metrics", {}) else "-" for name in shown]
    own = [_text(rows[i]["overrides"].get(key, "")) for key in keys]
    lines.append([f"{i:02}{' *' if i == result['best'] else ''}", *own, *numbers])
    if rows[i].get("failed"):
      lines[-1].append(rows[i]["failed"])
  widths = [max(len(line[c]) for line in lines if c < len(line)) for c in range(max(map(len, lines)))]
  return "\n".join("  ".join(cell.ljust(widths[c]) for c, cell in enumerate(line)).rstrip() for line in lines)


def draw(result: dict[str, Any], workdir: epath.Path, path: epath.Path) -> None:
  """The ranking metric by step, a line per member (the best one thick), and where each ended."""
  name = result["ranking"].rpartition(":")[0]
  rows = [row for row in result["members"] if not row.get("failed")]
  colors = matplotlib.colormaps["viridis"].resampled(max(len(rows), 2))
  figure = Figure((10, max(3.4, 1.0 + 0.3 * len(rows))), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(3, 2))
  order = [i for i in result["order"] if not result["members"][i].get("failed")]
  for place, i in enumerate(order):
    row = result["members"][i]
    curve = [(r["step"], r[name]) for r in metrics.read(workdir / row["directory"] / "metrics.jsonl") if name in r]
    curve = [(step, value) for step, value in curve if isinstance(value, float)]  # "nan" is text
    best = i == result["best"]
    left.plot(*zip(*curve, strict=True), color=colors(place), linewidth=2.6 if best else 1.2, marker="o", markersize=3)
    right.plot(row["metrics"].get(name), place, color=colors(place), marker="*" if best else "o", markersize=9)
  label = lambda i: " ".join(f"{k.split('.')[1]}={_text(v)}" for k, v in result["members"][i]["overrides"].items())
  left.set(xlabel="step", title=name)
  right.set_yticks(range(len(order)), [label(i) for i in order])
  right.invert_yaxis()
  right.set(xlabel=name, title="at the end")
  for axes in (left, right):
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
  image = io.BytesIO()
  figure.savefig(image, format="png", dpi=120)
  output.write(path, image.getvalue())


def _text(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)
