"""What an algorithm is: two pure functions and a few facts."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from alignjax.types import Batch, HParams, Metrics, Params


class Algorithm(NamedTuple):
  """What a module's `make` returns.

  Beside `make(model, loss="", microbatches=1)` such a module has constants that are known before there is a model:
  `DATA`, the kind of its records; `HEAD`, the head its model needs; `HPARAMS`, names and defaults of its traced
  hyper-parameters, which `algorithm.NAME` in a config sets; `LOSSES`, the losses that `algorithm.loss` may name, the
  default first.

  Attributes:
    prepare: (frozen, batch, key) -> batch: all that needs no gradient. Adds the counts that the loss divides by.
    loss: (params, batch, hparams) -> (scalar, metrics): all that needs one.
    count: the scalar of the prepared batch that means of metrics weigh by.
    frozen: names of the parameter trees that `prepare` takes.
  """

  prepare: Callable[[dict[str, Params], Batch, jax.Array], Batch]
  loss: Callable[[Params, Batch, HParams], tuple[jax.Array, Metrics]]
  count: str
  frozen: tuple[str, ...] = ()
