"""Names that every part shares.

Shape legend: B rows, T row length, S segments in a row, P examples in a row (S = 2P for pairs),
D embed, V vocabulary, L layers, N query heads, K key/value heads, H head size, F feed-forward size, C cache columns.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import optax

Params = Any  # a pytree of arrays made from a table of `Weight`
Rows = dict[str, jax.Array]  # tokens, segment_ids, positions, loss_mask [B, T]; columns [B, P], of rankings [B, P, K]
Scalars = dict[str, jax.Array]  # numbers [] by name
NONE: Mapping[str, Any] = types.MappingProxyType({})
HParams = dict[str, Any]  # float32 scalars, traced: changing one recompiles nothing; abstract before a compilation


class Mean(NamedTuple):
  """A metric that is a mean over some of a step's rows or tokens, which another part of the step may lack.

  Both are sums, so that parts of a step add up; `divided` makes one number of them, on the host.

  Attributes:
    total: the sum of the values.
    count: the sum of their weights.
  """

  total: Any
  count: Any


Metrics = dict[str, jax.Array | Mean]  # a sum over the rows of a step, or a mean over some of them


def divided(metrics: Mapping[str, float | Mean]) -> dict[str, float]:
  """Divides the means among a step's metrics, on the host, into numbers; a mean over nothing is left out."""
  numbers = {}
  for name, value in metrics.items():
    if not isinstance(value, Mean):
      numbers[name] = value
    elif value.count:
      numbers[name] = value.total / value.count
  return numbers


@flax.struct.dataclass
class Batch:
  """The data of a step: rows, which are dealt out to devices and to the step's parts, and what all its parts share.

  Attributes:
    rows: B of them, the first axis of every array: by name as data lays them out, or a record of an online algorithm
      (`algorithms.online_rows`), whose `texts` are by name.
    totals: [] by name, of the whole step: the counts that losses divide by, and facts such as a sampler's occupancy.
    running: [] by name, the statistics of `TrainState.running`, which `prepare` reads and updates.
  """

  rows: Any
  totals: Scalars = flax.struct.field(default_factory=dict)
  running: Scalars = flax.struct.field(default_factory=dict)

  @property
  def size(self) -> int:
    """The number of rows, B."""
    return len(jax.tree.leaves(self.rows)[0])

  def updated(
    self, rows: Mapping[str, Any] = NONE, totals: Mapping[str, Any] = NONE, running: Mapping[str, Any] = NONE
  ) -> "Batch":
    """Returns the batch with these entries beside its own, or in place of those of the same name."""
    batch = dataclasses.replace(self, totals={**self.totals, **totals}, running={**self.running, **running})
    if rows:
      batch = dataclasses.replace(batch, rows={**self.rows, **rows})
    return batch


@flax.struct.dataclass
class Trees:
  """The trees that `prepare` and `rollout` of an algorithm read.

  Attributes:
    others: by name, such as "reference" and "reward_model": constants of the run, or trees that follow the policy.
    policy: the parameters of the moment, the base under LoRA factors included; None if they are not read.
    hparams: the traced hyper-parameters; None if they are not read.
  """

  others: dict[str, Params] = flax.struct.field(default_factory=dict)
  policy: Params = None
  hparams: HParams | None = None

  @property
  def reference(self) -> Params:
    """The parameters of the reference; KeyError without one."""
    return self.others["reference"]


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes, and the run's key.

  Attributes:
    step: int32 [], batches consumed, skipped ones included: the data position of the run.
    params: what is trained.
    opt_state: the optimizer's state.
    key: the run's key, constant; a step folds its number in.
    skipped: int32 [], steps whose loss or gradient was not finite, so far.
    skipped_in_a_row: int32 [], the same since the last good step.
    running: float32 [] by name, statistics that `prepare` reads and updates; {} for most algorithms.
    synced: trees that follow the params from afar, such as TR-DPO's reference; {} for most algorithms.
  """

  step: jax.Array
  params: Params
  opt_state: optax.OptState
  key: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  running: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
  synced: dict[str, Params] = flax.struct.field(default_factory=dict)
