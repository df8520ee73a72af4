"""Objectives by name: alone, in a weighted sum, or a function of the user's own, as `algorithm.loss` writes them.

  dpo                             one of the known objectives
  dpo:0.8+bco_pair:0.2+sft        a weighted sum; a weight that is left out is 1
  my_losses:focal_dpo             the function focal_dpo of the module my_losses

What follows a colon is a weight if it is a number, and a function if it is none: dpo:focal is of a module dpo.

An objective is one record in the table of its family, such as `pair.PairObjective`, with all that is known of it.
"""

import difflib
import functools
import hashlib
import importlib
import importlib.machinery
import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from alignjax.errors import InputError
from alignjax.system import ranges


class Objective(Protocol):
  """A record of any family: its function, and what else an algorithm must know of it."""

  @property
  def loss(self) -> Callable[..., Any]:
    """The function; its keyword-only arguments are traced hyper-parameters."""
    ...


Record = TypeVar("Record", bound=Objective)


class Family(NamedTuple):
  """The objectives that one algorithm knows.

  Attributes:
    known: records by name, the default first.
    adopt: makes a record of a user's function, or checks the user's own record, and raises TypeError for another
      type; None where the family takes none.
    argument: the name of what a user's function is called with, for errors: "pair".
    sums: whether a weighted sum may be written.
  """

  known: Mapping[str, Any]
  adopt: Callable[[Callable[..., Any]], Any] | None = None
  argument: str = ""
  sums: bool = False


class Term(NamedTuple):
  """One objective of a sum.

  Attributes:
    name: as written in `algorithm.loss`, without the weight.
    weight: at least 0.
    objective: a record of the family, or a function itself where a family's records are functions; see `function_of`.
  """

  name: str
  weight: float
  objective: Any


_imported: dict[str, Any] = {}  # users' functions or records, by "module:function"
_failed: dict[str, InputError] = {}  # why one could not be imported that only a stored record names


def terms(spec: str, family: Family) -> tuple[Term, ...]:
  """Parses `algorithm.loss` into its objectives, in its order; "" names the family's default, its first.

  A weight that is left out is 1. A user's function must have been imported by `load` before.

  Args:
    spec: the value of `algorithm.loss`, as the module's docstring writes it.
    family: the objectives that the algorithm knows.

  Raises:
    InputError: an unknown name, one that comes twice, a weight that is no number, no positive weight, a sum where the
      family takes one objective, or a user's function that is not imported, failed to be, or has the wrong signature.
  """
  found: dict[str, Term] = {}
  for text in (spec or next(iter(family.known))).split("+"):
    name, weight = split(spec, text, family)
    if name in found:
      raise InputError(f"algorithm.loss={spec!r}: {name} comes twice; add up its weights")
    found[name] = Term(name, weight, lookup(name, family))
  if not any(term.weight for term in found.values()):
    raise InputError(f"algorithm.loss={spec!r}: nothing to learn from; give a loss a weight")
  return tuple(found.values())


def only(spec: str, family: Family) -> Term:
  """Parses an `algorithm.loss` of one objective, for a family without sums; raises as `terms`."""
  return terms(spec, family)[0]


def split(spec: str, text: str, family: Family) -> tuple[str, float]:
  """Splits "dpo", "dpo:0.5", "module:function" or "module:function:0.5" into (name, weight); 1 where none is written.

  What follows a colon is a weight if it is a number, and else a function, also where the module is called as a known
  objective is.

  Args:
    spec: the whole `algorithm.loss`, for errors.
    text: the part of it to split.
    family: tells whether it may name a user's function, or have a weight.

  Raises:
    InputError: what follows a colon is neither a number of at least 0 nor a function's name, a name has several colons,
      or the family takes no sum and a weight is written.
  """
  name, weight = _split(text)
  module, colon, rest = name.partition(":")
  if ":" in rest:
    raise InputError(f"algorithm.loss={spec!r}: {name} has more than one colon; write module:function:0.5")
  if colon and not is_own(name, family):
    raise InputError(f"algorithm.loss={spec!r}: {rest!r} is no number; write {module}:0.5")
  if not family.sums and text != name:
    raise InputError(f"algorithm.loss={spec!r}: this algorithm takes one loss without a weight; write {name}")
  number = float(weight or 1)
  ranges.check(f"algorithm.loss={spec!r}: the weight of {name}", number, ranges.NonNegative)
  return name, number


def _split(text: str) -> tuple[str, str]:
  """Splits a term into its name and the text of its weight, a number; "" if that is left out."""
  name, _, last = text.rpartition(":")
  if name and (not last or _is_number(last)):
    return name, last
  return text, ""


