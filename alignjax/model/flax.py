"""Your own Flax module, Linen or NNX, as a `Model`: all algorithms, checkpoints, meshes and the sampler take it.

The module is called as module(tokens, segment_ids, positions), int32 [B, T] each, and returns the hidden states
[B, T, D] after its final norm, never logits. A row holds several texts: a token sees those before it with its own
segment id, and its place is in `positions`. Segment id 0 is padding, on either side (`check.check` tests all this).
The module's parameters are the entry "module" of the model's.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx, traverse_util
from flax.core import meta

from alignjax.errors import InputError
from alignjax.model import decoder, recompute_cache
from alignjax.model.attention.form import as_segments
from alignjax.model.config import ModelConfig
from alignjax.model.decoder import Model, Weight
from alignjax.system import sharding
from alignjax.types import Params

Axes = Callable[[str, tuple[int, ...]], Sequence[str | None]]


class _Net(NamedTuple):
  """A module of Linen or NNX as functions; parameters are arrays by path, such as "block_0/dense/kernel".

  Attributes:
    init: key -> parameters.
    apply: (parameters, tokens, segment_ids, positions) -> hidden states.
    names: path -> the logical axes that the module gives a parameter.
  """

  init: Callable[[jax.Array], dict[str, jax.Array]]
  apply: Callable[..., jax.Array]
  names: dict[str, tuple[str | None, ...]]


def wrap(
  module: linen.Module | Callable[[nnx.Rngs], nnx.Module],
  config: ModelConfig,
  unembedding: str | Callable[[Params], jax.Array],
  axes: Axes | None = None,
) -> Model:
  """Wraps a Flax module as the model whose hidden states it computes.

  Args:
    module: a Linen module, or a function of nnx.Rngs that makes an NNX module.
    config: its vocab (0: the rows of the unembedding) and head are used; embed and dtype become the module's. Its other
      sizes are only for the module to read.
    unembedding: of shape [V, D]: the path of that parameter ("embed/embedding"), or a function of the module's
      parameters, nested dicts.
    axes: (path, shape) -> the logical axis (`sharding.RULES`) of each dimension, or None if it is replicated. The
      default is what `with_partitioning` or `with_logical_partitioning` gave a parameter; without, it is replicated.

  Raises:
    InputError: the module does not compute hidden states of these inputs, has other state than parameters, no such
      unembedding, another vocabulary than `config.vocab`, or an axis that `sharding.RULES` does not name.
  """
  net = _linen(module) if isinstance(module, linen.Module) else _nnx(module)
  abstract = jax.eval_shape(lambda: net.init(jax.random.key(0)))
  table = _table(net, abstract, axes)
  unembed = _unembedding(unembedding, abstract)
  vocab, hidden = _sizes(net, unembed, abstract)
  if config.vocab not in (0, vocab):
    raise InputError(f"the module's unembedding has {vocab} rows, but the vocabulary is {config.vocab}; take that many")
  config = dataclasses.replace(config, vocab=vocab, embed=hidden.shape[-1], dtype=str(hidden.dtype))
  head = {}
  if config.head == "scalar":
    head["score"] = decoder.weights(config)["score"]

  def init(key):
    return {"module": _nested(net.init(key))} | decoder.init_weights(head, key, config.param_dtype)

  def forward(params, tokens, segment_ids, positions, cache=None):
    states = functools.partial(net.apply, _flat(params["module"]))
    segment_ids = as_segments(segment_ids).ids
    if cache is None:
      return states(tokens, segment_ids, positions), None
    return recompute_cache.forward(states, cache, tokens, segment_ids, positions)

  return Model(
    config,
    weights=lambda: {"module": _nested(table)} | head,
    init=init,
    forward=forward,
    init_cache=recompute_cache.empty,
    unembedding=lambda params: unembed(_flat(params["module"])),
  )


def params_of(source: nnx.Module | Params) -> Params:
  """Returns {"module": ...}, the parameters of a wrapped model without a head, as its `forward` takes them.

  Args:
    source: an NNX module that has them, or the variables of Linen's `init`.
  """
  if isinstance(source, nnx.Module):
    flat = {_path(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(source, nnx.Param))}
    return {"module": _nested(flat)}
  return {"module": _nested(_flat(meta.unbox(source)["params"]))}


def _linen(module: linen.Module) -> _Net:
  """Returns the functions of a Linen module.

  Raises:
    InputError: the module fails, or has variables that are no parameters.
  """

  def variables(key):
    with _no_mesh():
      return module.init(key, *_inputs())

  def apply(flat, *inputs):
    return module.apply({"params": _nested(flat)}, *inputs)

  boxed = _attempt(lambda: jax.eval_shape(lambda: variables(jax.random.key(0))))
  if others := sorted(boxed.keys() - {"params"}):
    raise InputError(f"the module has variables of {others[0]!r}; a model has parameters alone, take them out")
  boxes = traverse_util.flatten_dict(
    boxed.get("params", {}), is_leaf=lambda _, node: isinstance(node, meta.AxisMetadata), sep="/"
  )
  return _Net(
    init=lambda key: _flat(meta.unbox(variables(key))["params"]),
    apply=apply,
    names={path: box.names for path, box in boxes.items() if hasattr(box, "names")},
  )


def _nnx(make: Callable[[nnx.Rngs], nnx.Module]) -> _Net:
  """Returns the functions of the NNX module that `make` makes.

  Raises:
    InputError: `make` is no function, the module fails, or it has state that is no parameter.
  """
  if isinstance(make, nnx.Module) or not callable(make):
    name = type(make).__name__
    raise InputError(f"a {name} is no module to take; give one of Linen, or a function: nnx.Rngs -> one of NNX")

  def parts(key):
    with _no_mesh(), nnx.use_eager_sharding(False):
      return nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)

  def abstract():
    with _no_mesh():
      return nnx.eval_shape(lambda: parts(jax.random.key(0)))

  graph, state, others = _attempt(abstract)
  for path, variable in nnx.to_flat_state(others):
    kind = type(variable).__name__
    raise InputError(f"the module has {_path(path)!r}, a {kind}; a model has parameters (nnx.Param) alone, take it out")
  variables = {_path(path): (path, variable) for path, variable in nnx.to_flat_state(state)}

  def apply(flat, *inputs):
    filled = [(path, variable.replace(flat[name])) for name, (path, variable) in variables.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))(*inputs)

  names = {}
  for name, (_, variable) in variables.items():
    if axes := variable.get_metadata().get("out_sharding"):
      names[name] = tuple(axes)
  return _Net(
    init=lambda key: {_path(path): variable.get_value() for path, variable in nnx.to_flat_state(parts(key)[1])},
    apply=apply,
    names=names,
  )


def _no_mesh():
  """Returns a context without a mesh: within one, Flax would take the names of logical axes for those of the mesh."""
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def _inputs(rows: int = 1, columns: int = 8) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Tokens, segment ids and positions of rows that hold one text each."""
  tokens = jnp.zeros((rows, columns), jnp.int32)
  return tokens, tokens + 1, tokens + jnp.arange(columns)


