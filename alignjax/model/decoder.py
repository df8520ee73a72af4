"""The decoder: one table of weights, one pure forward function.

Initialisation, the abstract tree, shardings and the parameter count all follow from the table.
`forward` returns hidden states, never logits: see losses/logps.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, normal, ones, zeros

from alignjax import sharding
from alignjax.model.attention import attention
from alignjax.model.config import ModelConfig
from alignjax.model.layers import einsum, rms_norm, rotary_angles, rotate, swiglu
from alignjax.types import Params


class Weight(NamedTuple):
  """One parameter: its shape, the logical axis of each dimension (`sharding.RULES`), its initialiser."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Initializer


class Model(NamedTuple):
  """A causal LM as data and functions. Anything with these names can be trained."""

  config: Any
  weights: Callable[[], Any]  # () -> tree of Weight
  init: Callable[[jax.Array], Params]  # key -> params
  forward: Callable[..., tuple[jax.Array, Any]]  # (params, tokens, segment_ids, positions, cache)
  init_cache: Callable[[int, int], Any]  # (rows, columns) -> cache
  unembedding: Callable[[Params], jax.Array]  # params -> [V, D]

  def abstract(self, mesh: jax.sharding.Mesh | None = None) -> Params:
    """The tree of ShapeDtypeStructs, with shardings where a mesh is given."""
    table, dtype = self.weights(), jnp.dtype(self.config.param_dtype)
    if mesh is None:
      return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, dtype), table, is_leaf=_is_weight)
    return jax.tree.map(
      lambda w, s: jax.ShapeDtypeStruct(w.shape, dtype, sharding=s),
      table,
      sharding.weight_shardings(table, mesh),
      is_leaf=_is_weight,
    )

  def num_params(self) -> int:
    """How many numbers the parameters hold."""
    return sum(math.prod(w.shape) for w in jax.tree.leaves(self.weights(), is_leaf=_is_weight))


def make(config: ModelConfig) -> Model:
  """Binds the functions below to a config."""
  bind = lambda f: functools.partial(f, config)
  return Model(config, bind(weights), bind(init), bind(forward), bind(init_cache), bind(unembedding))


def weights(c: ModelConfig) -> dict[str, Any]:
  """The table of weights. Layers are stacked on a leading axis of size L, and scanned."""
  L, D, N, K, H, F, V = c.layers, c.embed, c.heads, c.kv_heads, c.head_dim, c.mlp, c.vocab
  layer = lambda shape, *axes, init: Weight((L, *shape), ("layers", *axes), init)
  into = normal(D**-0.5)  # unit variance in, unit variance out
  # Matrices that write to the residual stream shrink with depth (Radford et al. 2019, section 2.3).
  out = lambda fan_in: normal((2 * L * fan_in) ** -0.5)
  table = {
    "embed": Weight((V, D), ("vocab", "embed"), normal(0.02)),
    "layers": {
      "attention_norm": layer((D,), None, init=ones),
      "q": layer((D, N, H), "embed", "heads", "head_dim", init=into),
      "k": layer((D, K, H), "embed", "kv_heads", "head_dim", init=into),
      "v": layer((D, K, H), "embed", "kv_heads", "head_dim", init=into),
      "o": layer((N, H, D), "heads", "head_dim", "embed", init=out(N * H)),
      "mlp_norm": layer((D,), None, init=ones),
      "gate": layer((D, F), "embed", "mlp", init=into),
      "up": layer((D, F), "embed", "mlp", init=into),
      "down": layer((F, D), "mlp", "embed", init=out(F)),
    },
    "norm": Weight((D,), (None,), ones),
  }
  if not c.tied:
    table["unembed"] = Weight((V, D), ("vocab", "embed"), normal(0.02))
  if c.head == "scalar":
    # One head begins at 0 and says nothing; several begin apart, at rewards of unit variance.
    start = zeros if c.score_heads == 1 else normal(D**-0.5)
    table["score"] = Weight((D, c.score_heads), (None, None), start)
  return table


def init(c: ModelConfig, key: jax.Array) -> Params:
  """Fresh parameters. A weight's key is folded from its path: adding a weight changes no other."""

  def one(path, weight):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    folded = jax.random.fold_in(key, _stable_hash(name))
    return weight.init(folded, weight.shape, jnp.dtype(c.param_dtype))

  return jax.tree_util.tree_map_with_path(one, weights(c), is_leaf=_is_weight)


