"""The policies of a summary in comparison: a table, the frontier, and the trade-offs of alignment."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from alignjax.evaluation.testbed import baseline_key
from alignjax.report import figure
from alignjax.report.figure import Drawing, Point, Quantity
from alignjax.report.text import interval, measured

FIRST = "sft"  # the policy from which the others began
NAMES = {FIRST: "SFT", "dpo": "DPO", "ppo": "PPO"}  # a summary's sections, in the order in which they are shown

# Shares of `evaluation.testbed`: (name, note for the reader).
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
  """Returns the measures of each policy under the same keys, by section; {} if a summary has no other than the first.

  The first policy has no section: its measures are in the sections of the others, with its name in their keys.
  """
  others = {section: dict(summary[section]) for section in NAMES if section != FIRST and summary.get(section)}
  first: dict[str, Any] = {"kl": 0.0}
  for record in others.values():
    first |= {key: record[named] for key in record if (named := baseline_key(key, FIRST)) in record}
    record[f"gold_win_rate_vs_{FIRST}_interval"] = record.get("gold_win_rate_interval")
    if not record.get("kl_interval") and record.get("kl_stderr") is not None and record.get("kl") is not None:
      record["kl_interval"] = [record["kl"] + sign * 1.96 * record["kl_stderr"] for sign in (-1, 1)]
  if not others:
    return {}
  return {FIRST: first} | others


def table(policies: Records) -> list[Row]:
  """Makes a row for each measure that a policy other than the first has."""
  measures = [(f"gold_win_rate_vs_{name}", f"Gold win rate against {NAMES[name]}", _SAME_PROMPTS) for name in policies]
  measures.append(("gold_mean", "Mean gold reward", ""))
  measures.append(("kl", f"KL from {NAMES[FIRST]}, nats per completion", "how far the policy moved"))
  measures += [(key, _spoken(key).capitalize(), note) for key, note in SHARES]
  rows = []
  for key, measure, note in measures:
    values = _quantity(policies, key, measure).values
    if values.keys() - {NAMES[FIRST]}:
      rows.append(Row(measure, [_cell(values.get(NAMES[name])) for name in policies], note))
  return rows


_SAME_PROMPTS = "same prompts, ties half"


def _cell(point: Point | None) -> tuple[str, str]:
  if point is None:
    return "", ""
  return measured(point.value), interval((point.low, point.high))


def drawings(policies: Records) -> list[Drawing]:
  """Draws gold reward against KL, its components, and the shares, each if the first policy and another have it."""
  gold = _quantity(policies, "gold_mean", "Mean gold reward")
  kl = _quantity(policies, "kl", "KL, nats per completion")
  gold = gold._replace(values={name: point for name, point in gold.values.items() if name in kl.values})
  drawn = []
  if _compared([gold]):
    caption = "The gain of training, and how far each policy moved for it. Bars: 95 % intervals over prompts."
    drawn.append(Drawing(figure.frontier(gold, kl, _described([gold, kl])), caption))
  parts = {name: record.get("components", {}) for name, record in policies.items()}
  names = dict.fromkeys(name for part in parts.values() for name in part)
  if rows := _compared(_quantity(parts, name, _spoken(name)) for name in names):
    caption = "What each component of the gold reward adds to its mean; the components sum to the mean."
    label = f"Gold reward by component: {_described(rows)}"
    drawn.append(Drawing(figure.comparison(rows, "contribution to the mean gold reward", label), caption))
  if rows := _compared(_quantity(policies, key, _spoken(key)) for key, _ in SHARES):
    caption = "; ".join(f"{_spoken(key)}: {note}" for key, note in SHARES) + ". Bars: 95 % Wilson intervals."
    label = f"Shares of responses: {_described(rows)}"
    drawn.append(Drawing(figure.comparison(rows, "share of the prompts of its kind", label), caption))
  return drawn


def _compared(quantities: Iterable[Quantity]) -> list[Quantity]:
  """Selects the quantities that the first policy and another one have."""
  return [quantity for quantity in quantities if NAMES[FIRST] in quantity.values and len(quantity.values) > 1]


def _quantity(policies: Records, key: str, name: str) -> Quantity:
  """Collects a measure from every policy that has it."""
  points = {}
  for policy, record in policies.items():
    if record.get(key) is not None:
      ends = record.get(f"{key}_interval") or ()
      points[NAMES[policy]] = Point(record[key], *ends)
  return Quantity(name, points)


def _spoken(key: str) -> str:
  return key.replace("_", "-")


def _described(quantities: Iterable[Quantity]) -> str:
  """Describes quantities in words, for readers who cannot see the figure."""
  return "; ".join(map(_description, quantities))


def _description(quantity: Quantity) -> str:
  values = ", ".join(f"{name} {point.value:.3g}" for name, point in quantity.values.items())
  return f"{quantity.name}: {values}"
