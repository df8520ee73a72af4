"""The matmuls of a traced function, counted with the lengths of its scans.

A compiler's own count (`cost_analysis`) counts the body of a loop once.
"""

import math
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: Any, turns: int = 1) -> float:
  """Counts the FLOPs of all dot products over all devices; of the branches of a conditional, the most expensive counts.

  Kernels (pallas) are not counted: the blocks that a grid skips depend on its mask. `has_kernels` tells if any exist.

  Args:
    jaxpr: of `jax.jit(f).trace(...)`.
    turns: the number of turns of a loop whose end depends on data.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    params = equation.params
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
  """Returns True if the program calls Pallas kernels."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      return True
    if any(has_kernels(sub) for value in equation.params.values() for sub in _jaxprs(value)):
      return True
  return False


def _times(name: str, params: dict[str, Any], turns: int) -> int:
  """Counts how often the programs in an equation run, over all devices."""
  if name == "scan":
    return params["length"]
  if name == "shard_map":  # its body is that of one device
    return math.prod(params["mesh"].shape.values())
  if name == "while":
    return turns
  return 1


def _jaxprs(value: Any) -> list[Any]:
  """Returns the programs in an equation's parameter."""
  if isinstance(value, core.ClosedJaxpr):
    return [value.jaxpr]
  if isinstance(value, core.Jaxpr):
    return [value]
  if isinstance(value, (tuple, list)):
    return [sub for item in value for sub in _jaxprs(item)]
  return []
