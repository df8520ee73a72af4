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
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import normal, ones, zeros

from alignjax.losses.chunks import Capped
from alignjax.model.attention.attention import attention, cached_attention
from alignjax.model.attention.form import Form
from alignjax.model.config import ModelConfig, biased, sliding
from alignjax.model.layers import (
  PRODUCT,
  gated,
  project,
  rms_norm,
  rotary_angles,
  rotary_frequencies,
  rotate,
  stretched,
)
from alignjax.system import sharding
from alignjax.types import Params

# The logical axes of a layer's matrices.
AXES = {
  "q": ("embed", "heads", "head_dim"),
  "k": ("embed", "kv_heads", "head_dim"),
  "v": ("embed", "kv_heads", "head_dim"),
  "o": ("heads", "head_dim", "embed"),
  "gate": ("embed", "mlp"),
  "up": ("embed", "mlp"),
  "down": ("mlp", "embed"),
}


class Weight(NamedTuple):
  """One parameter.

  Attributes:
    shape: of the array; layers are stacked on its first dimension.
    axes: the logical axis of each dimension (`sharding.RULES`).
    init: its initialiser.
    inputs: how many dimensions of a matrix (after that of the layers) meet the input; 0: it is no matrix.
    dtype: of the stored array; "": the model's param_dtype.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Callable[..., jax.Array]
  inputs: int = 0
  dtype: str = ""


class Model(NamedTuple):
  """A causal LM as data and functions. Anything with these names can be trained.

  `forward` is given segment ids as they are, or with what is known of them (`form.as_segments` makes both the latter).
  `trained` names the entries of the parameters that are: all of them if empty.
  """

  config: Any
  weights: Callable[[], Any]  # () -> tree of Weight
  init: Callable[[jax.Array], Params]  # key -> params
  forward: Callable[..., tuple[jax.Array, Any]]  # (params, tokens, segment_ids, positions, cache)
  init_cache: Callable[[int, int], Any]  # (rows, columns) -> cache
  unembedding: Callable[[Params], jax.Array | Capped]  # params -> [V, D]
  unstack: Callable[[Params], Params] = lambda params: (
    params
  )  # params -> what a loop of cached forwards should close over
  trained: tuple[str, ...] = ()

  def split(self, params: Params) -> tuple[Params, Params]:
    """What is trained, and what is held ({} if all is trained); their union is the whole."""
    if not self.trained:
      return params, {}
    own = {name: tree for name, tree in params.items() if name in self.trained}
    return own, {name: tree for name, tree in params.items() if name not in own}

  def abstract(self, mesh: jax.sharding.Mesh | None = None) -> Params:
    """The tree of ShapeDtypeStructs, with shardings where a mesh is given."""
    table = self.weights()
    dtype = lambda w: jnp.dtype(w.dtype or self.config.param_dtype)
    if mesh is None:
      return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, dtype(w)), table, is_leaf=is_weight)
    return jax.tree.map(
      lambda w, s: jax.ShapeDtypeStruct(w.shape, dtype(w), sharding=s),
      table,
      sharding.weight_shardings(table, mesh),
      is_leaf=is_weight,
    )

  def frozen(self) -> "Model":
    """This model with its matrices in the dtype that they are computed in, where that is narrower.

    For parameters that no step changes: the same numbers from less memory.
    """
    if self.config.module:  # how that computes is its own affair
      return self
    size = lambda dtype: jnp.dtype(dtype).itemsize
    narrower = size(self.config.dtype) < size(self.config.param_dtype)
    is_matrix = lambda w: (w.inputs or "vocab" in w.axes) and not w.dtype
    one = lambda w: w._replace(dtype=self.config.dtype) if narrower and is_matrix(w) else w
    return self._replace(weights=lambda: jax.tree.map(one, self.weights(), is_leaf=is_weight))

  def num_params(self) -> int:
    """How many numbers the parameters hold."""
    return sum(math.prod(w.shape) for w in jax.tree.leaves(self.weights(), is_leaf=is_weight))


def make(config: ModelConfig) -> Model:
  """Binds the functions below to a config."""
  bind = lambda f: functools.partial(f, config)
  return Model(config, bind(weights), bind(init), bind(forward), bind(init_cache), bind(unembedding), bind(unstack))


def weights(c: ModelConfig) -> dict[str, Any]:
  """The table of weights. Layers are stacked on a leading axis of size L, and scanned."""
  L, D, N, K, H, F, V = c.layers, c.embed, c.heads, c.kv_heads, c.head_dim, c.mlp, c.vocab
  layer = lambda shape, *axes, init, inputs=0: Weight((L, *shape), ("layers", *axes), init, inputs)
  scale = zeros if c.norm_offset else ones  # of a norm
  into = normal(D**-0.5)  # unit variance in, unit variance out
  # Matrices that write to the residual stream shrink with depth (Radford et al. 2019, section 2.3).
  out = lambda fan_in: normal((2 * L * fan_in) ** -0.5)
  layers = {
    "attention_norm": layer((D,), None, init=scale),
    "q": layer((D, N, H), *AXES["q"], init=into, inputs=1),
    "k": layer((D, K, H), *AXES["k"], init=into, inputs=1),
    "v": layer((D, K, H), *AXES["v"], init=into, inputs=1),
    "o": layer((N, H, D), *AXES["o"], init=out(N * H), inputs=2),
    "mlp_norm": layer((D,), None, init=scale),
    "gate": layer((D, F), *AXES["gate"], init=into, inputs=1),
    "up": layer((D, F), *AXES["up"], init=into, inputs=1),
    "down": layer((F, D), *AXES["down"], init=out(F), inputs=1),
  }
  for name in biased(c):
    matrix = layers[name]
    outputs = slice(1 + matrix.inputs, None)
    layers[f"{name}_bias"] = layer(matrix.shape[outputs], *matrix.axes[outputs], init=zeros)
  if c.query_key_norm:
    layers |= {f"{name}_norm": layer((H,), None, init=scale) for name in "qk"}
  if c.post_norms:
    layers |= {f"{name}_post_norm": layer((D,), None, init=scale) for name in ("attention", "mlp")}
  table = {
    "embed": Weight((V, D), ("vocab", "embed"), normal(0.02)),
    "layers": layers,
    "norm": Weight((D,), (None,), scale),
  }
  if not c.tied:
    table["unembed"] = Weight((V, D), ("vocab", "embed"), normal(0.02))
  if c.head == "scalar":
    # One head begins at 0 and says nothing; several begin apart, at rewards of unit variance.
    start = zeros if c.score_heads == 1 else normal(D**-0.5)
    table["score"] = Weight((D, c.score_heads), (None, None), start)
  return table


def init(c: ModelConfig, key: jax.Array) -> Params:
  """Fresh parameters."""
  return init_weights(weights(c), key, c.param_dtype)


def init_weights(table: Any, key: jax.Array, dtype: str) -> Params:
  """Fresh weights of a table. A weight's key is folded from its path: adding a weight changes no other."""

  def one(path, weight):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    folded = jax.random.fold_in(key, _stable_hash(name))
    return weight.init(folded, weight.shape, jnp.dtype(weight.dtype or dtype))

  return jax.tree_util.tree_map_with_path(one, table, is_leaf=is_weight)


