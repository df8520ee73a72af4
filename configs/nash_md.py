"""Nash-MD on the built-in world: the policy plays against a mixture of itself and the reference, judged by the
quickstart's reward model.

Munos et al. 2023 (arXiv:2312.00886).

  alignjax quickstart --workdir runs/quickstart     # trains the SFT run and the reward model
  alignjax train --config configs/nash_md.py --workdir runs/nash-md

What it reaches has not been measured. `:smoke` takes six steps of a toy model on any machine, paid for two letters: it
needs no reward model.
"""

import online_dpo
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
  """The run that the module's docstring claims; variant "smoke" is its smallest."""
  c = online_dpo.get_config(variant).unlock()
  taken = ("rewards", "reward_model", "reward_settings", "max_new_tokens", "temperature")
  algorithm = {name: c.algorithm[name] for name in taken if name in c.algorithm}
  c.algorithm = ConfigDict(
    algorithm
    | dict(
      name="nash_md",
      num_generations=2,  # completions of a prompt; the last is the mixture's
      mixture_coef=0.5,  # the reference's share in the exponent of the mixture
      beta=0.1,
    )
  )
  return c.lock()
