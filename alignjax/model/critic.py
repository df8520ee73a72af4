"""A value model beside a policy: an additional entry of its parameters, which the policy itself never reads.

The critic has a trunk of its own with a scalar head (`own`), as in Stiennon et al. 2020. Or it is a head on the
policy's states (`shared`): half the memory and time, but two losses train one trunk.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros

from alignjax.model import build, decoder, heads
from alignjax.model.attention.form import Segments
from alignjax.model.decoder import Model, Weight
from alignjax.types import Params, Rows

KINDS = ("own", "shared")


@functools.lru_cache(maxsize=16)
def attach(model: Model, kind: str) -> Model:
  """Returns `model` with a critic, an additional entry "value" of its parameters, which is trained with the rest.

  `forward` takes parameters without that entry too: they are the policy's.

  Args:
    model: the policy.
    kind: one of `KINDS`, which is not checked here: "own" for a trunk of its own, "shared" for a head on the policy.
  """
  fresh: Callable[[jax.Array], Params]
  if kind == "shared":
    dtype = str(jnp.promote_types(model.config.param_dtype, jnp.float32))  # trained weights are not in bfloat16
    table = {"score": Weight((model.config.embed, 1), (None, None), zeros, dtype=dtype)}
    fresh = functools.partial(decoder.init_weights, table, dtype=model.config.param_dtype)
  else:
    table = trunk(model).weights()
    fresh = trunk(model).init

  def init(key):
    return model.init(key) | {"value": fresh(key)}

  def forward(params, *args, **kwargs):
    policy = {name: tree for name, tree in params.items() if name != "value"}
    return model.forward(policy, *args, **kwargs)

  trained = model.trained and (*model.trained, "value")  # () says that all entries are trained
  return model._replace(weights=lambda: model.weights() | {"value": table}, init=init, forward=forward, trained=trained)


def trunk(model: Model) -> Model:
  """Builds the critic with a trunk of its own: the policy's with one scalar head.

  The decoder's critic has no unembedding; a model of `module` keeps `tied` as it is.
  """
  c = model.config
  return build.make(dataclasses.replace(c, head="scalar", score_heads=1, tied=c.tied or not c.module))


def policy_of(model: Model) -> Model:
  """Returns `model` without its critic."""
  return model._replace(
    weights=lambda: {name: table for name, table in model.weights().items() if name != "value"},
    init=lambda key: {name: tree for name, tree in model.init(key).items() if name != "value"},
    trained=tuple(name for name in model.trained if name != "value"),
  )


def start(kind: str, params: Params, source: Params) -> Params:
  """Returns `params` with a critic that starts as `source`; a shared critic stays as it is.

  The critic keeps its own dtypes, whatever those of the source are.

  Args:
    kind: one of `KINDS`.
    params: of policy and critic, with the entry "value".
    source: a model's parameters: the critic gets its trunk, and its head if it has one (the mean of several).
  """
  if kind == "shared":
    return params
  fresh = params["value"]
  entries = {name: source[name] for name in fresh if name != "score"}
  if "score" in source:
    entries["score"] = source["score"].mean(axis=-1, keepdims=True)

  def copy(x, target):
    return jnp.array(x, target.dtype)

  copied = {name: jax.tree.map(copy, tree, fresh[name]) for name, tree in entries.items()}
  return params | {"value": fresh | copied}


def values(model: Model, params: Params, rows: Rows, hidden: jax.Array) -> jax.Array:
  """Computes the value before each token is chosen, float32 [B, T].

  Column t depends on the tokens before t; column 0 is 0.

  Args:
    model: with a critic.
    params: of policy and critic.
    rows: tokens, segment_ids, positions [B, T]; a critic with its own trunk reads them, with one segment in a row.
    hidden: the policy's states [B, T, D], which a shared critic reads.
  """
  value = params["value"]
  if value.keys() - {"score"}:
    hidden, _ = trunk(model).forward(value, rows["tokens"], Segments(rows["segment_ids"], most=1), rows["positions"])
  return jnp.roll(heads.score(value, hidden), 1, axis=1).at[:, 0].set(0.0)
