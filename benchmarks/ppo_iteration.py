"""Where does the time of a PPO iteration go, and how many tokens a second is each part?

  python -m benchmarks.ppo_iteration [--rounds 3]

The four models are the 27M-parameter decoder of benchmarks/step_time.py: 32 prompts of 64 tokens, 64 new tokens each
(random weights never stop), one epoch of 4 minibatches; in float32 and in bfloat16, turn about in one process.
Tokens of the rollout are the new ones; of the other parts, all tokens of the rows. Writes
benchmarks/results/ppo_iteration.json.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.algorithms import Parts, ppo
from alignjax.model import Model, ModelConfig, decoder
from alignjax.system import malloc
from alignjax.training.iteration import make_prepare
from alignjax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from alignjax.training.step import create_state, make_passes, make_train_step
from alignjax.types import Batch, Params
from benchmarks import result
from benchmarks.step_time import DTYPES, MODEL, spread

PROMPTS, PROMPT_LENGTH, NEW_TOKENS, MINIBATCHES = 32, 64, 64, 4
PARTS = ("rollout", "prepare", "update")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--rounds", type=int, default=3, help="iterations of each dtype")
  rounds = parser.parse_args().rounds
  iterations = {dtype: make_iteration(dtype) for dtype in DTYPES}
  times: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in DTYPES}
  for _ in range(rounds + 1):
    for dtype, iterate in iterations.items():
      times[dtype].append(iterate()[0])
  rows = PROMPTS * (PROMPT_LENGTH + NEW_TOKENS)
  tokens = {"rollout": PROMPTS * NEW_TOKENS, "prepare": rows, "update": rows}
  numbers = {
    "question": "where does the time of a PPO iteration go, and how many tokens a second is each part?",
    "model": MODEL,
    "prompts": PROMPTS,
    "prompt_length": PROMPT_LENGTH,
    "new_tokens": NEW_TOKENS,
    "rounds": rounds,
    "iterations": {},
  }
  for dtype in DTYPES:
    seconds = {part: np.array([round_[part] for round_ in times[dtype][1:]]) for part in PARTS}  # the first warms up
    numbers["iterations"][dtype] = {
      part: {"seconds": spread(seconds[part]), "tokens_per_s": spread(tokens[part] / seconds[part])} for part in PARTS
    }
    for part in PARTS:
      row = numbers["iterations"][dtype][part]
      print(f"{dtype:8s} {part:8s} {row['seconds']['median']:.2f} s  {row['tokens_per_s']['median']:.0f} tokens/s")
  print("wrote", result.write("ppo_iteration", numbers))


def make_iteration(dtype: str) -> Callable[[], tuple[dict[str, float], dict[str, float]]]:
  """An iteration on random weights and prompts."""
  config = ModelConfig(**MODEL, dtype=dtype)
  model, judge = decoder.make(config), decoder.make(dataclasses.replace(config, head="scalar"))
  params = jax.jit(ppo.adapt(model, ppo.PpoOptions()).init)(jax.random.key(0))
  frozen = {
    "reference": {name: tree for name, tree in jax.tree.map(jnp.copy, params).items() if name != "value"},
    "reward_model": jax.jit(judge.init)(jax.random.key(1)),
  }
  prompts = np.random.default_rng(0).integers(1, MODEL["vocab"], (PROMPTS, PROMPT_LENGTH), np.int32)
  sizes = {"max_new_tokens": NEW_TOKENS, "epochs": 1, "minibatches": MINIBATCHES}
  return compile_iteration(model, judge, params, frozen, prompts, sizes, OptimizerConfig(learning_rate=1e-5))


def compile_iteration(
  model: Model,
  judge: Model,
  params: Params,
  frozen: dict[str, Params],
  prompts: np.ndarray,
  sizes: dict[str, int],
  optimizer: OptimizerConfig,
) -> Callable[[], tuple[dict[str, float], dict[str, float]]]:
  """Returns a function that takes one iteration and returns the seconds of its parts, and its metrics.

  Args:
    model: the policy, without its critic.
    judge: the reward model.
    params: of policy and critic, donated to the first iteration.
    frozen: the other trees.
    prompts: int32 [B, T], all whole.
    sizes: options of the algorithm; nothing stops a completion.
    optimizer: its schedule is made for 1000 iterations.
  """
  options = ppo.PpoOptions(reward_model="made here", **sizes)
  algorithm = ppo.RECIPE.build(ppo.adapt(model, options), "", options, Parts(models=(("reward_model", judge),)))
  tx = make_optimizer(optimizer)
  state = create_state(params, tx, jax.random.key(2), algorithm.running)
  hparams = ppo.RECIPE.hparams("", options) | {"learning_rate": optimizer.learning_rate}
  hparams = {k: jnp.float32(v) for k, v in hparams.items()}
  prepare = make_prepare(algorithm)
  step = make_train_step(algorithm.loss, tx, make_schedule(optimizer, 1000))
  update = jax.jit(make_passes(step, algorithm.passes, algorithm.counts), donate_argnums=0)
  rows = {
    "tokens": jnp.asarray(prompts),
    "segment_ids": jnp.ones_like(prompts),
    "positions": jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape),
    "loss_mask": jnp.zeros(prompts.shape),
    "example_mask": jnp.ones((len(prompts), 1)),
    "record_ids": jnp.arange(len(prompts))[:, None],
    "weights": jnp.ones((len(prompts), 1)),
  }

  def iterate() -> tuple[dict[str, float], dict[str, float]]:
    nonlocal state
    trees = algorithm.trees(frozen, state.params, hparams)
    prepared, seconds = prepare(trees, Batch(rows, running=state.running), jax.random.fold_in(state.key, state.step))
    began = time.perf_counter()
    state, metrics = update(state, prepared, hparams)
    jax.block_until_ready((state, metrics))
    seconds |= {"update": time.perf_counter() - began}
    return seconds, algorithm.finish({name: float(x) for name, x in metrics.items()})

  return iterate


if __name__ == "__main__":
  malloc.keep_freed()
  main()
