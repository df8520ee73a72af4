"""Low-rank adapters: every targeted matrix w acts as w + scale * a b, and only a and b are trained.

The factors are one more argument of the model's `forward`. The base is held: it is neither copied nor changed. The
reference is the same arrays without the factors.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros

from alignjax.errors import InputError
from alignjax.model import quantised
from alignjax.model.decoder import Model, Weight, init_weights, is_weight
from alignjax.system import ranges
from alignjax.system.ranges import Positive, Seed, Whole
from alignjax.types import Params

TRAINED = ("lora", "score")  # a head is small, and new in most runs: it is trained whole


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """The matrices that get factors, and the factors' size, scale and start."""

  rank: Whole = 0  # R; 0: no factors, all weights are trained
  alpha: Positive = 16.0  # strength of the update
  scaling: str = "standard"  # the update's factor: "standard" alpha / R, "rslora" alpha / sqrt(R)
  targets: str = "layers/(q|k|v|o|gate|up|down)"  # regular expression that fits the whole path of a matrix
  seed: Seed = 0  # of the factors; run.seed also orders the data
  init: str = ""  # folder of a PEFT adapter to start from (adapter_model.safetensors); "": fresh
  base: str = ""  # how the layers' matrices are held: "float32", "bfloat16", "int8", "nf4"; "": in model.param_dtype

  def __post_init__(self):
    ranges.check_record("lora", self)
    if self.scaling not in ("standard", "rslora"):
      raise InputError(f"lora.scaling={self.scaling!r}: use one of standard, rslora")
    if self.init and not self.rank:
      raise InputError(f"lora.init={self.init}: there are no factors to start; set lora.rank to the adapter's")
    if self.base not in quantised.FORMS:
      raise InputError(f"lora.base={self.base!r}: use one of {', '.join(quantised.FORMS[1:])}")
    if self.base and not self.rank:
      raise InputError(f"lora.base={self.base!r}: all weights are trained and none held; set lora.rank")
    try:
      re.compile(self.targets)
    except re.error as error:
      raise InputError(f"lora.targets={self.targets!r}: no regular expression ({error})") from error

  @property
  def scale(self) -> float:
    """The factor by which a b is multiplied before it is added to w: alpha / R, or alpha / sqrt(R) with rslora.

    Source: Hu et al. 2021, section 4.1 (arXiv:2106.09685); rslora: Kalajdzievski 2023, theorem 3.2 (arXiv:2312.03732)
    """
    if self.scaling == "rslora":
      return self.alpha / math.sqrt(self.rank)
    return self.alpha / self.rank


@functools.lru_cache(maxsize=16)
def adapt(model: Model, config: LoraConfig) -> Model:
  """Returns `model` with factors, an additional entry "lora" of its parameters; only that and a head are trained.

  `forward` takes parameters without that entry too: they are the base, whose matrices are in the form `config.base`.

  Args:
    model: its `forward` takes the argument `lora`, as the decoder's does.
    config: with rank above 0.

  Raises:
    InputError: `config.targets` fits the path of no matrix of the model, the model is one of model.module, or a package
      for the base is not installed.
  """
  table = weights(model, config)
  base_table = quantised.weights(_trained_head(model), config.base)

  def fresh(key):
    base = quantised.hold(model.init(key), model.weights(), config.base)
    return base | {"lora": init(table, key, config.seed)}

  def forward(params, *args, **kwargs):
    base = {name: tree for name, tree in params.items() if name != "lora"}
    factors = None
    if params.get("lora"):
      factors = scaled(params["lora"], config.scale)
    return model.forward(base, *args, lora=factors, **kwargs)

  return model._replace(weights=lambda: base_table | {"lora": table}, init=fresh, forward=forward, trained=TRAINED)


