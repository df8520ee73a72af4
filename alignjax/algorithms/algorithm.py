"""The record of an algorithm: two pure functions and a few facts; and the recipe by which a run makes one."""

import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignjax.data import segment
from alignjax.errors import InputError
from alignjax.losses.objective import Family, Term, function_of, keywords, terms
from alignjax.model.attention.form import Segments
from alignjax.model.decoder import Model
from alignjax.system import ranges
from alignjax.types import Batch, HParams, Mean, Metrics, Params, Rows, Scalars, Trees, divided


class Sync(NamedTuple):
  """The rule by which a tree follows the params: every so many steps it becomes mix * params + (1 - mix) * itself.

  Attributes:
    every: optimizer steps between moves.
    mix: the policy's share in a move, above 0, at most 1.

  Source: Gorbatovski et al. 2024, eq. 2 (arXiv:2404.09656)
  """

  every: int
  mix: float


class Passes(NamedTuple):
  """The passes of learning over a prepared batch.

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


ONCE = Passes()


class First(NamedTuple):
  """The parameters that are trained alone for a while, such as a critic before its policy.

  Attributes:
    names: entries of the params.
    over: running statistics -> bool [], whether the step that left them trained the rest too; before, the other params,
      and their part of the optimizer's state, stay as they are.
  """

  names: tuple[str, ...]
  over: Callable[[Mapping[str, jax.Array]], jax.Array]


class Column(NamedTuple):
  """A column of the rows that an example and a constant tree decide, so that it can be kept from run to run.

  Attributes:
    tree: the constant tree; `prepare` takes nothing else from it.
    score: (params, rows) -> float32 [B, P, *shape]; what `prepare` computes where the rows lack the column.
    shape: of an example's numbers: () for one, (2,) for one a side.
    settings: JSON values by name: whatever else decides the numbers, so that a cache of other settings is not used.
  """

  tree: str
  score: Callable[[Params, Rows], jax.Array]
  shape: tuple[int, ...]
  settings: Mapping[str, Any]


def _no_counts(rows: Any) -> Scalars:
  del rows
  return {}


def _as_given(params: Params, constant: dict[str, Params]) -> Params:
  del constant
  return params


@dataclasses.dataclass(frozen=True, eq=False)
class Algorithm:
  """The record that a recipe makes for a model; equal to itself alone.

  Attributes:
    prepare: (trees, batch, key) -> batch: all that needs no gradient. Adds the counts that the loss divides by, unless
      `counts` does.
    loss: (params, batch, hparams) -> (scalar, metrics): all that needs one.
    count: the total of the prepared batch that means of metrics weigh by.
    reads: names of the trees beside the policy that `prepare` and `rollout` take.
    reads_policy: whether they take the policy too, and the hyper-parameters.
    running: first values of statistics over the steps. `prepare` finds them in the batch's `running`, and returns them
      there, updated.
    since: of `running`, those that checkpoints of earlier versions lack, and the one whose value each then begins with.
    synced: how those of `reads` that are not constant follow the params.
    columns: those that `prepare` adds only where the rows lack them, by name.
    loss_reads: those of `reads` that `loss` finds among the params, as entries of the same dict.
    models: the models of those constant trees that have another than the run's own, by name.
    finish: metrics on the host -> numbers to log.
    rollout: (trees, batch, key) -> batch: of an online algorithm, which goes before `prepare`; rewards that Python
      functions give come between the two.
    counts: rows -> the totals that the loss divides by, where rows are taken in `passes`.
    passes: how often, and in how many parts, a prepared batch is learned from.
    first: what of the params is trained before the rest, if anything is.
    start: (params, constant trees) -> params: what a run begins with where the algorithm trains more than a policy.
  """

  prepare: Callable[[Trees, Batch, jax.Array], Batch]
  loss: Callable[[Params, Batch, HParams], tuple[jax.Array, Metrics]]
  count: str
  reads: tuple[str, ...] = ()
  reads_policy: bool = False
  running: Mapping[str, float] = dataclasses.field(default_factory=dict)
  since: Mapping[str, str] = dataclasses.field(default_factory=dict)
  synced: Mapping[str, Sync] = dataclasses.field(default_factory=dict)
  columns: Mapping[str, Column] = dataclasses.field(default_factory=dict)
  loss_reads: tuple[str, ...] = ()
  models: Mapping[str, Model] = dataclasses.field(default_factory=dict)
  finish: Callable[[Mapping[str, float | Mean]], dict[str, float]] = divided
  rollout: Callable[[Trees, Batch, jax.Array], Batch] | None = None
  counts: Callable[[Any], Scalars] = _no_counts
  passes: Passes = ONCE
  first: First | None = None
  start: Callable[[Params, dict[str, Params]], Params] = _as_given

  @property
  def constant(self) -> tuple[str, ...]:
    """The trees of `reads` that a run keeps as they were."""
    return tuple(name for name in self.reads if name not in self.synced)

  def model_of(self, name: str, trained: Model) -> Model:
    """Returns the model whose forward takes the tree `name`: its entry in `models`, or `trained` if it has none."""
    return self.models.get(name, trained)

  def uncached(self, columns: Collection[str]) -> tuple[str, ...]:
    """Returns the names of the constant trees that `prepare` still needs where every batch brings these columns."""
    covered = {column.tree for name, column in self.columns.items() if name in columns}
    return tuple(name for name in self.constant if name not in covered)

  def trees(self, others: dict[str, Params], params: Params, hparams: HParams | None = None) -> Trees:
    """Gathers what `prepare` and `rollout` read.

    Args:
      others: the trees of `reads`, by name.
      params: of the moment; left out unless `reads_policy`.
      hparams: the traced hyper-parameters; left out unless `reads_policy`.
    """
    if not self.reads_policy:
      return Trees(others)
    return Trees(others, params, hparams)

  def for_loss(self, others: dict[str, Params]) -> dict[str, Params]:
    """Returns those of the trees `others` that `loss` reads; pass them as `held` to the train step."""
    return {name: others[name] for name in self.loss_reads}


@dataclasses.dataclass(frozen=True)
class Options:
  """Static settings of an algorithm: another value, another program. `algorithm.NAME` in a config sets one.

  A field that is a number has a type of `alignjax.system.ranges`.
  """

  def __post_init__(self) -> None:
    ranges.check_record("algorithm", self)


@dataclasses.dataclass(frozen=True)
class Traced:
  """Traced hyper-parameters that an algorithm has whatever its loss; each with a type of `alignjax.system.ranges`.

  `algorithm.NAME` in a config sets one, as it does a keyword of the loss.
  """


class Special(NamedTuple):
  """Token ids that an online algorithm knows.

  Attributes:
    stop_id: ends a completion.
    pad_id: fills up rows, and is never sampled unless it is `stop_id` too.
    step_ends: the sequences that end a step of an answer.
  """

  stop_id: int
  pad_id: int
  step_ends: tuple[tuple[int, ...], ...] = ()


ENDLESS = Special(stop_id=-1, pad_id=0)  # of no tokenizer: nothing ends a completion


class Parts(NamedTuple):
  """The parts that a run has beside its config when it makes its algorithm.

  Attributes:
    microbatches: parts in which the rows are taken by what needs no gradient, as the step does.
    models: of the runs that options name, each with its option; their parameters are constant trees of these names.
    special: token ids of the sampler.
  """

  microbatches: int = 1
  models: tuple[tuple[str, Model], ...] = ()
  special: Special = ENDLESS


def _no_traced(terms: tuple[Term, ...], options: Any) -> dict[str, float]:
  del terms, options
  return {}


def _accepts(terms: tuple[Term, ...], options: Any) -> None:
  del terms, options


def _same_model(model: Model, options: Any) -> Model:
  del options
  return model


class Recipe(NamedTuple):
  """An algorithm before there is a model: what a config may set, and how the algorithm is made.

  `terms` are the objectives of `algorithm.loss`, `options` is a record of the type `options`.

  Attributes:
    options: the type of its static settings.
    family: the objectives that `algorithm.loss` may name.
    make: (model, terms, options, parts) -> the algorithm.
    records: (terms, options) -> the kind of records that it learns from.
    head: the head that its model needs: "none", or "scalar" for a reward.
    traced: types of hyper-parameters that it may have; the first is there whatever the options.
    more_traced: (terms, options) -> further hyper-parameters and their defaults, of the other types or of functions.
    functions: whose keywords may be hyper-parameters beside those of the losses.
    check: raises InputError for options that mean nothing with these objectives, or with one another.
    models: options that name a run directory, and the head of that run's model.
    adapt: (model, options) -> the model with what the algorithm trains beside it.
    online: whether it learns from its own completions; its options are then of `sampling_options.SamplingOptions`.
  """

  options: type[Any]
  family: Family
  make: Callable[[Model, tuple[Term, ...], Any, Parts], Algorithm]
  records: Callable[[tuple[Term, ...], Any], str]
  head: str = "none"
  traced: tuple[type[Traced], ...] = (Traced,)
  more_traced: Callable[[tuple[Term, ...], Any], dict[str, float]] = _no_traced
  functions: tuple[Callable[..., Any], ...] = ()
  check: Callable[[tuple[Term, ...], Any], None] = _accepts
  models: Mapping[str, str] = {}
  adapt: Callable[[Model, Any], Model] = _same_model
  online: bool = False

  @property
  def losses(self) -> Mapping[str, Any]:
    """The known objectives by name, the default first."""
    return self.family.known

  def hparams(self, loss: str = "", options: Any = None) -> dict[str, float]:
    """Returns {name: default} of a run's traced hyper-parameters.

    Args:
      loss: the value of `algorithm.loss`; "" for the first of `family.known`.
      options: a record of the type `self.options`; None for the defaults.

    Raises:
      InputError: an unknown loss, options that mean nothing with it, or a user's loss whose keyword is a setting's
        name.
    """
    options = options or self.options()
    objectives = terms(loss, self.family)
    self.check(objectives, options)
    of_losses = keywords(*(term.objective for term in objectives))
    for term in objectives:
      taken = {*keywords(term.objective)} & self.settings() if ":" in term.name else set()
      if taken:
        raise InputError(
          f"algorithm.loss={term.name}: its hyper-parameter {min(taken)} is a setting of the algorithm; rename it"
        )
    return of_losses | defaults_of(self.traced[0]) | self.more_traced(objectives, options)

  def settings(self) -> set[str]:
    """Returns the keys of a config's algorithm section that are there whatever the loss."""
    records = (self.options, *self.traced)
    names = {field.name for record in records for field in dataclasses.fields(record)}
    return names | {*keywords(*self.functions), "name", "loss", "learning_rate"}

  def build(self, model: Model, loss: str = "", options: Any = None, parts: Parts | None = None) -> Algorithm:
    """Makes the algorithm for a model, as `adapt` returned it.

    Args:
      model: with the head that `head` names.
      loss, options: as in `hparams`.
      parts: None for one microbatch, no other models and no tokenizer.

    Raises:
      InputError: as in `hparams`, or the parts lack something.
    """
    options = options or self.options()
    objectives = terms(loss, self.family)
    self.check(objectives, options)
    return self.make(model, objectives, options, parts or Parts())

  def kind(self, loss: str = "", options: Any = None) -> str:
    """Returns the kind of records that it learns from, such as "preference"; arguments as in `hparams`.

    Raises InputError as `objective.terms` does.
    """
    return self.records(terms(loss, self.family), options or self.options())

  def ranges(self, loss: str) -> Iterator[tuple[str, Any]]:
    """Iterates (name, type of `ranges`) of its options and hyper-parameters, as often as they declare a name.

    `loss` is as in `hparams`. Raises InputError while iterating, as `objective.terms` does.
    """
    for record in (self.options, *self.traced):
      yield from ranges.kinds_of(record).items()
    for function in (*(function_of(term.objective) for term in terms(loss, self.family)), *self.functions):
      yield from ranges.keyword_kinds(function).items()