def unembedding(c: ModelConfig, params: Params) -> jax.Array | Capped:
  """The matrix [V, D] that turns hidden states into logits; `Capped` where these are squashed."""
  matrix = params["embed"] if c.tied else params["unembed"]
  return Capped(matrix, c.final_softcap) if c.final_softcap else matrix


def forward(
  c: ModelConfig,
  params: Params,
  tokens: jax.Array,
  segment_ids: jax.Array,
  positions: jax.Array,
  cache: dict[str, Any] | None = None,
  lora: Params | None = None,
) -> tuple[jax.Array, dict[str, Any] | None]:
  """Hidden states [B, T, D] after the final norm, for tokens, segment_ids, positions [B, T].

  With a cache, a ring of C columns, the T tokens of every row are written to its columns index .. index + T - 1 (modulo
  C), in the place of the oldest; attention runs over all columns up to a token's own, and the cache is returned with
  its index moved on.

  `lora` holds low-rank factors a, b of some matrices, under the paths of those: each then acts as w + a b.
  """
  few = cache is not None and tokens.shape[1] == 1
  x = params["embed"].astype(c.dtype)[tokens]
  if not few:  # to its row, and only then among those that hold its neighbours: one step at a time, back as well
    x = sharding.constrain(x, "batch", None, "looked_up")
    x = sharding.constrain(x, "batch", sharding.dividing(x.shape[1], "tokens"), None)
  x = x if c.embed_scale == 1 else x * jnp.asarray(c.embed_scale, x.dtype)
  x = sharding.constrain(x, *_stream(x, few))
  kinds = _kinds(c, positions)
  stacks = params["layers"], (lora or {}).get("layers", {})
  if cache is None:

    def body(x, layer):
      slides, *layer = layer
      see = lambda form: lambda q, k, v: attention(c.attention, form, q, k, v, segment_ids)
      return block(c, x, *layer, *_choose(kinds, slides, see)), None

    x, _ = jax.lax.scan(_remat(c, body), x, (np.asarray(sliding(c)), *stacks))
    return sharding.constrain(_norm(c, x, params["norm"]), "batch", sharding.dividing(x.shape[1], "tokens"), None), None

  index, columns = cache["index"], cache["segment_ids"].shape[1]
  write = functools.partial(write_ring, index=index)
  key_segments = write(cache["segment_ids"], segment_ids, axis=1)
  last = (index + tokens.shape[1] - 1) % columns

  def body(x, layer):
    slides, weights, factors, (keys, values) = layer
    see = lambda form: lambda *qkv: cached_attention(form, *qkv, segment_ids, key_segments, last)
    angles, attend = _choose(kinds, slides, see)
    written = []

    def write_and_attend(q, k, v):
      written.append((write(keys, k.transpose(0, 2, 3, 1), axis=3), write(values, v.transpose(0, 2, 1, 3), axis=2)))
      return attend(q, *written[0])

    return block(c, x, weights, factors, angles, write_and_attend, few), written[0]

  layers = []
  if few or isinstance(params["layers"], tuple):
    # Unrolled, with a cache per layer: a scan would copy every layer's cache in and out at every token.
    for layer in zip(sliding(c), *(_apart(c, stack) for stack in stacks), cache["layers"], strict=True):
      x, written = body(x, layer)
      layers.append(written)
  else:  # beside many tokens those copies are nothing, and a program of 32 layers takes 5 GB of its compiler
    rings = jax.tree.map(lambda *ring: jnp.stack(ring), *cache["layers"])
    x, written = jax.lax.scan(body, x, (np.asarray(sliding(c)), *stacks, rings))
    layers = zip(*written, strict=True)
  cache = {"layers": tuple(layers), "segment_ids": key_segments, "index": index + tokens.shape[1]}
  return _norm(c, x, params["norm"]), cache