def unembedding(c: ModelConfig, params: Params) -> jax.Array:
  """The matrix [V, D] that turns hidden states into logits."""
  return params["embed"] if c.tied else params["unembed"]


def forward(
  c: ModelConfig,
  params: Params,
  tokens: jax.Array,
  segment_ids: jax.Array,
  positions: jax.Array,
  cache: dict[str, Any] | None = None,
) -> tuple[jax.Array, dict[str, Any] | None]:
  """Hidden states [B, T, D] after the final norm, for tokens, segment_ids, positions [B, T].

  With a cache the T tokens of every row are written to its columns index .. index + T - 1, attention runs over all
  columns up to a token's own, and the cache is returned with its index moved on. The caller keeps index + T within the
  cache's columns.
  """
  x = params["embed"].astype(c.dtype)[tokens]
  x = sharding.constrain(x, "batch", None, None)
  angles = rotary_angles(positions, c.head_dim, c.rope_theta)
  if cache is None:

    def body(x, layer):
      attend = lambda q, k, v: attention(c.attention, q, k, v, segment_ids, segment_ids)
      return block(c, x, layer, angles, attend), None

    x, _ = jax.lax.scan(_remat(c, body), x, params["layers"])
    return rms_norm(x, params["norm"], c.norm_eps), None

  start = cache["index"]
  write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
  columns = write(cache["segment_ids"], segment_ids)
  layers = []
  # Unrolled, with a cache per layer: a scan would copy every layer's cache in and out at every token.
  for index, (keys, values) in enumerate(cache["layers"]):
    layer = jax.tree.map(lambda stacked: stacked[index], params["layers"])  # noqa: B023

    def attend(q, k, v, keys=keys, values=values):
      layers.append((write(keys, k), write(values, v)))
      return attention(c.attention, q, *layers[-1], segment_ids, columns, start)

    x = block(c, x, layer, angles, attend)
  cache = {"layers": tuple(layers), "segment_ids": columns, "index": start + tokens.shape[1]}
  return rms_norm(x, params["norm"], c.norm_eps), cache


def block(c: ModelConfig, x: jax.Array, p: Params, angles, attend) -> jax.Array:
  """One layer on x [B, T, D], with that layer's weights; attend(q, k, v) sees the past."""
  h = rms_norm(x, p["attention_norm"], c.norm_eps)
  q = rotate(einsum("btd,dnh->btnh", h, p["q"]), angles)
  k = rotate(einsum("btd,dnh->btnh", h, p["k"]), angles)
  v = einsum("btd,dnh->btnh", h, p["v"])
  x = x + einsum("btnh,nhd->btd", attend(q, k, v), p["o"])
  x = sharding.constrain(x, "batch", None, None)
  x = x + swiglu(rms_norm(x, p["mlp_norm"], c.norm_eps), p["gate"], p["up"], p["down"])
  return sharding.constrain(x, "batch", None, None)


def init_cache(c: ModelConfig, rows: int, columns: int) -> dict[str, Any]:
  """An empty cache: per layer keys and values [B, C, K, H]; segment ids 0 mark unwritten columns."""
  empty = lambda: sharding.constrain(
    jnp.zeros((rows, columns, c.kv_heads, c.head_dim), c.dtype), "batch", None, "kv_heads", None
  )
  return {
    "layers": tuple((empty(), empty()) for _ in range(c.layers)),
    "segment_ids": jnp.zeros((rows, columns), jnp.int32),
    "index": jnp.zeros((), jnp.int32),
  }


def _remat(c, body):
  if c.remat == "none":
    return body
  policies = jax.checkpoint_policies
  keep = {"full": policies.nothing_saveable, "dots": policies.dots_with_no_batch_dims_saveable}
  return jax.checkpoint(body, policy=keep[c.remat], prevent_cse=False)


def _is_weight(x):
  return isinstance(x, Weight)


def _stable_hash(name: str) -> int:
  # Python's own hash differs from run to run.
  value = 2166136261
  for byte in name.encode():
    value = (value ^ byte) * 16777619 % 2**32
  return value
