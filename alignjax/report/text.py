"""Numbers as text for people."""

from collections.abc import Sequence
from typing import Any


def number(value: Any) -> str:
  """Formats a number with four significant digits and a true minus sign; "" for None; other values unchanged."""
  if value is None:
    return ""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return str(value)
  if isinstance(value, int):
    return f"{value:,}".replace("-", "−")
  return f"{value:.4g}".replace("-", "−")


def measured(value: float | None) -> str:
  """Formats a measurement with three decimals, so that the values of a column compare easily; "" for None."""
  if value is None:
    return ""
  return f"{value:.3f}".replace("-", "−")


def interval(ends: Sequence[float | None] | None) -> str:
  """Formats an interval; "" if there is none."""
  if not ends or None in ends:
    return ""
  return f"{measured(ends[0])} to {measured(ends[1])}"