def _choose(kinds, slides, see):
  """The angles of a layer and see(form) for it; one program for both kinds where a scan does not know which it is."""
  known = next(iter(kinds)) if len(kinds) == 1 else slides
  if isinstance(known, bool):
    return kinds[known].angles, see(kinds[known].form)
  angles = jax.tree.map(functools.partial(jnp.where, slides), kinds[True].angles, kinds[False].angles)
  return angles, lambda *args: jax.lax.cond(slides, see(kinds[True].form), see(kinds[False].form), *args)


class _Kind(NamedTuple):
  """What full layers have in common, or sliding ones."""

  form: Form
  angles: tuple[jax.Array, jax.Array]


def _kinds(c, positions):
  """{whether they slide: kind} of the model's layers."""
  form = Form(c.attention_scale or c.head_dim**-0.5, c.attention_softcap)
  stretch = c.rope_scaling, c.rope_factor, c.rope_low_factor, c.rope_high_factor, c.rope_original
  full = rotary_angles(positions, stretched(rotary_frequencies(c.head_dim, c.rope_theta), *stretch))
  local = full
  if c.rope_sliding_theta:
    local = rotary_angles(positions, rotary_frequencies(c.head_dim, c.rope_sliding_theta))
  kinds = {False: _Kind(form, full), True: _Kind(form._replace(window=c.window), local)}
  return {slides: kinds[slides] for slides in sorted({*sliding(c)})}


def _norm(c, x, scale):
  if c.norm_offset:  # in float32: beside 1, bfloat16 would lose most of it
    scale = c.norm_offset + scale.astype(jnp.promote_types(scale.dtype, jnp.float32))
  return rms_norm(x, scale, c.norm_eps)


def write_ring(ring: jax.Array, new: jax.Array, index: jax.Array, axis: int) -> jax.Array:
  """The ring with `new` in place of its entries index, index + 1, .. along an axis, modulo its size."""
  size, count = ring.shape[axis], new.shape[axis]
  if count == 1:  # in place, where the caller's program allows it
    return jax.lax.dynamic_update_slice_in_dim(ring, new, index % size, axis)
  widths = [(0, size - count if at == axis else 0) for at in range(ring.ndim)]
  places = jnp.expand_dims((jnp.arange(size) - index) % size, [at for at in range(ring.ndim) if at != axis])
  return jnp.where(places < count, jnp.roll(jnp.pad(new, widths), index, axis), ring)


