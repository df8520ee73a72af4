"""The decoder: one table of weights, one pure forward function.

Initialisation, the abstract tree, shardings and the parameter count all follow from the table.
`forward` returns hidden states, never logits: see losses/logps.py.
"""

import functools
import math
import operator
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
from alignjax.model.weight import Weight, init_weights, is_weight
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


def _unchanged(params: Params) -> Params:
  """Returns the parameters of a model whose layers are not stacked."""
  return params


class Model(NamedTuple):
  """A causal LM as data and functions. Anything with these names can be trained.

  Attributes:
    config: of the model; `ModelConfig` for the decoder.
    weights: () -> the table, a tree of `Weight`.
    init: key -> fresh parameters.
    forward: (params, tokens, segment_ids, positions, cache=None), int32 [B, T] each -> (hidden states [B, T, D] after
      the final norm, the new cache or None). It takes segment ids as an array or as `form.Segments`;
      `form.as_segments` turns both into the latter.
    init_cache: (rows, columns) -> an empty cache.
    unembedding: params -> the matrix [V, D]; `Capped` if the logits are squashed.
    unstack: params -> the copy that a loop of cached forwards should close over; by default the params themselves.
    trained: the top-level entries of the parameters that are trained; if it is empty, all are.
  """

  config: Any
  weights: Callable[[], Any]  # () -> tree of Weight
  init: Callable[[jax.Array], Params]  # key -> params
  forward: Callable[..., tuple[jax.Array, Any]]  # (params, tokens, segment_ids, positions, cache)
  init_cache: Callable[[int, int], Any]  # (rows, columns) -> cache
  unembedding: Callable[[Params], jax.Array | Capped]  # params -> [V, D]
  unstack: Callable[[Params], Params] = _unchanged  # params -> those that a loop of cached forwards closes over
  trained: tuple[str, ...] = ()

  def split(self, params: Params) -> tuple[Params, Params]:
    """Splits the parameters into the trained entries and the held ones; their union is the whole.

    The held ones are {} if all are trained.
    """
    if not self.trained:
      return params, {}
    trained = {name: tree for name, tree in params.items() if name in self.trained}
    held = {name: tree for name, tree in params.items() if name not in trained}
    return trained, held

  def abstract(self, mesh: jax.sharding.Mesh | None = None) -> Params:
    """Returns the parameters as ShapeDtypeStructs, with shardings if a mesh is given.

    Raises:
      InputError: the mesh does not divide a weight.
    """
    table = self.weights()

    def describe(weight, placement=None):
      dtype = jnp.dtype(weight.dtype or self.config.param_dtype)
      return jax.ShapeDtypeStruct(weight.shape, dtype, sharding=placement)

    if mesh is None:
      return jax.tree.map(describe, table, is_leaf=is_weight)
    return jax.tree.map(describe, table, sharding.weight_shardings(table, mesh), is_leaf=is_weight)

  def frozen(self) -> "Model":
    """Returns this model with its matrices in the dtype that they are computed in, if that is narrower.

    For parameters that no step changes: the same numbers from less memory. A model of `config.module` stays as it is:
    its parameters keep the dtypes that the module gives them.
    """
    if self.config.module:  # its parameters keep the dtypes that the module gives them
      return self
    dtype = self.config.dtype
    if jnp.dtype(dtype).itemsize >= jnp.dtype(self.config.param_dtype).itemsize:
      return self

    def narrow(weight):
      is_matrix = weight.inputs or "vocab" in weight.axes
      if is_matrix and not weight.dtype:
        return weight._replace(dtype=dtype)
      return weight

    return self._replace(weights=lambda: jax.tree.map(narrow, self.weights(), is_leaf=is_weight))

  def num_params(self) -> int:
    """Counts the numbers that the parameters hold, a tied unembedding once."""
    return sum(math.prod(weight.shape) for weight in jax.tree.leaves(self.weights(), is_leaf=is_weight))


@functools.lru_cache(maxsize=64)
def make(config: ModelConfig) -> Model:
  """Binds the functions below to a config; equal configs have one model, whose functions JAX traces once."""
  return Model(
    config,
    weights=functools.partial(weights, config),
    init=functools.partial(init, config),
    forward=functools.partial(forward, config),
    init_cache=functools.partial(init_cache, config),
    unembedding=functools.partial(unembedding, config),
    unstack=functools.partial(unstack, config),
  )