def _is_number(text: str) -> bool:
  try:
    float(text)
  except ValueError:
    return False
  return True


def is_own(name: str, family: Family) -> bool:
  """Returns whether a term's name, which has no weight, is a user's function, "module:function"."""
  module, _, function = name.partition(":")
  return family.adopt is not None and bool(module) and function.isidentifier()


def own_names(spec: str, family: Family) -> list[str]:
  """Lists the users' functions "module:function" in an `algorithm.loss`; [] if the family takes none."""
  names = [_split(text)[0] for text in spec.split("+")]
  return [name for name in names if is_own(name, family)]


def missing(spec: str, family: Family) -> list[str]:
  """Lists the users' functions in an `algorithm.loss` that this process has not imported."""
  return [name for name in own_names(spec, family) if name not in _imported]


def load(names: Iterable[str], *, needed: bool = True) -> None:
  """Imports users' functions, each "module:function": only what the user named, or gave permission for.

  The import runs the module. A name that this process has imported is not imported again.

  Args:
    names: of the functions.
    needed: False for a stored record, which may be read without them: an error then waits until a function is used.

  Raises:
    InputError: there is no such module or function, the module fails, or another module of its name was imported.
  """
  for name in names:
    _check_file(name)
    if name in _imported:
      continue
    try:
      _imported[name] = _import(name)
    except InputError as error:
      if needed:
        raise
      _failed[name] = error


def _check_file(name: str) -> None:
  """Raises InputError where a module of this name was imported from another file than would be imported now."""
  module = name.partition(":")[0]
  there = getattr(sys.modules.get(module), "__file__", None)
  now = importlib.machinery.PathFinder.find_spec(module) if "." not in module else None
  if there and now and now.origin and not os.path.samefile(there, now.origin):
    raise InputError(
      f"algorithm.loss={name}: {there} was imported as {module} before {now.origin}; rename one of the two"
    )


def folders(names: Iterable[str]) -> list[str]:
  """Lists the folders from which the modules of users' functions were imported, for another process to find them."""
  found = []
  for name in names:
    top = sys.modules.get(name.partition(":")[0].partition(".")[0])
    if file := getattr(top, "__file__", None):
      package = os.path.basename(file) == "__init__.py"
      found.append(os.path.dirname(os.path.dirname(file)) if package else os.path.dirname(file))
  return list(dict.fromkeys(found))


def digests(spec: str, family: Family) -> dict[str, str]:
  """Returns {name: sha256 of its module's file} of the users' functions in an `algorithm.loss` that are imported."""
  hashes = {}
  for name in own_names(spec, family):
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    if file:
      hashes[name] = hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
  return hashes


def _import(name: str) -> Any:
  module, _, attribute = name.partition(":")
  try:
    function = getattr(importlib.import_module(module), attribute)
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # the module is the user's own code: it may even exit
    said = " ".join(str(error).split())
    raise InputError(
      f"algorithm.loss={name}: {type(error).__name__}: {said}; give module:function, with the module beside the config "
      f"file or its folder in PYTHONPATH, or a number as the weight, as in {module}:0.5"
    ) from error
  if not callable(function_of(function)):
    raise InputError(f"algorithm.loss={name}: is of type {type(function).__name__}; give a function")
  return function


def lookup(name: str, family: Family) -> Any:
  """Returns the record of a known objective, or of a user's function that `load` has imported.

  `family.adopt` makes one of a user's function; a user's name may be of a record, too, which it checks.

  Raises:
    InputError: there is none, nobody gave permission to import it, its import failed, or its signature is another.
  """
  if name in family.known:
    return family.known[name]
  if ":" not in name or family.adopt is None:
    near = difflib.get_close_matches(name, list(family.known), n=1)
    nearest = f"; the nearest is {near[0]}" if near else ""
    own = " or module:function" if family.adopt else ""
    raise InputError(f"algorithm.loss={name!r}: use one of {', '.join(family.known)}{own}{nearest}")
  if name in _failed:
    raise _failed[name]
  if name not in _imported:
    raise InputError(
      f"algorithm.loss={name}: is Python that only the record of a run names, and may do anything; if you know it, add "
      "--trust-run-code, or set ALIGNJAX_TRUST_RUN_CODE=1"
    )
  return _adopted(name, _imported[name], family.adopt, family.argument)


@functools.lru_cache(maxsize=64)  # equal terms are one program
def _adopted(name: str, function: Any, adopt: Callable[[Any], Any], argument: str) -> Any:
  check_signature(name, function_of(function), argument)
  try:
    return adopt(function)
  except TypeError as error:
    raise InputError(f"algorithm.loss={name}: {error}") from error


