"""The matmuls of a traced function, counted with the lengths of its scans.

A compiler's own count (`cost_analysis`) takes the body of a loop once.
"""

import math
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: Any, turns: int = 1) -> float:
  """FLOPs of all dot products over all devices; of two branches the dearer counts.

  Kernels (pallas) count for nothing: what a grid skips depends on its mask. `has_kernels` says whether there are any.

  Args:
    jaxpr: of `jax.jit(f).trace(...)`.
    turns: how often a loop goes round whose end the data decide.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    inner = [matmul_flops(sub, turns) for value in params.values() for sub in _jaxprs(value)]
    if name == "dot_general":
      contracted = params["dimension_numbers"][0][0]
      left = equation.invars[0].aval.shape
      total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    elif name == "cond":
      total += max(inner, default=0.0)
    elif name != "pallas_call":
      total += sum(inner) * _times(name, params, turns)
  return total


def has_kernels(jaxpr: Any) -> bool:
  """Whether a part of the work is a kernel's."""
  inner = lambda equation: (sub for value in equation.params.values() for sub in _jaxprs(value))
  return any(e.primitive.name == "pallas_call" or any(map(has_kernels, inner(e))) for e in jaxpr.eqns)


def _times(name: str, params: dict[str, Any], turns: int) -> int:
  if name == "scan":
    return params["length"]
  if name == "shard_map":  # its body is one device's
    return math.prod(params["mesh"].shape.values())
  return turns if name == "while" else 1


def _jaxprs(value: Any) -> list[Any]:
  """The programs in an equation's parameter."""
  if isinstance(value, core.ClosedJaxpr):
    return [value.jaxpr]
  if isinstance(value, core.Jaxpr):
    return [value]
  return [sub for item in value for sub in _jaxprs(item)] if isinstance(value, (tuple, list)) else []
