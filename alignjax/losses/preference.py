"""Losses over pairs of completions: arrays in, per-pair losses out; nothing here knows of models.

A new loss is one function of `(pair, *, beta, ...)` and its name in the dict at the foot.
"""

from typing import NamedTuple

import jax


class Pair(NamedTuple):
  """Summed log-probabilities of both completions, in nats; all of one shape."""

  chosen: jax.Array
  rejected: jax.Array
  reference_chosen: jax.Array
  reference_rejected: jax.Array

  @property
  def margin(self) -> jax.Array:
    """By how much the policy has raised log p(chosen) - log p(rejected) over the reference."""
    return (self.chosen - self.rejected) - (self.reference_chosen - self.reference_rejected)


def dpo(pair: Pair, *, beta: jax.Array, label_smoothing: jax.Array | float = 0.0) -> jax.Array:
  """-(1 - e) log sigmoid(beta * margin) - e log sigmoid(-beta * margin), per pair.

  With e = label_smoothing > 0 this is conservative DPO, which assumes that a share e of the labels is flipped. TRL 1.x
  ignores label_smoothing for its "sigmoid" loss; 0.x computed what stands here.

  Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); smoothing: Mitchell 2023, eq. 3 (ericmitchell.ai/cdpo.pdf)
  """
  logits = beta * pair.margin
  return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * (jax.nn.log_sigmoid(-logits))


LOSSES = {f.__name__: f for f in (dpo,)}