def option_names(recipe: Recipe) -> list[str]:
  """Returns the names of a recipe's static settings, in their order."""
  return [field.name for field in dataclasses.fields(recipe.options)]


def defaults_of(record: type[Traced]) -> dict[str, float]:
  """Returns {name: default} of a type's hyper-parameters, all of which must have a default."""
  defaults: dict[str, float] = {}
  for field in dataclasses.fields(record):
    assert field.default is not dataclasses.MISSING, field.name
    defaults[field.name] = field.default
  return defaults


def segments(rows: Rows, sides: int = 1) -> Segments:
  """Returns what a model's forward takes as segment_ids: the rows', with their readers if there are "readers".

  Args:
    rows: with "segment_ids" [B, T] and "example_mask" [B, P].
    sides: texts of an example, which bound the segments of a row.
  """
  ids = rows["segment_ids"]
  if "readers" in rows:
    ids = jnp.concatenate([ids[..., None], rows["readers"]], axis=-1)
  return Segments(ids, segment.count(rows["example_mask"].shape[1], sides))


def one_of(key: str, value: str, known: Mapping[str, Any] | Collection[str]) -> str:
  """Returns `value`, an option's, if it is one of `known`.

  Args:
    key: the option's name, for the error.

  Raises:
    InputError: it is none of `known`; the message names the nearest.
  """
  if value in known:
    return value
  near = difflib.get_close_matches(value, list(known), n=1)
  nearest = f"; the nearest is {near[0]}" if near else ""
  raise InputError(f"algorithm.{key}={value!r}: use one of {', '.join(known)}{nearest}")


def weighted_sum_of(objectives: tuple[Term, ...], argument: Any, hparams: HParams) -> jax.Array:
  """Sums the losses of objectives by their weights, in the losses' shape.

  Args:
    objectives: as `objective.terms` returns them.
    argument: what each takes, such as a Pair.
    hparams: has the keywords of all objectives; each is given its own.
  """
  losses = [term.weight * term.objective.loss(argument, **own_hparams(term.objective, hparams)) for term in objectives]
  return sum(losses[1:], losses[0])


def own_hparams(function: Any, hparams: HParams) -> HParams:
  """Returns those hyper-parameters that are keywords of a function or a record; `hparams` must have them all."""
  return {name: hparams[name] for name in keywords(function)}
