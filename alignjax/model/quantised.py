"""The matrices of a held base in fewer bits: codes and scales, which layers.py makes dense one layer at a time.

The quantisation is qwix's. Its arrays are pytrees of codes and scales: they are scanned, sharded and passed to a step
as any other parameter.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros

from alignjax.errors import InputError
from alignjax.model.decoder import Weight, is_weight
from alignjax.model.layers import dense
from alignjax.types import Params

DTYPES = ("float32", "bfloat16")
CODES = ("int8", "nf4")
FORMS = ("", *DTYPES, *CODES)  # "": the model's param_dtype
TILE = 64  # inputs that share a scale of nf4, as in QLoRA


def weights(table: Any, form: str) -> Any:
  """Returns the table with its matrices in `form`; a quantised matrix has a Weight for its codes and for its scales.

  A scale is sharded as its matrix, but a dimension of size 1 is replicated.

  Args:
    table: of a model.
    form: one of `FORMS`; "" leaves the table as it is.

  Raises:
    InputError: qwix is needed and not installed.
  """

  def held(weight):
    if not weight.inputs or not form:
      return weight
    if form in DTYPES:
      return weight._replace(dtype=form)

    def part(x):
      axes = tuple(axis if size > 1 else None for axis, size in zip(weight.axes, x.shape, strict=True))
      return Weight(x.shape, axes, zeros, dtype=str(x.dtype))  # zeros: never drawn, `hold` makes it from the matrix

    matrix = jax.ShapeDtypeStruct(weight.shape, jnp.float32)
    return jax.tree.map(part, jax.eval_shape(functools.partial(_quantise, weight=weight, form=form), matrix))

  return jax.tree.map(held, table, is_leaf=is_weight)


def hold(params: Params, table: Any, form: str) -> Params:
  """Returns the parameters with their matrices in `form`, as `weights(table, form)` describes them.

  Args:
    params: arrays, of `table`.
    table: says which parameters are matrices; the others are not changed.
    form: one of `FORMS`; "" leaves the parameters as they are.

  Raises:
    InputError: qwix is needed and not installed.
  """
  if not form:
    return params

  def held(weight, w):
    if not weight.inputs:
      return w
    if form in DTYPES:
      return w.astype(form)
    return _quantise(w, weight, form)

  return jax.tree.map(held, table, params, is_leaf=is_weight)


def release(params: Params, dtype: str) -> Params:
  """Returns all parameters as arrays of `dtype`: the held ones as they were, up to the rounding of `hold`."""
  return jax.tree.map(lambda w: dense(w, dtype), params, is_leaf=lambda node: hasattr(node, "qvalue"))


def _quantise(w: jax.Array, weight: Weight, form: str) -> Any:
  """w as codes and float32 scales, so that w is about scale * value(code).

  int8 has a scale per layer and output. nf4 has 16 values, at quantiles of a normal distribution, and a scale for every
  64 inputs (or the largest number below that divides the last input dimension).

  Source: Dettmers et al. 2023, section 3 (arXiv:2305.14314)
  """
  try:
    import qwix  # optional, and slow to import
  except ImportError as error:
    raise InputError(f"lora.base={form!r} needs qwix, which is not installed; pip install qwix") from error
  first = int(weight.axes[0] == "layers")
  inputs = range(first, first + weight.inputs)
  tiles = {}
  if form == "nf4":
    size = weight.shape[inputs[-1]]
    tiles = {inputs[-1]: max(n for n in range(1, TILE + 1) if size % n == 0)}
    inputs = inputs[-1:]
  channels = tuple(axis for axis in range(len(weight.shape)) if axis not in inputs)
  return qwix.quantize(w.astype(jnp.float32), form, channelwise_axes=channels, tiled_axes=tiles)
