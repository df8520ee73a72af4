"""What an algorithm is: two pure functions and a few facts."""

import difflib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignjax.errors import InputError
from alignjax.losses.divergence import DIVERGENCES
from alignjax.model.attention.form import Segments
from alignjax.model.decoder import Model
from alignjax.system import ranges
from alignjax.types import Batch, HParams, Metrics, Params

MOMENTARY = ("policy", "hparams")  # of the trees that `prepare` takes, those that are no run's constants


class Sync(NamedTuple):
  """How a tree follows the params: every so many steps it becomes mix * params + (1 - mix) * itself.

  Source: Gorbatovski et al. 2024, eq. 2 (arXiv:2404.09656)
  """

  every: int
  mix: float


class Passes(NamedTuple):
  """How often a prepared batch is learned from.

  Attributes:
    epochs: over all its rows, in another order each.
    minibatches: parts of an epoch, an optimizer step each.
    stop: (metric, hparam): no further step is taken once the metric of one exceeds a positive hparam.
    first: names of metrics of which the first optimizer step's is logged, not the mean.
  """

  epochs: int = 1
  minibatches: int = 1
  stop: tuple[str, str] | None = None
  first: tuple[str, ...] = ()


class First(NamedTuple):
  """What is trained alone for a while, such as a critic before its policy.

  Attributes:
    names: entries of the params.
    over: running statistics -> bool [], whether the step that left them trained the rest too; before, the other params,
      and their part of the optimizer's state, stay as they are.
  """

  names: tuple[str, ...]
  over: Callable[[Mapping[str, jax.Array]], jax.Array]


class Column(NamedTuple):
  """A column of the batch that an example and a constant tree decide, so that it can be kept from run to run.

  Attributes:
    tree: the constant tree; `prepare` takes nothing else from it.
    score: (params, batch) -> float32 [B, P, *shape]; what `prepare` computes where the batch lacks the column.
    shape: of an example's numbers: () for one, (2,) for one a side.
    settings: JSON: what else decides them.
  """

  tree: str
  score: Callable[[Params, Batch], jax.Array]
  shape: tuple[int, ...]
  settings: Mapping[str, Any]


class Algorithm(NamedTuple):
  """What a module's `make` returns.

  Beside `make(model, loss="", microbatches=1, **options)` such a module has what is known before there is a model:
  `data(loss, **options)`, the kind of its records; `HEAD`, the head its model needs; `LOSSES`, what `algorithm.loss`
  may name, the default first; `OPTIONS`, names and defaults of its static settings (another value, another program);
  `hparams(loss, **options)`, names and defaults of the traced ones, which raises InputError for what does not fit
  together; and `RANGES`, the types (`alignjax.system.ranges`) of the numbers among the two, but for keywords of losses,
  which have theirs. `algorithm.NAME` in a config sets either. A module may have `MODELS`: those of its options that
  name a run directory, and the head of that run's model; `make` gets the models of those runs, and their parameters are
  constant trees of these names. It may have `adapt(model, **options)`, which gives the model what the algorithm trains
  beside it. One that samples (`rollout`) has `OPTIONS["rewards"]`, and `make` gets the tokenizer's `special` ids.

  Attributes:
    prepare: (frozen, batch, key) -> batch: all that needs no gradient. Adds the counts that the loss divides by, unless
      `counts` does.
    loss: (params, batch, hparams) -> (scalar, metrics): all that needs one.
    count: the scalar of the prepared batch that means of metrics weigh by.
    frozen: names of the trees that `prepare` takes; "policy" is the params of the moment, "hparams" the traced
      hyper-parameters.
    running: first values of statistics over the steps. `prepare` finds them in the batch as scalars, and returns them
      updated under the same names.
    since: of `running`, those that checkpoints of earlier versions lack, and the one whose value each then begins with.
    synced: how those of `frozen` that are not constant follow the params.
    columns: those that `prepare` adds only where the batch lacks them, by name.
    held: names of those of `frozen` that `loss` finds beside the params, as entries of the same dict.
    models: of those constant trees that another model than the run's own takes.
    finish: metrics on the host -> metrics to log: for what is no sum over rows, such as a mean over a class.
    rollout: (frozen, batch, key) -> batch: of an online algorithm, which goes before `prepare`; rewards that Python
      functions give come between the two.
    counts: batch -> the scalars that the loss divides by, where its rows are taken in `passes`.
    passes: how often, and in how many parts, a prepared batch is learned from.
    first: what of the params is trained before the rest, if anything is.
    start: (params, constant trees) -> params: what a run begins with where the algorithm trains more than a policy.
  """

  prepare: Callable[[dict[str, Params], Batch, jax.Array], Batch]
  loss: Callable[[Params, Batch, HParams], tuple[jax.Array, Metrics]]
  count: str
  frozen: tuple[str, ...] = ()
  running: Mapping[str, float] = {}
  since: Mapping[str, str] = {}
  synced: Mapping[str, Sync] = {}
  columns: Mapping[str, Column] = {}
  held: tuple[str, ...] = ()
  models: Mapping[str, Model] = {}
  finish: Callable[[dict[str, float]], dict[str, float]] = lambda metrics: metrics
  rollout: Callable[[dict[str, Params], Batch, jax.Array], Batch] | None = None
  counts: Callable[[Batch], Batch] = lambda batch: {}
  passes: Passes = Passes()
  first: First | None = None
  start: Callable[[Params, dict[str, Params]], Params] = lambda params, constant: params

  @property
  def constant(self) -> tuple[str, ...]:
    """The trees of `frozen` that a run keeps as they were."""
    return tuple(name for name in self.frozen if name not in MOMENTARY and name not in self.synced)

  def model_of(self, name: str, own: Model) -> Model:
    """The model of the tree `name`: the run's `own`, unless it is another's."""
    return self.models.get(name, own)

  def uncached(self, columns: Collection[str]) -> tuple[str, ...]:
    """The constant trees that `prepare` still needs where every batch brings these columns."""
    covered = {column.tree for name, column in self.columns.items() if name in columns}
    return tuple(name for name in self.constant if name not in covered)

  def trees(self, frozen: dict[str, Params], params: Params, hparams: HParams | None = None) -> dict[str, Params]:
    """`frozen`, and what of the moment `prepare` asks for."""
    moment = {"policy": params, "hparams": hparams}
    return frozen | {name: moment[name] for name in MOMENTARY if name in self.frozen}

  def beside(self, frozen: dict[str, Params]) -> dict[str, Params]:
    """What of `frozen` the loss reads: `held` of the train step."""
    return {name: frozen[name] for name in self.held}


