"""The policies of a summary beside each other: a table, the frontier, and what alignment trades off."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignjax.evaluation.testbed import baseline_key
from alignjax.report import figure
from alignjax.report.figure import Drawing, Point, Quantity
from alignjax.report.text import interval, measured

FIRST = "sft"  # from which the others began
NAMES = {FIRST: "SFT", "dpo": "DPO", "ppo": "PPO"}  # a summary's sections, in the order in which they are shown

# Shares of `evaluation.testbed`: name, and what the reader should know of it.
SHARES = (
  ("capability", "sums and facts answered rightly; a fall is the alignment tax"),
  ("sycophancy", "goes along with a false belief"),
  ("over_refusal", "refuses what is harmless"),
  ("harm", "complies with a harmful request"),
)

Records = Mapping[str, Mapping[str, Any]]


class Row(NamedTuple):
  """A line of the table: a measure, each policy's value and interval (ready to read), and a note."""

  measure: str
  cells: Sequence[tuple[str, str]]
  note: str


def records(summary: Mapping[str, Any]) -> Records:
  """The measures of each policy under the same keys, by section; {} where a summary has the first one's alone.

  The first has no section of its own: its measures are in the others', with its name in their keys.
  """
  others = {section: dict(summary[section]) for section in NAMES if section != FIRST and summary.get(section)}
  first: dict[str, Any] = {"kl": 0.0}
  for record in others.values():
    first |= {key: record[named] for key in record if (named := baseline_key(key, FIRST)) in record}
    record[f"gold_win_rate_vs_{FIRST}_interval"] = record.get("gold_win_rate_interval")
    if not record.get("kl_interval") and record.get("kl_stderr") is not None and record.get("kl") is not None:
      record["kl_interval"] = [record["kl"] + sign * 1.96 * record["kl_stderr"] for sign in (-1, 1)]
  return {FIRST: first} | others if others else {}


def table(found: Records) -> list[Row]:
  """What was measured of the policies, a row a measure."""
  rows = (
    *(
      (f"gold_win_rate_vs_{name}", f"Gold win rate against {NAMES[name]}", "same prompts, ties half") for name in found
    ),
    ("gold_mean", "Mean gold reward", ""),
    ("kl", f"KL from {NAMES[FIRST]}, nats per completion", "how far the policy moved"),
    *((key, key.replace("_", "-").capitalize(), note) for key, note in SHARES),
  )
  quantities = [(_quantity(found, key, measure), note) for key, measure, note in rows]
  cell = lambda point: (measured(point.value), interval(point[1:])) if point else ("", "")
  cells = lambda quantity: [cell(quantity.values.get(NAMES[name])) for name in found]
  known = lambda quantity: quantity.values.keys() - {NAMES[FIRST]}
  return [Row(quantity.name, cells(quantity), note) for quantity, note in quantities if known(quantity)]


def drawings(found: Records) -> list[Drawing]:
  """Gold reward against KL, the gold reward's components, and the shares; what was measured of the first and others."""
  first = NAMES[FIRST]
  compared = lambda rows: [row for row in rows if first in row.values and len(row.values) > 1]
  told = lambda rows: "; ".join(map(_told, rows))
  gold, kl = _quantity(found, "gold_mean", "Mean gold reward"), _quantity(found, "kl", "KL, nats per completion")
  gold = gold._replace(values={name: point for name, point in gold.values.items() if name in kl.values})
  drawn = []
  if compared([gold]):
    caption = "What training bought, and how far each policy had to move for it. Bars: 95 % intervals over prompts."
    drawn.append(Drawing(figure.frontier(gold, kl, told([gold, kl])), caption))
  parts = {name: record.get("components", {}) for name, record in found.items()}
  names = dict.fromkeys(name for part in parts.values() for name in part)
  if rows := compared(_quantity(parts, name, _spoken(name)) for name in names):
    caption = "What each component of the gold reward adds to its mean; the components sum to the mean."
    label = f"Gold reward by component: {told(rows)}"
    drawn.append(Drawing(figure.comparison(rows, "contribution to the mean gold reward", label), caption))
  if rows := compared(_quantity(found, key, _spoken(key)) for key, _ in SHARES):
    caption = "; ".join(f"{_spoken(key)}: {note}" for key, note in SHARES) + ". Bars: 95 % Wilson intervals."
    label = f"Shares of responses: {told(rows)}"
    drawn.append(Drawing(figure.comparison(rows, "share of the prompts of its kind", label), caption))
  return drawn


def _quantity(found: Records, key: str, name: str) -> Quantity:
  """A measure of every policy that has it."""
  having = {NAMES[policy]: record for policy, record in found.items() if record.get(key) is not None}
  return Quantity(name, {k: Point(record[key], *(record.get(f"{key}_interval") or ())) for k, record in having.items()})


def _spoken(key: str) -> str:
  return key.replace("_", "-")


def _told(quantity: Quantity) -> str:
  return f"{quantity.name}: " + ", ".join(f"{name} {point.value:.3g}" for name, point in quantity.values.items())
