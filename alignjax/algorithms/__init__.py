"""Algorithms by name, and what they share: each is `prepare` (no gradient) and `loss` (gradient).

Another algorithm comes in as a module with its options, and its name in `NAMES`.
It may import `sampling`, `rewards` and the rooms below; it knows no optimizer, no run and no config.
"""

import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType

from alignjax.algorithms.algorithm import Algorithm

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


class _Modules(Mapping[str, ModuleType]):
  """The module of each name, imported when it is asked for: a run's config is read without the other algorithms."""

  def __getitem__(self, name: str) -> ModuleType:
    if name not in NAMES:
      raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}")

  def __contains__(self, name: object) -> bool:
    return name in NAMES

  def __iter__(self) -> Iterator[str]:
    return iter(NAMES)

  def __len__(self) -> int:
    return len(NAMES)


ALGORITHMS = _Modules()

__all__ = ["ALGORITHMS", "Algorithm"]