def _table(net: _Net, abstract: dict[str, Any], axes: Axes | None) -> dict[str, Weight]:
  """Returns the weights of a module by path, with the axes of `wrap`."""

  def draw(path, key, shape, dtype):
    return net.init(key)[path].astype(dtype)

  def own_axes(path, shape):
    return net.names.get(path, (None,) * len(shape))

  axes_of = axes or own_axes
  table = {
    path: Weight(x.shape, tuple(axes_of(path, x.shape)), functools.partial(draw, path), dtype=str(x.dtype))
    for path, x in abstract.items()
  }
  for path, weight in table.items():
    if len(weight.axes) != len(weight.shape):
      raise InputError(f"the module's {path} {weight.shape} has axes {weight.axes}; give one for each dimension")
    for axis in weight.axes:
      if axis is not None and axis not in sharding.RULES:
        known = ", ".join(sharding.RULES)
        raise InputError(f"the module's {path} has an axis {axis!r}; they are {known}, or None (see wrap's axes)")
  if jax.device_count() > 1 and not any(axis for weight in table.values() for axis in weight.axes):
    warnings.warn("no parameter of the module has an axis: every device holds them all (see wrap's axes)", stacklevel=3)
  return table


def _unembedding(unembedding, abstract: dict[str, Any]) -> Callable[[dict[str, Any]], jax.Array]:
  """Returns the unembedding as a function of the parameters by path."""
  if callable(unembedding):
    return lambda flat: unembedding(_nested(flat))
  if unembedding not in abstract:
    raise InputError(f"the module has no parameter {unembedding!r} to unembed with; it has {', '.join(abstract)}")
  return lambda flat: flat[unembedding]


def _sizes(net: _Net, unembed, abstract: dict[str, Any]) -> tuple[int, jax.ShapeDtypeStruct]:
  """V, and the abstract hidden states [1, T, D] of an input.

  Raises:
    InputError: the module fails, or its hidden states and unembedding [V, D] do not fit together.
  """
  inputs = _inputs()
  hidden = _attempt(lambda: jax.eval_shape(net.apply, abstract, *inputs))
  matrix = _attempt(lambda: jax.eval_shape(unembed, abstract))
  if not hasattr(matrix, "shape") or len(matrix.shape) != 2:
    raise InputError(f"the module's unembedding is {_shape(matrix)}; it must be one matrix [V, D]")
  if not hasattr(hidden, "shape") or hidden.shape != (*inputs[0].shape, matrix.shape[1]):
    raise InputError(
      f"the module returns {_shape(hidden)} for tokens {list(inputs[0].shape)}, and its unembedding is [V, D] = "
      f"{list(matrix.shape)}; it must return the hidden states [B, T, D] before the unembedding, no logits"
    )
  return matrix.shape[0], hidden


def _attempt(f: Callable[[], Any]) -> Any:
  """Returns the result of the user's code; its exceptions become an InputError."""
  try:
    return f()
  except Exception as error:  # the module is the user's own code
    reason = str(error).strip().split("\n")[0]
    call = "the module fails on (tokens, segment_ids, positions), int32 [B, T]"
    raise InputError(f"{call}: {type(error).__name__}: {reason}") from error


def _shape(x: Any) -> str:
  """Returns the shape of an array, or the type of another object, for an error message."""
  if hasattr(x, "shape"):
    return str(list(x.shape))
  return f"a {type(x).__name__}"


def _path(keys: Sequence[Any]) -> str:
  return "/".join(map(str, keys))


def _flat(tree: Params) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def _nested(flat: dict[str, Any]) -> Params:
  return traverse_util.unflatten_dict(flat, sep="/")
