"""Preference optimization in JAX: supervised fine-tuning, reward models, DPO, PPO, sampling and evaluation.

Ten names; each is imported when it is first used, so that the command line answers at once.
"""

import importlib

_HOMES = {
  "evaluate": "evaluation.held_out",  # held-out numbers of a run directory
  "fit": "train",  # trains a config, or continues it
  "load": "runs.run",  # a run directory -> model, parameters, tokenizer
  "load_config": "runs.config",  # configs/NAME.py:variant with overrides
  "make_mesh": "system.sharding",
  "read_texts": "data",  # data files -> texts to train a tokenizer on
  "resolve": "runs.config",  # a dict -> a checked config
  "sample": "runs.run",  # completions of a run's policy
  "testbed": "environments.testbed",  # the built-in world
  "train_tokenizer": "data",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
  return module if name == "testbed" else getattr(module, name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
