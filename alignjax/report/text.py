"""Numbers as a reader likes them."""

from collections.abc import Sequence
from typing import Any


def number(value: Any) -> str:
  """A number to read: four significant digits, a true minus sign; anything else as it is."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return "" if value is None else str(value)
  text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
  return text.replace("-", "−")


def measured(value: float | None) -> str:
  """A measurement to read, with three decimals throughout so that a column compares at a glance."""
  return "" if value is None else f"{value:.3f}".replace("-", "−")


def interval(ends: Sequence[float | None] | None) -> str:
  """An interval to read; "" where there is none."""
  return f"{measured(ends[0])} to {measured(ends[1])}" if ends and None not in ends else ""
