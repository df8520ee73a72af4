"""How fast are the training steps on this machine, against its own matmul peak?

  python -m benchmarks.step_time [--rounds 7]

Steps of SFT, reward modelling and DPO (its live reference forward included) of a 27M-parameter decoder on 4096 tokens:
8 examples, or 4 pairs, of 512 tokens a side; in float32 and in bfloat16. Steps and matmuls take turns in one process,
so that whatever else the machine does slows all alike; the two dtypes are compared within each round.

MFU counts three times the matmuls of the loss's forward pass plus those of `prepare`: recomputation (scores of
attention and of the vocabulary) is work but not progress. The peak is the fastest matmul with float32 sums of the whole
run: on a busy machine MFU comes out too low, never too high.
Writes benchmarks/results/step_time.json.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.algorithms import ALGORITHMS
from alignjax.model import Model, ModelConfig, decoder
from alignjax.system import malloc
from alignjax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from alignjax.training.step import create_state, make_train_step
from alignjax.types import Batch, Metrics, Params
from benchmarks import result

MODEL = {
  "vocab": 8192, "layers": 6, "embed": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "mlp": 1536, "tied": False,
}  # fmt: skip
EXAMPLES, LENGTH = 8, 512
STEPS = ("sft", "reward", "preference")
DTYPES = ("float32", "bfloat16")
PEAK_SIZE = 2048  # of the square matrices that measure the peak


class Step(NamedTuple):
  """A compiled step: `run` takes one and waits for its metrics; flops of its model; bytes of its compiled parts."""

  run: Callable[[], Metrics]
  flops: int
  memory: dict[str, int]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--rounds", type=int, default=7, help="times that every step takes its turn")
  rounds = parser.parse_args().rounds
  steps = {(name, dtype): make_step(name, dtype) for name in STEPS for dtype in DTYPES}
  matmuls = {dtype: make_matmul(dtype) for dtype in DTYPES}
  times = {name: [] for name in (*steps, *matmuls)}
  for _ in range(rounds + 1):
    for name, step in steps.items():
      times[name].append(seconds_of(step.run))
      for dtype, matmul in matmuls.items():
        times[dtype].append(min(seconds_of(matmul) for _ in range(5)))
  seconds = {name: np.array(values[1:]) for name, values in times.items()}  # the first of each warms up
  peak = {dtype: 2 * PEAK_SIZE**3 / seconds[dtype].min() for dtype in DTYPES}

  numbers = {
    "question": "how fast are the training steps on this machine, against its own matmul peak?",
    "model": MODEL,
    "tokens_per_step": EXAMPLES * LENGTH,
    "rounds": rounds,
    "matmul_gflops": {dtype: spread(2 * PEAK_SIZE**3 / seconds[dtype] / 1e9) for dtype in DTYPES},
    "steps": {},
  }
  for name in STEPS:
    rows = {}
    for dtype in DTYPES:
      step, took = steps[name, dtype], seconds[name, dtype]
      rows[dtype] = {
        "tokens_per_s": spread(EXAMPLES * LENGTH / took),
        "mfu": spread(step.flops / took / peak[dtype]),
        "model_gflop": step.flops / 1e9,
        "memory_bytes": step.memory,
      }
    rows["bfloat16_over_float32"] = spread(seconds[name, "float32"] / seconds[name, "bfloat16"])
    numbers["steps"][name] = rows
    for dtype in DTYPES:
      row = rows[dtype]
      print(
        f"{name:10s} {dtype:8s} {row['tokens_per_s']['median']:6.0f} tokens/s (best {row['tokens_per_s']['max']:.0f})"
        f"  MFU {row['mfu']['median']:.0%} (best {row['mfu']['max']:.0%})"
      )
    print(f"{name:10s} bfloat16 / float32: {rows['bfloat16_over_float32']['median']:.2f}")
  print("wrote", result.write("step_time", numbers))


def seconds_of(run: Callable[[], object]) -> float:
  """How long one call takes."""
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def spread(values: np.ndarray) -> dict[str, float]:
  """Median, least and greatest of the rounds."""
  return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def make_step(name: str, dtype: str) -> Step:
  """The step of an algorithm on random weights and tokens."""
  module = ALGORITHMS[name]
  model = decoder.make(ModelConfig(**MODEL, dtype=dtype, head=module.head))
  params = jax.jit(model.init)(jax.random.key(0))
  frozen = {tree: jax.tree.map(jnp.copy, params) for tree in module.build(model).reads}
  return compile_step(name, model, params, frozen, make_batch(module.kind()))


def compile_step(
  name: str,
  model: Model,
  params: Params,
  frozen: dict[str, Params],
  batch: Batch,
  optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (it is frozen)
) -> Step:
  """Compiles an algorithm's step as `alignjax.train` does: `prepare`, then the train step with its state donated.

  Args:
    name: of the algorithm.
    model: which it trains.
    params: of it, donated to the first step.
    frozen: the other trees that the algorithm takes.
    batch: of every step.
    optimizer: its schedule is made for 1000 steps.
  """
  module = ALGORITHMS[name]
  algorithm = module.build(model)
  tx, key = make_optimizer(optimizer), jax.random.key(1)
  state = create_state(params, tx, key)
  hparams = {k: jnp.float32(v) for k, v in (module.hparams() | {"learning_rate": optimizer.learning_rate}).items()}

  train_step = make_train_step(algorithm.loss, tx, make_schedule(optimizer, 1000))
  trees = algorithm.trees(frozen, params)
  prepare = jax.jit(algorithm.prepare).lower(trees, batch, key).compile()
  prepared = prepare(trees, batch, key)
  compiled = jax.jit(train_step, donate_argnums=0).lower(state, prepared, hparams).compile()
  flops = matmul_flops(jax.make_jaxpr(algorithm.prepare)(trees, batch, key).jaxpr)
  flops += 3 * matmul_flops(jax.make_jaxpr(algorithm.loss)(state.params, prepared, hparams).jaxpr)

  def run() -> Metrics:
    nonlocal state
    state, metrics = compiled(state, prepare(trees, batch, key), hparams)
    return jax.block_until_ready((state, metrics))[1]

  memory = compiled.memory_analysis()
  sizes = {
    "temp": memory.temp_size_in_bytes,
    "alias": memory.alias_size_in_bytes,
    "prepare_temp": prepare.memory_analysis().temp_size_in_bytes,
  }
  return Step(run, flops, sizes)


def make_batch(kind: str) -> Batch:
  """EXAMPLES random segments of LENGTH tokens; a pair's two share a row."""
  sides = 2 if kind == "preference" else 1
  tokens = np.random.default_rng(0).integers(0, MODEL["vocab"], (EXAMPLES // sides, LENGTH * sides))
  return lay_out(tokens, sides)


def lay_out(tokens: np.ndarray, sides: int) -> Batch:
  """A batch of rows [B, T] of `sides` segments of equal length each, the second half of a segment a completion."""
  count, width = tokens.shape
  length = width // sides
  positions = np.tile(np.arange(length, dtype=np.int32), (count, sides))
  ones = np.ones((count, 1), np.float32)
  rows = {
    "tokens": tokens.astype(np.int32),
    "segment_ids": np.tile(np.arange(width, dtype=np.int32) // length + 1, (count, 1)),
    "positions": positions,
    "loss_mask": (positions >= length // 2).astype(np.float32),
    "example_mask": ones,
    "weights": ones,
    "margins": 0 * ones,
    "record_ids": np.arange(count, dtype=np.int32)[:, None],
  }
  return Batch(jax.tree.map(jnp.asarray, rows))


def make_matmul(dtype: str) -> Callable[[], None]:
  """A square matmul of operands in `dtype` with float32 result."""
  x = jax.random.normal(jax.random.key(0), (PEAK_SIZE, PEAK_SIZE), dtype)
  matmul = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
  return lambda: jax.block_until_ready(matmul(x))


def matmul_flops(jaxpr) -> int:
  """FLOPs of every dot_general in a jaxpr and those inside it; a scan's body counts once per trip."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    trips = equation.params["length"] if equation.primitive.name == "scan" else 1
    inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    total += trips * sum(matmul_flops(x) for x in inner if hasattr(x, "eqns"))
  return total


if __name__ == "__main__":
  malloc.keep_freed()  # as the command line does
  main()