def check_signature(name: str, function: Callable[..., Any], argument: str) -> None:
  """Raises InputError unless a user's function takes one argument, and keywords that have numbers as defaults.

  A keyword must not be declared as a whole number: traced hyper-parameters are floats.

  Args:
    name: "module:function", for errors.
    function: the user's.
    argument: the name of its one argument, for the remedy in errors.
  """
  remedy = f"write def {name.partition(':')[2]}({argument}, *, focus=2.0)"
  try:
    parameters = list(inspect.signature(function).parameters.values())
  except (TypeError, ValueError) as error:
    raise InputError(f"algorithm.loss={name}: has no signature that can be read; {remedy}") from error
  positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
  others = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
  if len(positional) != 1 or others:
    raise InputError(
      f"algorithm.loss={name}: takes {inspect.signature(function)}; it must take the {argument} alone, and "
      f"hyper-parameters behind a *: {remedy}"
    )
  for parameter in parameters:
    if parameter.kind is not parameter.KEYWORD_ONLY:
      continue
    if isinstance(parameter.default, bool) or not isinstance(parameter.default, int | float):
      raise InputError(
        f"algorithm.loss={name}: its hyper-parameter {parameter.name} has no number as a default; {remedy}"
      )
  for keyword, kind in ranges.keyword_kinds(function).items():
    if kind.__origin__ is int:
      raise InputError(
        f"algorithm.loss={name}: its hyper-parameter {keyword} is declared as a whole number; traced hyper-parameters "
        "are floats: declare it as one"
      )


def check_losses(
  objectives: Iterable[Term], argument: Any, shape: tuple[int, ...], kind: type = jax.ShapeDtypeStruct
) -> None:
  """Raises InputError where a user's function fails on an abstract argument, or returns no losses of this shape.

  Nothing is computed.

  Args:
    objectives: of which those with a name of the package are not checked.
    argument: abstract, what the functions take; their hyper-parameters are abstract scalars.
    shape: of the losses.
    kind: what the functions return: one array, or a record of arrays.
  """
  for term in objectives:
    if ":" in term.name:
      _check_losses(term, argument, shape, kind)


def _check_losses(term: Term, argument: Any, shape: tuple[int, ...], kind: type) -> None:
  hparams = {keyword: jax.ShapeDtypeStruct((), jnp.float32) for keyword in keywords(term.objective)}

  def call(argument, hparams):
    return term.objective.loss(argument, **hparams)

  try:
    result = jax.eval_shape(call, argument, hparams)
  except Exception as error:  # the function is the user's own code
    said = " ".join(str(error).split())[:300]
    raise InputError(f"algorithm.loss={term.name}: {type(error).__name__} when it is traced: {said}") from error
  if not isinstance(result, kind):
    raise InputError(f"algorithm.loss={term.name}: returns a {type(result).__name__}; return one array of losses")
  leaves = jax.tree.leaves(result)
  if any(leaf.shape != shape or not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
    returned = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)
    raise InputError(
      f"algorithm.loss={term.name}: returns {returned} for arrays of shape {list(shape)}; return a float loss for "
      "each, without a mean"
    )


def keywords(*objectives: Any) -> dict[str, float]:
  """Returns {name: default} of the keyword-only arguments of objectives (records or functions).

  Of two that share a name, the first gives the default.
  """
  defaults: dict[str, float] = {}
  for objective in objectives:
    for name, parameter in inspect.signature(function_of(objective)).parameters.items():
      if parameter.kind is parameter.KEYWORD_ONLY:
        defaults.setdefault(name, float(parameter.default))
  return defaults


def by_name(*objectives: Record) -> dict[str, Record]:
  """Returns {name of the function: record}, the table of some objectives."""
  return {objective.loss.__name__: objective for objective in objectives}


def record_of(own: Any, record: type[Any], *fields: Any) -> Any:
  """Returns a user's own record as it is, or the record of a user's function.

  Args:
    own: a record of the family, or a function.
    record: the type of the family's records, such as `pair.PairObjective`.
    fields: what the record of a function has after it, where the type has no defaults.

  Raises:
    TypeError: a record of another family.
  """
  if isinstance(own, record):
    return own
  if hasattr(own, "loss"):
    article = "an" if record.__name__[0] in "AEIOU" else "a"
    raise TypeError(f"is a {type(own).__name__}; give a function or {article} {record.__name__}")
  return record(own, *fields)


def function_of(objective: Any) -> Callable[..., Any]:
  """Returns the function of a record; a function is its own."""
  return getattr(objective, "loss", objective)
