"""What do K members of a sweep cost, against K runs one after the other?

  python -m benchmarks.sweep [--rounds 5] [--members 1,2,4,8,16]

DPO steps of LoRA factors (rank 8, all linear layers) on a decoder, as `alignjax train` takes one (`prepare`, then the
step) and as `alignjax sweep` takes K (one program; the reference's forward pass is shared). They take turns in one
process, so that whatever else the machine does slows all alike. On few tokens, and in a small model, a step is overhead
and reading of weights, which members share; on many it is arithmetic, of which they share a third at most: there K
members can not take less than (2 K + 1) / 3 of one run's time.
Writes benchmarks/results/sweep.json.
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.algorithms import preference
from alignjax.model import ModelConfig, decoder, lora
from alignjax.system import malloc, sharding
from alignjax.training import loop
from alignjax.training.optim import OptimizerConfig
from alignjax.types import Batch, Params
from benchmarks import result
from benchmarks.step_time import seconds_of, spread

LORA = {"rank": 8, "alpha": 16.0}
TOY = {
  "vocab": 512, "layers": 2, "embed": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 128, "tied": True,
}  # fmt: skip
SMALL = {
  "vocab": 2048, "layers": 4, "embed": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp": 768, "tied": True,
}  # fmt: skip


class Case(NamedTuple):
  """A model, and a batch of so many pairs, with so many tokens a side."""

  model: dict
  pairs: int
  length: int


CASES = {
  "toy model, few tokens": Case(TOY, 1, 32),
  "small model, few tokens": Case(SMALL, 1, 32),
  "small model, many tokens": Case(SMALL, 2, 128),
}


class Step(NamedTuple):
  """A compiled step: `run` takes one and waits for it; how long it took to compile; the bytes that it holds."""

  run: Callable[[], None]
  compile_s: float
  temp_bytes: int


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--rounds", type=int, default=5, help="times that every step takes its turn")
  parser.add_argument("--members", default="1,2,4,8,16", help="values of K")
  arguments = parser.parse_args()
  counts = [int(count) for count in arguments.members.split(",")]
  numbers = {
    "question": "what do K members of a sweep cost, against K runs one after the other?",
    "lora": LORA,
    "rounds": arguments.rounds,
    "cases": {},
  }
  for name, case in CASES.items():
    numbers["cases"][name] = measure(case, counts, arguments.rounds)
    for count, row in numbers["cases"][name]["members"].items():
      print(
        f"{name}: {count:>2} members take {row['over_one_run']['median']:.2f} times one run, "
        f"{row['over_as_many_runs']['median']:.2f} of as many; "
        f"compiled, and 100 steps: {row['compiled_and_100_steps_over_one_run']:.2f} times one run",
        flush=True,
      )
  print("wrote", result.write("sweep", numbers))


def measure(case: Case, counts: list[int], rounds: int) -> dict:
  """Steps of one run and of K members in turns; ratios within each round."""
  steps = {0: make_solo(case)} | {count: make_members(case, count) for count in counts}
  times = {count: [] for count in steps}
  for _ in range(rounds + 1):
    for count, step in steps.items():
      times[count].append(seconds_of(step.run))
  seconds = {count: np.array(values[1:]) for count, values in times.items()}  # the first of each warms up
  whole = {count: step.compile_s + 100 * float(np.median(seconds[count])) for count, step in steps.items()}
  row = lambda count: {
    "seconds": spread(seconds[count]),
    "compile_s": steps[count].compile_s,
    "temp_bytes": steps[count].temp_bytes,
  }
  return {
    **case._asdict(),
    "tokens": 2 * case.pairs * case.length,
    "one_run": row(0),
    "members": {
      count: row(count)
      | {
        "over_one_run": spread(seconds[count] / seconds[0]),
        "over_as_many_runs": spread(seconds[count] / seconds[0] / count),
        "compiled_and_100_steps_over_one_run": whole[count] / whole[0],
      }
      for count in counts
    },
  }


class Parts(NamedTuple):
  """DPO of the adapted model, and all that a step takes: `compile` are the arguments that both kinds of loop share."""

  compile: tuple
  params: Params
  held: Params
  hparams: dict[str, float]
  batch: Batch


def parts(case: Case) -> Parts:
  model = lora.adapt(decoder.make(ModelConfig(**case.model)), lora.LoraConfig(**LORA))
  optimizer = OptimizerConfig()
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  hparams = preference.RECIPE.hparams() | {"learning_rate": optimizer.learning_rate}
  params, held = jax.jit(lambda key: model.split(model.init(key)))(jax.random.key(0))
  return Parts((optimizer, 1000, model, preference.RECIPE.build(model), mesh), params, held, hparams, make_batch(case))


def make_solo(case: Case) -> Step:
  """One run's step, as `alignjax.train` compiles it."""
  own = parts(case)
  return make_step(own, loop.of_one(*own.compile, (None, None)), 1, lambda constant, key: (own.held,))


def make_members(case: Case, count: int) -> Step:
  """The step of `count` members, as `alignjax.train` compiles it."""
  own = parts(case)
  program = loop.of_members(*own.compile, tuple(range(count)))
  return make_step(own, program, count, lambda constant, key: (constant, own.held, key))


def make_step(own: Parts, program: loop.Loop, count: int, rest: Callable) -> Step:
  """Compiles and takes a first step; `rest` are the arguments of its update after the hyper-parameters."""
  constant, key = {"reference": own.held}, jax.random.key(1)
  state = program.create(own.params, key)
  hparams = program.stack([own.hparams] * count)
  began = time.perf_counter()
  state, _, prepared, _ = jax.block_until_ready(program.iterate(state, own.batch, hparams, constant, own.held, key))
  compile_s = time.perf_counter() - began
  compiled = program.update.lower(state, prepared, hparams, *rest(constant, key)).compile()

  def run():
    nonlocal state
    state, metrics, _, _ = program.iterate(state, own.batch, hparams, constant, own.held, key)
    jax.block_until_ready((state, metrics))

  return Step(run, compile_s, compiled.memory_analysis().temp_size_in_bytes)


def make_batch(case: Case) -> Batch:
  """Pairs of random tokens, one to a row; the second half of each side is its completion."""
  pairs, length = case.pairs, case.length
  positions = np.tile(np.arange(length, dtype=np.int32), (pairs, 2))
  ones = np.ones((pairs, 1), np.float32)
  rows = {
    "tokens": np.random.default_rng(0).integers(0, case.model["vocab"], positions.shape).astype(np.int32),
    "segment_ids": np.tile(np.arange(2 * length, dtype=np.int32) // length + 1, (pairs, 1)),
    "positions": positions,
    "loss_mask": (positions >= length // 2).astype(np.float32),
    "example_mask": ones,
    "weights": ones,
    "margins": 0 * ones,
    "record_ids": np.arange(pairs, dtype=np.int32)[:, None],
  }
  return Batch(jax.tree.map(jnp.asarray, rows))


if __name__ == "__main__":
  malloc.keep_freed()  # as the command line does
  main()