def weights(model: Model, config: LoraConfig) -> dict[str, Any]:
  """Builds the table of factors: a [L, inputs.., R] and b [L, R, outputs..] under the path of each targeted matrix.

  They are float32 or wider, whatever the base is. a is drawn as in PEFT, uniform within 1 / sqrt(fan_in) (Kaiming
  with slope sqrt(5)). b is 0, so that a fresh adapter changes nothing.

  Raises:
    InputError: `config.targets` fits the path of no matrix of the model, or the model is one of model.module.
  """
  matrices = {path: weight for path, weight in _flatten(model.weights()) if weight.inputs}
  if not matrices:
    raise InputError(f"lora.rank={config.rank}: a model of model.module takes no factors; use 0")
  targets = {path: weight for path, weight in matrices.items() if re.fullmatch(config.targets, "/".join(path))}
  if not targets:
    known = ", ".join("/".join(path) for path in matrices)
    raise InputError(f"lora.targets={config.targets!r} fits no matrix of the model; they are {known}")
  dtype = str(jnp.promote_types(model.config.param_dtype, jnp.float32))
  table: dict[str, Any] = {}
  for path, weight in targets.items():
    node = table
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = _factors(weight, config.rank, dtype)
  return table


def _factors(weight: Weight, rank: int, dtype: str) -> dict[str, Weight]:
  """Returns the factors a and b of a matrix."""
  first_output = int(weight.axes[0] == "layers") + weight.inputs
  # The layers and the inputs keep their place in a; in b, the outputs keep theirs behind the layers.
  a_shape = (*weight.shape[:first_output], rank)
  a_axes = (*weight.axes[:first_output], "rank")
  first_input = first_output - weight.inputs
  b_shape = (*weight.shape[:first_input], rank, *weight.shape[first_output:])
  b_axes = (*weight.axes[:first_input], "rank", *weight.axes[first_output:])
  bound = math.prod(weight.shape[first_input:first_output]) ** -0.5
  uniform = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
  return {
    "a": Weight(a_shape, a_axes, uniform, weight.inputs, dtype),
    "b": Weight(b_shape, b_axes, zeros, 1, dtype),
  }


def init(table: dict[str, Any], key: jax.Array, seed: jax.Array | int) -> Params:
  """Draws fresh factors of a table.

  Args:
    table: of `weights`.
    key: of the run.
    seed: folded into the key; it may be traced.
  """
  return init_weights(table, jax.random.fold_in(key, seed), "float32")


def scaled(factors: Params, scale: float) -> Params:
  """Multiplies each b of the factors by `scale`: the form in which the base's `forward` takes them."""
  return map_targets(lambda pair: {"a": pair["a"], "b": pair["b"] * scale}, factors)


def merge(params: Params, config: LoraConfig) -> Params:
  """Merges the factors into the base, w + scale * a b: the same model without factors, up to rounding to w's dtype.

  Args:
    params: with the entry "lora"; the base must be in arrays (`quantised.release`).
    config: its rank and scale are read.
  """
  base = {name: tree for name, tree in params.items() if name != "lora"}

  def add(w, pair):
    stack = w.shape[: pair["a"].ndim + pair["b"].ndim - 2 - w.ndim]
    a = pair["a"].reshape(*stack, -1, config.rank)
    b = pair["b"].reshape(*stack, config.rank, -1)
    update = jnp.einsum("...ir,...ro->...io", a, b, precision="highest") * config.scale
    return (w + update.reshape(w.shape)).astype(w.dtype)

  def walk(tree, factors):
    if set(factors) == {"a", "b"}:
      return add(tree, factors)
    return tree | {name: walk(tree[name], factors[name]) for name in factors}

  return walk(base, params["lora"])


def map_targets(f, factors: Params) -> Params:
  """Applies f to the pair {"a": .., "b": ..} of every targeted matrix; returns the tree of the results.

  Args:
    f: a pair -> anything.
    factors: the entry "lora" of the parameters.
  """
  return jax.tree.map(f, factors, is_leaf=lambda node: isinstance(node, dict) and set(node) == {"a", "b"})


def _flatten(table: dict[str, Any]) -> list[tuple[tuple[str, ...], Weight]]:
  leaves = jax.tree_util.tree_leaves_with_path(table, is_leaf=is_weight)
  return [(tuple(key.key for key in path), weight) for path, weight in leaves]


def _trained_head(model: Model) -> dict[str, Any]:
  """Returns the model's table, with a head in the factors' dtype: trained weights are not stored in bfloat16."""
  table = dict(model.weights())
  if "score" in table:
    dtype = str(jnp.promote_types(model.config.param_dtype, jnp.float32))
    table["score"] = table["score"]._replace(dtype=dtype)
  return table