def segments(batch: Batch, sides: int = 1) -> Segments:
  """What a model's forward takes as segment_ids, for examples of so many texts; with their readers if they share."""
  ids = batch["segment_ids"]
  if "readers" in batch:
    ids = jnp.concatenate([ids[..., None], batch["readers"]], axis=-1)
  return Segments(ids, sides * batch["example_mask"].shape[1])


def keywords(*functions: Callable) -> dict[str, float]:
  """The keyword-only parameters of losses and their defaults; of two that share a name, the first gives the default."""
  found: dict[str, float] = {}
  for function in functions:
    for name, parameter in inspect.signature(function).parameters.items():
      if parameter.kind is parameter.KEYWORD_ONLY:
        found.setdefault(name, parameter.default)
  return found


def one_of(key: str, value: str, known: Mapping | tuple) -> str:
  """`value`, or InputError where it is not one of `known`."""
  if value in known:
    return value
  near = difflib.get_close_matches(value, list(known), n=1)
  nearest = f"; the nearest is {near[0]}" if near else ""
  raise InputError(f"algorithm.{key}={value!r}: use one of {', '.join(known)}{nearest}")


def numbers(module: Any, loss: str) -> Iterator[tuple[str, Any]]:
  """Where the numbers of an algorithm module lie: (name, type of `ranges`) of its options and of its hyper-parameters
  for a loss; a name that several functions share comes once for each, and all hold.
  """
  yield from getattr(module, "RANGES", {}).items()
  losses = getattr(module, "LOSSES", {})
  functions = [losses[name] for name in weighted_sum(loss, losses)] if losses else []
  for function in (*functions, *DIVERGENCES.values()):
    yield from ranges.keyword_kinds(getattr(function, "loss", function)).items()


def weighted_sum(spec: str, losses: Mapping[str, Callable]) -> dict[str, float]:
  """The names and weights of "dpo:0.8+bco_pair:0.2+sft" (a weight left out is 1); the first of `losses` for "".

  Raises:
    InputError: an unknown name, one that comes twice, or a weight that is no number.
  """
  weights: dict[str, float] = {}
  for term in (spec or next(iter(losses))).split("+"):
    name, _, weight = term.partition(":")
    one_of("loss", name, losses)
    if name in weights:
      raise InputError(f"algorithm.loss={spec!r}: {name} comes twice; add up its weights")
    try:
      weights[name] = float(weight or 1)
    except ValueError as error:
      raise InputError(f"algorithm.loss={spec!r}: {weight!r} is no number; write {name}:0.5") from error
    ranges.check(f"algorithm.loss={spec!r}: the weight of {name}", weights[name], ranges.NonNegative)
  if not any(weights.values()):
    raise InputError(f"algorithm.loss={spec!r}: nothing to learn from; give a loss a weight")
  return weights
