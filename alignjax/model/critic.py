"""A value model beside a policy: one entry more in its parameters, which the policy itself never reads.

The critic is a trunk of its own with a scalar head (`own`), as in Stiennon et al. 2020, or a head on the policy's
states (`shared`): half the memory and time, and two losses that pull at one trunk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros

from alignjax.model import build, decoder, heads
from alignjax.model.attention.form import Segments
from alignjax.model.decoder import Model, Weight
from alignjax.types import Batch, Params

KINDS = ("own", "shared")


@functools.lru_cache(maxsize=16)
def attach(model: Model, kind: str) -> Model:
  """`model` with a critic: its parameters have an entry "value" more, which is trained with the rest.

  `forward` takes parameters without that entry too: they are the policy's.
  """
  if kind == "shared":
    dtype = str(jnp.promote_types(model.config.param_dtype, jnp.float32))  # what is trained alone is not in bfloat16
    table = {"score": Weight((model.config.embed, 1), (None, None), zeros, dtype=dtype)}
    fresh = lambda key: decoder.init_weights(table, key, model.config.param_dtype)
  else:
    table, fresh = trunk(model).weights(), trunk(model).init
  policy = lambda params: {name: tree for name, tree in params.items() if name != "value"}
  return model._replace(
    weights=lambda: model.weights() | {"value": table},
    init=lambda key: model.init(key) | {"value": fresh(key)},
    forward=lambda params, *args, **kwargs: model.forward(policy(params), *args, **kwargs),
    trained=(*model.trained, "value") if model.trained else (),
  )


def trunk(model: Model) -> Model:
  """The critic with a trunk of its own: the policy's with one scalar head; the decoder's has no unembedding."""
  c = model.config
  return build.make(dataclasses.replace(c, head="scalar", score_heads=1, tied=c.tied or not c.module))


def policy_of(model: Model) -> Model:
  """`model` without its critic."""
  return model._replace(
    weights=lambda: {name: table for name, table in model.weights().items() if name != "value"},
    init=lambda key: {name: tree for name, tree in model.init(key).items() if name != "value"},
    trained=tuple(name for name in model.trained if name != "value"),
  )


def start(kind: str, params: Params, source: Params) -> Params:
  """`params` with a critic whose trunk is that of `source`, and its head too if it has one (of several, their mean).

  It stays in the critic's own dtypes, whatever the source is held in.
  """
  if kind == "shared":
    return params
  fresh = params["value"]
  taken = {name: source[name] for name in fresh if name != "score"}
  if "score" in source:
    taken["score"] = source["score"].mean(axis=-1, keepdims=True)
  copied = {
    name: jax.tree.map(lambda x, own: jnp.array(x, own.dtype), tree, fresh[name]) for name, tree in taken.items()
  }
  return params | {"value": fresh | copied}


def values(model: Model, params: Params, batch: Batch, hidden: jax.Array) -> jax.Array:
  """The value before each token is chosen, float32 [B, T]: column t looks at the tokens before t; column 0 is 0.

  Args:
    model: with a critic.
    params: of both.
    batch: tokens, segment_ids, positions [B, T].
    hidden: the policy's states [B, T, D], which a shared critic reads.
  """
  value = params["value"]
  if value.keys() - {"score"}:
    hidden, _ = trunk(model).forward(value, batch["tokens"], Segments(batch["segment_ids"], most=1), batch["positions"])
  return jnp.roll(heads.score(value, hidden), 1, axis=1).at[:, 0].set(0.0)