def block(
  c: ModelConfig, x: jax.Array, weights: Params, factors: Params, angles, attend, few: bool = False
) -> jax.Array:
  """One layer on x [B, T, D], with that layer's weights and factors; attend(q, k, v) sees the past.

  The weights come to many tokens: each matrix is gathered, and every device takes its own rows. But `few` tokens, a
  column of a decoding loop, go to the weights: these stay where they are, and every shard of them works on all rows.
  """
  rows, *_ = axes = _stream(x, few)
  tokens = sharding.dividing(x.shape[1], "tokens")
  stream = lambda x: sharding.constrain(x, *axes)

  def linear(name, equation, x):
    gathered = () if few else AXES[name]
    return project(equation, x, weights[name], factors.get(name), weights.get(f"{name}_bias"), gathered)

  def norm(name, x):
    """Of those that every layer of a family has, or none."""
    return _norm(c, x, weights[name]) if name in weights else x

  def heads(name, axis):
    return sharding.constrain(linear(name, "btd,dnh->btnh", h), "batch", tokens, axis, None)

  h = norm("attention_norm", stream(x))
  q = rotate(norm("q_norm", heads("q", "heads")), angles)
  k = rotate(norm("k_norm", heads("k", "kv_heads")), angles)
  seen = sharding.constrain(attend(q, k, heads("v", "kv_heads")), rows, tokens, "heads", None)
  # einsum contracts in the order of the alphabet: with n for the heads, it would transpose the weight.
  x = stream(x + norm("attention_post_norm", linear("o", "btgh,ghd->btd", seen)))
  h = norm("mlp_norm", x)
  h = gated(c.activation, linear("gate", "btd,df->btf", h), linear("up", "btd,df->btf", h))
  h = sharding.constrain(h, rows, tokens, "mlp")
  return stream(x + norm("mlp_post_norm", linear("down", "btf,fd->btd", h)))


def _stream(x, few):
  """The logical axes of the residual stream x [B, T, D]: what lies between the layers lies once on the mesh.

  Source: Korthikanti et al. 2022, section 4.2.2 (arXiv:2205.05198)
  """
  return ("replica", None, "embed") if few else ("batch", sharding.dividing(x.shape[1], "stream", "tokens"), None)


def unstack(c: ModelConfig, params: Params) -> Params:
  """The parameters with those of every layer by themselves and no wider than they are computed in: a copy.

  A loop of cached forwards should close over these. It would cut the layers' weights out of their stack, and read all
  of their bits, at every turn. Low-rank factors keep theirs: they are scaled before they are rounded.
  """
  is_codes = lambda w: hasattr(w, "qvalue")
  is_wide = lambda w: not is_codes(w) and w.ndim > 1 and w.dtype.itemsize > jnp.dtype(c.dtype).itemsize  # no norm
  narrow = lambda tree: jax.tree.map(lambda w: w.astype(c.dtype) if is_wide(w) else w, tree, is_leaf=is_codes)
  own = lambda name, tree: tuple(map(narrow, _apart(c, tree))) if name == "layers" else narrow(tree)
  factors = {name: {part: _apart(c, tree) for part, tree in params[name].items()} for name in params if name == "lora"}
  return {name: own(name, tree) for name, tree in params.items()} | factors


def _apart(c, stack):
  if isinstance(stack, tuple):
    return stack
  return tuple(jax.tree.map(lambda x: x[layer], stack) for layer in range(c.layers))  # noqa: B023


def init_cache(c: ModelConfig, rows: int, columns: int) -> dict[str, Any]:
  """An empty cache: per layer keys [B, K, H, C] and values [B, K, C, H]; segment ids 0 mark unwritten columns."""
  B, C, K, H = rows, columns, c.kv_heads, c.head_dim
  heads = sharding.dividing(K, "attended", "kv_heads")
  empty = lambda *shape: sharding.constrain(jnp.zeros(shape, c.dtype), "batch", heads, None, None)
  return {
    "layers": tuple((empty(B, K, H, C), empty(B, K, C, H)) for _ in range(c.layers)),
    "segment_ids": jnp.zeros((B, C), jnp.int32),
    "index": jnp.zeros((), jnp.int32),
  }


def _remat(c, body):
  if c.remat == "none":
    return body
  policies = jax.checkpoint_policies
  keep = {
    "full": policies.nothing_saveable,
    "dots": policies.save_only_these_names(PRODUCT),
    "offload": policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=["layer_input"],
      offload_src="device",
      offload_dst="pinned_host",
    ),
  }
  named = lambda x, layer: body(checkpoint_name(x, "layer_input"), layer)
  return jax.checkpoint(named, policy=keep[c.remat], prevent_cse=False)


def is_weight(x: Any) -> bool:
  """Whether a node of a table is one of its leaves."""
  return isinstance(x, Weight)


def _stable_hash(name: str) -> int:
  # Python's own hash differs from run to run.
  value = 2166136261
  for byte in name.encode():
    value = (value ^ byte) * 16777619 % 2**32
  return value
