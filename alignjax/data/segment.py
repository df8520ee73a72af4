"""The numbers of a row's segments, for whoever lays rows out and whoever reads them, in NumPy or JAX.

0 is padding. The texts of example k of a row are its segments `sides` * k + 1, ..., `sides` * (k + 1): in a row of
pairs, 2k + 1 is chosen and 2k + 2 rejected. The third completions of triples come after all pairs, so that pairs have
the same numbers with them and without: those of P pairs are 2P + 1, ..., 3P.
"""

from typing import Any

PAIR = 2  # sides of a pair: chosen, rejected


def of(example: Any, side: Any = 0, sides: int = 1) -> Any:
  """Returns the segment of an example's text; examples and sides count from 0."""
  return sides * example + side + 1


def of_third(example: Any, pairs: int) -> Any:
  """Returns the segment of the third completion of an example, in rows of so many pairs at most."""
  return of(count(pairs, PAIR) + example)


def count(examples: int, sides: int) -> int:
  """Returns how many segments so many examples have: their largest number."""
  return sides * examples


def thirds(segment_ids: Any, pairs: int) -> Any:
  """Returns the ids as if there were third completions alone: that of example k is k + 1, everything else 0."""
  return (segment_ids - count(pairs, PAIR)).clip(0)


def by_example(values: Any, sides: int) -> Any:
  """Parts values of segments [B, S, ...], S = P * sides, by example: [B, P, sides, ...]."""
  return values.reshape(len(values), -1, sides, *values.shape[2:])


def by_segment(values: Any) -> Any:
  """Joins values of examples [B, P, sides] to those of segments [B, S]: the inverse of `by_example`."""
  return values.reshape(len(values), -1)
