"""What does the reference cache save a DPO step, in time and in memory?

  python -m benchmarks.reference_cache [--rounds 7]

The DPO step of benchmarks/step_time.py, its reference scored in every step (live) or looked up (cached), in float32 and
bfloat16. Both take turns in one process. Memory is what the compiled programs say: the arrays that stay between two
steps (parameters, moments, the live reference) and the larger of the two programs' temporaries. Filling the cache costs
one live `prepare` for each batch of the data, once for all runs.
Writes benchmarks/results/reference_cache.json.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.algorithms import preference
from alignjax.model import ModelConfig, decoder
from alignjax.system import malloc
from alignjax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from alignjax.training.step import create_state, make_train_step
from alignjax.types import Trees
from benchmarks import result
from benchmarks.step_time import DTYPES, EXAMPLES, LENGTH, MODEL, make_batch, seconds_of, spread

KINDS = ("live", "cached")


class Step(NamedTuple):
  """A compiled step: `run` takes one and waits for it; `prepare` does its first part; bytes by what they hold."""

  run: Callable[[], None]
  prepare: Callable[[], None]
  memory: dict[str, int]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--rounds", type=int, default=7, help="times that every step takes its turn")
  rounds = parser.parse_args().rounds
  numbers = {
    "question": "what does the reference cache save a DPO step, in time and in memory?",
    "model": MODEL,
    "tokens_per_step": EXAMPLES * LENGTH,
    "rounds": rounds,
    "steps": {},
  }
  for dtype in DTYPES:
    steps = {kind: make_step(kind, dtype) for kind in KINDS}
    times = {kind: [] for kind in (*KINDS, "fill")}
    for _ in range(rounds + 1):
      for kind, step in steps.items():
        times[kind].append(seconds_of(step.run))
      times["fill"].append(seconds_of(steps["live"].prepare))
    seconds = {kind: np.array(values[1:]) for kind, values in times.items()}  # the first of each warms up
    peak = {kind: sum(step.memory.values()) for kind, step in steps.items()}
    numbers["steps"][dtype] = {
      **{
        kind: {"seconds": spread(seconds[kind]), "memory_bytes": steps[kind].memory | {"peak": peak[kind]}}
        for kind in KINDS
      },
      "fill_seconds_per_batch": spread(seconds["fill"]),
      "live_over_cached_time": spread(seconds["live"] / seconds["cached"]),
      "live_over_cached_peak": peak["live"] / peak["cached"],
    }
    row = numbers["steps"][dtype]
    print(
      f"{dtype:8s} live / cached: {row['live_over_cached_time']['median']:.2f} times the seconds, "
      f"{row['live_over_cached_peak']:.2f} times the memory"
    )
  print("wrote", result.write("reference_cache", numbers))


def make_step(kind: str, dtype: str) -> Step:
  """Compiles the step of one kind as `alignjax.train` does."""
  model = decoder.make(ModelConfig(**MODEL, dtype=dtype))
  algorithm = preference.RECIPE.build(model)
  config = OptimizerConfig()
  tx, key = make_optimizer(config), jax.random.key(1)
  state = create_state(jax.jit(model.init)(jax.random.key(0)), tx, key)
  values = preference.RECIPE.hparams() | {"learning_rate": config.learning_rate}
  hparams = {name: jnp.float32(value) for name, value in values.items()}
  batch = make_batch("preference")
  if kind == "live":
    frozen = {"reference": jax.tree.map(jnp.copy, state.params)}
  else:
    frozen = {}
    batch = batch.updated(rows={"reference_logps": -100.0 * jnp.ones((*batch.rows["weights"].shape, 2))})

  trees = Trees(frozen)
  prepare = jax.jit(algorithm.prepare).lower(trees, batch, key).compile()
  prepared = prepare(trees, batch, key)
  train_step = make_train_step(algorithm.loss, tx, make_schedule(config, 1000))
  step = jax.jit(train_step, donate_argnums=0).lower(state, prepared, hparams).compile()

  def run():
    nonlocal state
    state, metrics = step(state, prepare(trees, batch, key), hparams)
    jax.block_until_ready((state, metrics))

  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  temporaries = [program.memory_analysis().temp_size_in_bytes for program in (prepare, step)]
  memory = {"state": size([state.params, state.opt_state]), "reference": size(frozen), "temporary": max(temporaries)}
  return Step(run, lambda: jax.block_until_ready(prepare(trees, batch, key)), memory)


if __name__ == "__main__":
  malloc.keep_freed()  # as the command line does
  main()