def weights(c: ModelConfig) -> dict[str, Any]:
  """Builds the table of weights. Layers are stacked on a leading axis of size L, and scanned."""
  L, D, N, K, H, F, V = c.layers, c.embed, c.heads, c.kv_heads, c.head_dim, c.mlp, c.vocab

  def layer(shape, *axes, init, inputs=0):
    return Weight((L, *shape), ("layers", *axes), init, inputs)

  def out(fan_in):
    """Matrices that write to the residual stream shrink with depth (Radford et al. 2019, section 2.3)."""
    return normal((2 * L * fan_in) ** -0.5)

  into = normal(D**-0.5)  # unit variance in, unit variance out
  scale = zeros if c.norm_offset else ones  # of a norm
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
    # A single head begins at 0: all rewards are equal. Several begin apart, at rewards of unit variance.
    start = zeros if c.score_heads == 1 else normal(D**-0.5)
    table["score"] = Weight((D, c.score_heads), (None, None), start)
  return table


def init(c: ModelConfig, key: jax.Array) -> Params:
  """Draws fresh parameters; the same key gives the same ones."""
  return init_weights(weights(c), key, c.param_dtype)


def unembedding(c: ModelConfig, params: Params) -> jax.Array | Capped:
  """Returns the matrix [V, D] that turns hidden states into logits; `Capped` if these are squashed."""
  matrix = params["embed"] if c.tied else params["unembed"]
  if c.final_softcap:
    return Capped(matrix, c.final_softcap)
  return matrix


def forward(
  c: ModelConfig,
  params: Params,
  tokens: jax.Array,
  segment_ids: jax.Array,
  positions: jax.Array,
  cache: dict[str, Any] | None = None,
  lora: Params | None = None,
) -> tuple[jax.Array, dict[str, Any] | None]:
  """Computes the hidden states [B, T, D] after the final norm.

  The cache is a ring of C columns. If one is given, the T tokens of every row are written to its columns
  index .. index + T - 1 (modulo C), in the place of the oldest. Attention runs over all columns up to a token's own.

  Args:
    c: the config that `params` and `lora` follow.
    params: of `init`; with a cache also of `unstack`.
    tokens: int32 [B, T].
    segment_ids: int32 [B, T]; without a cache also [B, T, 1 + n] or `Segments` (see `attention`). 0: padding.
    positions: int32 [B, T], each token's place in its own text.
    cache: of `init_cache`; None: the T tokens are all there is.
    lora: low-rank factors a, b of some matrices, under the paths of those: each then acts as w + a b.

  Returns:
    The states, and the cache with its index moved on; None if none was given.
  """
  few = cache is not None and tokens.shape[1] == 1
  x = _embed(c, params["embed"], tokens, few)
  kinds = _kinds(c, positions)
  stacks = (params["layers"], (lora or {}).get("layers", {}))
  if cache is not None:
    x, cache = _cached_layers(c, x, stacks, kinds, segment_ids, cache)
    return _norm(c, x, params["norm"]), cache

  def attend(form, q, k, v):
    return attention(c.attention, form, q, k, v, segment_ids), None

  def body(x, layer):
    slides, weights, factors = layer
    return block(c, x, weights, factors, *_choose(kinds, slides, attend))

  x, _ = jax.lax.scan(_remat(c, body), x, (np.asarray(sliding(c)), *stacks))
  hidden = _norm(c, x, params["norm"])
  return sharding.constrain(hidden, "batch", sharding.dividing(x.shape[1], "tokens"), None), None


def _embed(c, embedding, tokens, few):
  """Returns the tokens' embeddings [B, T, D], laid out as the residual stream."""
  x = embedding.astype(c.dtype)[tokens]
  if not few:
    # An embedding moves to its row first, and then to the devices of its neighbours. Its gradient goes back that way.
    x = sharding.constrain(x, "batch", None, "looked_up")
    x = sharding.constrain(x, "batch", sharding.dividing(x.shape[1], "tokens"), None)
  if c.embed_scale != 1:
    x = x * jnp.asarray(c.embed_scale, x.dtype)
  return sharding.constrain(x, *_stream(x, few))


