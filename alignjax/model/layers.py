"""The decoder's parts, as functions of arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from alignjax.system import sharding

PRODUCT = "product"  # the checkpoint name of a matmul with a weight: model.remat=dots keeps its result


def dense(w: Any, dtype: Any) -> jax.Array:
  """Returns a weight as an array of `dtype`, in whichever form it is held (model/quantised.py).

  Args:
    w: an array, or a matrix quantised by `quantised.hold`, which is dequantised.
    dtype: of the result.
  """
  if hasattr(w, "qvalue"):
    import qwix  # optional, and slow to import

    w = qwix.dequantize(w)
  return w.astype(dtype)


def _dense_beside(x: jax.Array, w: Any, axes: tuple[str | None, ...]) -> jax.Array:
  """w `dense` in x's dtype, gathered if its logical axes are given.

  Codes become dense only after x is computed: a loop over tokens would otherwise make every layer dense ahead of it.
  """
  if hasattr(w, "qvalue"):
    w, _ = jax.lax.optimization_barrier((w, x))
  w = dense(w, x.dtype)
  if not axes:
    return w
  return sharding.gather(w, *axes)


def einsum(equation: str, x: jax.Array, w: Any, axes: tuple[str | None, ...] = ()) -> jax.Array:
  """Contracts x with w in x's dtype with float32 (or wider) sums; the result has x's dtype.

  w is made `dense`, and gathered if its logical axes are given. The backward pass repeats both, so that a scan over
  layers holds at most one layer in that form.

  The dot yields the sums, forwards and backwards, and is rounded outside. In bfloat16 this form reaches the matrix
  units of CPUs; elsewhere it is free. The gradient of w is contracted as "x, cotangent": CPUs then transpose x, which
  is the narrower one in most layers. A w in codes is held, and has no gradient.

  Args:
    equation: "X,W->Y"; with `axes`, b and t are the rows and tokens of x.
    x: the input.
    w: the weight, in any form that `dense` takes.
    axes: the logical axes of w; (): it is not gathered.
  """
  return checkpoint_name(_einsum(equation, axes, x, w), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(equation, axes, x, w):
  given, _ = equation.split(",")
  return _dot(equation, _placed(x, given, equation, axes), _dense_beside(x, w, axes)).astype(x.dtype)


def _placed(x, letters, equation, axes):
  """x laid out by its letters: rows and tokens as everywhere, other dimensions as in the weight, but embed whole.

  Without this, the compiler would gather the rows of all devices for the gradient of a weight.
  """
  if not axes:
    return x
  weight_letters = equation.split("->")[0].split(",")[1]
  layout = dict(zip(weight_letters, axes, strict=True))
  layout = {letter: axis for letter, axis in layout.items() if axis != "embed"}
  layout["b"] = "batch"
  layout["t"] = sharding.dividing(x.shape[letters.index("t")], "tokens")
  return sharding.constrain(x, *(layout.get(letter) for letter in letters))


def _dot(equation, x, w):
  accumulate = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum(equation, x, w, preferred_element_type=accumulate)


def _einsum_forward(equation, axes, x, w):
  return _einsum(equation, axes, x, w), (x, w)


def _einsum_backward(equation, axes, residuals, cotangent):
  x, w = residuals
  inputs, out = equation.split("->")
  left, right = inputs.split(",")
  cotangent = _placed(cotangent, out, equation, axes)
  dx = _dot(f"{out},{right}->{left}", cotangent, _dense_beside(cotangent, w, axes)).astype(x.dtype)
  if hasattr(w, "qvalue"):
    return dx, None
  dw = _dot(f"{left},{out}->{right}", _placed(x, left, equation, axes), cotangent).astype(x.dtype)
  if axes:
    dw = sharding.constrain(dw, *axes)
  return dx, dw.astype(w.dtype)


_einsum.defvjp(_einsum_forward, _einsum_backward)


def project(
  equation: str,
  x: jax.Array,
  w: Any,
  factors: dict[str, jax.Array] | None = None,
  bias: jax.Array | None = None,
  axes: tuple[str | None, ...] = (),
) -> jax.Array:
  """Contracts x with w, and adds the low-rank update and the bias if there are any: x w + (x a) b + bias, in x's dtype.

  Args:
    equation: "X,W->Y", without the letter r.
    x: the input.
    w: the weight, with its input dimensions before its output dimensions.
    factors: a, of w's input dimensions and R; b, of R and w's output dimensions (model/lora.py). None: no update.
    bias: of w's output dimensions.
    axes: the logical axes of w, if it is to be gathered.
  """
  y = einsum(equation, x, w, axes)
  if bias is not None:
    y = y + bias.astype(y.dtype)
  if factors is None:
    return y
  given, weight, out = equation.replace("->", ",").split(",")
  inputs = "".join(letter for letter in weight if letter not in out)
  outputs = weight.removeprefix(inputs)
  rows = "".join(letter for letter in given if letter not in inputs)
  low = einsum(f"{given},{inputs}r->{rows}r", x, factors["a"])
  return y + einsum(f"{rows}r,r{outputs}->{out}", low, factors["b"])


# The backward pass computes these again from their arguments: as fast, and without memory for intermediate results.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@_recomputed
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Divides x [..., D] by its root mean square, and multiplies by scale [D]; in float32, returned in x's dtype.

  `eps` is added to the mean square. The backward pass computes it again.

  Source: Zhang and Sennrich 2019, eq. 4 (arXiv:1910.07467)
  """
  y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  return (y * scale.astype(y.dtype)).astype(x.dtype)


def rotary_frequencies(head_dim: int, theta: float) -> np.ndarray:
  """Returns the angle per position, in radians, of each pair of a head's dimensions, float32 [H/2].

  Source: Su et al. 2021, eq. 15 (arXiv:2104.09864)
  """
  return theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))


def stretched(
  frequencies: np.ndarray, scaling: str, factor: float, low: float, high: float, original: int
) -> np.ndarray:
  """Stretches the frequencies [H/2] for rows `factor` times as long as those of `original` tokens.

  "linear" divides all of them by the factor. "llama3" divides those that turn less than `low` times in an original row,
  keeps those that turn more than `high` times, and interpolates in between. "none" returns them as they are.

  Args:
    frequencies: of `rotary_frequencies`.
    scaling: "none", "linear" or "llama3", which is not checked here.
    factor: not read by "none".
    low, high, original: read by "llama3" only.

  Source: Chen et al. 2023, eq. 4 (arXiv:2306.15595); llama3: Hugging Face's `_compute_llama3_parameters`
  """
  if scaling == "none":
    return frequencies
  if scaling == "linear":
    return frequencies / np.float32(factor)
  turns = original * frequencies / np.float32(2 * np.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
  return (1 - kept) * frequencies / np.float32(factor) + kept * frequencies


def rotary_angles(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """Computes cosines and sines [B, T, 1, H/2] of the rotary embedding at positions [B, T]."""
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Applies the rotary embedding to x [B, T, N, H]; pairs are (i, i + H/2), as in Hugging Face's weights."""
  cos, sin = angles
  a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=True),
}


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))
def gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
  """Computes the hidden layer [B, T, F] of a feed-forward, activation(gate) * up, from gate and up [B, T, F].

  `activation` is a name in `ACTIVATIONS`.

  Source: Shazeer 2020, eq. 6 (arXiv:2002.05202)
  """
  return ACTIVATIONS[activation](gate) * up
