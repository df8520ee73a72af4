"""Algorithms by name, and what they share: each is `prepare` (no gradient) and `loss` (gradient).

Another algorithm comes in as a module with its options and its RECIPE, and its name in `NAMES`.
It may import `sampling`, `rewards` and the rooms below; it knows no optimizer, no run and no config.
"""

import importlib
from collections.abc import Iterator, Mapping

from alignjax.algorithms.algorithm import Algorithm, Parts, Recipe

NAMES = (
  "sft",
  "distillation",
  "reward",
  "process_reward",
  "preference",
  "unpaired",
  "ppo",
  "grpo",
  "online_preference",
  "nash_md",
)


class _Recipes(Mapping[str, Recipe]):
  """The recipe of each name. Its module is imported when it is asked for: a config imports its own algorithm alone."""

  def __getitem__(self, name: str) -> Recipe:
    if name not in NAMES:
      raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}").RECIPE

  def __contains__(self, name: object) -> bool:
    return name in NAMES

  def __iter__(self) -> Iterator[str]:
    return iter(NAMES)

  def __len__(self) -> int:
    return len(NAMES)


ALGORITHMS = _Recipes()

__all__ = ["ALGORITHMS", "Algorithm", "Parts", "Recipe"]