def _cached_layers(c, x, stacks, kinds, segment_ids, cache):
  """Returns the output of the last layer, x [B, T, D], and the cache with these T tokens."""
  index = cache["index"]
  count = x.shape[1]
  columns = cache["segment_ids"].shape[1]
  write = functools.partial(write_ring, index=index)
  key_segments = write(cache["segment_ids"], segment_ids, axis=1)
  last = (index + count - 1) % columns

  def attend_cached(form, q, keys, values):
    return cached_attention(form, q, keys, values, segment_ids, key_segments, last)

  def body(x, layer):
    slides, weights, factors, (keys, values) = layer
    angles, attend = _choose(kinds, slides, attend_cached)

    def write_and_attend(q, k, v):
      new_keys = write(keys, k.transpose(0, 2, 3, 1), axis=3)
      new_values = write(values, v.transpose(0, 2, 1, 3), axis=2)
      return attend(q, new_keys, new_values), (new_keys, new_values)

    return block(c, x, weights, factors, angles, write_and_attend, few=count == 1)

  if count == 1 or isinstance(stacks[0], tuple):
    # Unrolled, with a cache per layer: a scan would copy every layer's cache in and out at every token.
    layers = []
    for layer in zip(sliding(c), *(_apart(c, stack) for stack in stacks), cache["layers"], strict=True):
      x, written = body(x, layer)
      layers.append(written)
  else:  # many tokens cost far more than those copies; unrolled, 32 layers would take 5 GB of compiler memory
    rings = jax.tree.map(lambda *ring: jnp.stack(ring), *cache["layers"])
    x, written = jax.lax.scan(body, x, (np.asarray(sliding(c)), *stacks, rings))
    layers = zip(*written, strict=True)
  return x, {"layers": tuple(layers), "segment_ids": key_segments, "index": index + count}


def _choose(kinds, slides, attend):
  """Returns the angles of a layer, and attend(form, ...) with the layer's form.

  Args:
    kinds: of `_kinds`.
    slides: whether the layer slides: a bool, or traced in a scan. One program then holds both kinds.
    attend: (form, q, keys, values) -> what the layer sees.
  """
  if len(kinds) == 1:
    slides = next(iter(kinds))
  if isinstance(slides, bool):
    kind = kinds[slides]
    return kind.angles, functools.partial(attend, kind.form)
  full, local = kinds[False], kinds[True]
  angles = jax.tree.map(functools.partial(jnp.where, slides), local.angles, full.angles)
  attend_local = functools.partial(attend, local.form)
  attend_full = functools.partial(attend, full.form)
  return angles, functools.partial(jax.lax.cond, slides, attend_local, attend_full)


class _Kind(NamedTuple):
  """The form and the rotary angles of all full layers, or of all sliding ones."""

  form: Form
  angles: tuple[jax.Array, jax.Array]


def _kinds(c, positions):
  """{whether they slide: kind} of the model's layers."""
  form = Form(c.attention_scale or c.head_dim**-0.5, c.attention_softcap)
  stretch = (c.rope_scaling, c.rope_factor, c.rope_low_factor, c.rope_high_factor, c.rope_original)
  full = rotary_angles(positions, stretched(rotary_frequencies(c.head_dim, c.rope_theta), *stretch))
  local = full
  if c.rope_sliding_theta:
    local = rotary_angles(positions, rotary_frequencies(c.head_dim, c.rope_sliding_theta))
  kinds = {False: _Kind(form, full), True: _Kind(form._replace(window=c.window), local)}
  return {slides: kinds[slides] for slides in sorted({*sliding(c)})}


def _norm(c, x, scale):
  if c.norm_offset:  # in float32: added to an offset of 1, a bfloat16 scale would lose most of its bits
    scale = c.norm_offset + scale.astype(jnp.promote_types(scale.dtype, jnp.float32))
  return rms_norm(x, scale, c.norm_eps)


def write_ring(ring: jax.Array, new: jax.Array, index: jax.Array, axis: int) -> jax.Array:
  """Returns the ring with `new` in place of its entries index, index + 1, .. along an axis, modulo its size.

  Args:
    ring: at least as long as `new` along the axis.
    new: the entries to write; other dimensions as those of the ring.
    index: any integer.
    axis: along which entries are written.
  """
  size = ring.shape[axis]
  count = new.shape[axis]
  if count == 1:  # in place, if the caller's program allows it
    return jax.lax.dynamic_update_slice_in_dim(ring, new, index % size, axis)
  widths = [(0, 0)] * ring.ndim
  widths[axis] = (0, size - count)
  other_axes = [other for other in range(ring.ndim) if other != axis]
  places = jnp.expand_dims((jnp.arange(size) - index) % size, other_axes)
  return jnp.where(places < count, jnp.roll(jnp.pad(new, widths), index, axis), ring)


def block(
  c: ModelConfig, x: jax.Array, weights: Params, factors: Params, angles, attend, few: bool = False
) -> tuple[jax.Array, Any]:
  """Applies one layer to x [B, T, D].

  If there are many tokens, the weights come to them: each matrix is gathered, and every device takes its own rows. But
  `few` tokens, a column of a decoding loop, go to the weights. These stay in place, and every shard of them works on
  all rows.

  Args:
    c: the config.
    x: the residual stream.
    weights: of that layer alone, without the dimension of the layers.
    factors: low-rank factors of some of its matrices, by name; {} for none.
    angles: of `rotary_angles`.
    attend: (q, k, v) -> (what the tokens see of the past [B, T, N, H], what it keeps: the written cache, or None).
    few: True for a column of a decoding loop.

  Returns:
    The layer's output [B, T, D], and what `attend` keeps.
  """
  axes = _stream(x, few)
  rows = axes[0]
  tokens = sharding.dividing(x.shape[1], "tokens")

  def stream(x):
    return sharding.constrain(x, *axes)

  def linear(name, equation, x):
    gathered = () if few else AXES[name]
    return project(equation, x, weights[name], factors.get(name), weights.get(f"{name}_bias"), gathered)

  def norm(name, x):
    """Applies a norm that every layer of a family has; returns x as it is if there is none."""
    if name not in weights:
      return x
    return _norm(c, x, weights[name])

  def heads(name, axis, x):
    return sharding.constrain(linear(name, "btd,dnh->btnh", x), "batch", tokens, axis, None)

  h = norm("attention_norm", stream(x))
  q = rotate(norm("q_norm", heads("q", "heads", h)), angles)
  k = rotate(norm("k_norm", heads("k", "kv_heads", h)), angles)
  seen, kept = attend(q, k, heads("v", "kv_heads", h))
  seen = sharding.constrain(seen, rows, tokens, "heads", None)
  # einsum contracts in the order of the alphabet: with n for the heads, it would transpose the weight.
  x = stream(x + norm("attention_post_norm", linear("o", "btgh,ghd->btd", seen)))
  h = norm("mlp_norm", x)
  h = gated(c.activation, linear("gate", "btd,df->btf", h), linear("up", "btd,df->btf", h))
  h = sharding.constrain(h, rows, tokens, "mlp")
  return stream(x + norm("mlp_post_norm", linear("down", "btf,fd->btd", h))), kept


def _stream(x, few):
  """Returns the logical axes of the residual stream x [B, T, D]: what lies between the layers lies once on the mesh.

  Source: Korthikanti et al. 2022, section 4.2.2 (arXiv:2205.05198)
  """
  if few:
    return "replica", None, "embed"
  return "batch", sharding.dividing(x.shape[1], "stream", "tokens"), None


def unstack(c: ModelConfig, params: Params) -> Params:
  """Copies the parameters with their layers apart, and with matrices no wider than they are computed in.

  For loops of cached forwards. With the stack itself, every turn would cut out each layer's weights and read all of
  their bits. Low-rank factors keep their dtype: they are scaled before they are rounded.
  """
  width = jnp.dtype(c.dtype).itemsize

  def narrow(w):
    is_matrix = not _is_codes(w) and w.ndim > 1
    if is_matrix and w.dtype.itemsize > width:
      return w.astype(c.dtype)
    return w

  copy = {}
  if "lora" in params:
    copy["lora"] = {part: _apart(c, factors) for part, factors in params["lora"].items()}
  for name, tree in params.items():
    if name == "layers":
      tree = _apart(c, tree)
    if name != "lora":
      copy[name] = jax.tree.map(narrow, tree, is_leaf=_is_codes)
  return copy


def _is_codes(w):
  """Returns True if a weight is a quantised matrix (model/quantised.py)."""
  return hasattr(w, "qvalue")


def _apart(c, stack):
  """Returns the layers of a stack, a tuple of L trees; a stack that is apart already stays as it is."""
  if isinstance(stack, tuple):
    return stack
  return tuple(jax.tree.map(operator.itemgetter(layer), stack) for layer in range(c.layers))


def init_cache(c: ModelConfig, rows: int, columns: int) -> dict[str, Any]:
  """Makes an empty cache of C = `columns`: per layer keys [B, K, H, C] and values [B, K, C, H].

  Segment ids 0 mark unwritten columns.
  """
  heads = sharding.dividing(c.kv_heads, "attended", "kv_heads")

  def empty(*shape):
    return sharding.constrain(jnp.zeros((rows, c.kv_heads, *shape), c.dtype), "batch", heads, None, None)

  return {
    "layers": tuple((empty(c.head_dim, columns), empty(columns, c.head_dim)) for _ in range(c.layers)),
    "segment_ids": jnp.zeros((rows, columns), jnp.int32),
    "index": jnp.zeros((), jnp.int32),
  }


def _remat(c, body):
  """Returns the body of the scan over layers, with the recomputation that `ModelConfig.remat` names."""
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

  def named(x, layer):
    return body(checkpoint_name(x, "layer_input"), layer)

  return jax.checkpoint(named, policy=keep[c.remat], prevent_cse=False)
