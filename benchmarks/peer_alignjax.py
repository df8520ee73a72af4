"""This package's turns in benchmarks/peers.py.

  python -m benchmarks.peer_alignjax FOLDER TASK DTYPE

FOLDER is what peers.py wrote. Steps and iterations are compiled as `alignjax.train` does, and as the command line does
freed memory stays with the process. In bfloat16 training holds float32 weights and computes in bfloat16; generation
holds its weights in bfloat16.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from alignjax.algorithms import ALGORITHMS
from alignjax.model import Model, ModelConfig, critic, decoder
from alignjax.model.huggingface import weights
from alignjax.sampling.generate import make_generate
from alignjax.system import malloc, sharding
from alignjax.training.optim import OptimizerConfig
from alignjax.types import Params
from benchmarks.peer_turns import Turns
from benchmarks.ppo_iteration import compile_iteration
from benchmarks.step_time import compile_step, lay_out


def make_model(work: dict[str, Any], **options: str) -> Model:
  """The decoder; where it scores it has no unembedding."""
  return decoder.make(ModelConfig(**work["model"] | options | ({"tied": True} if "head" in options else {})))


def load(folder: pathlib.Path, model: Model) -> Params:
  """The weights of a folder, on the mesh."""
  return weights.load(str(folder), model, model.abstract(sharding.make_mesh()))


def optimizer(work: dict[str, Any]) -> OptimizerConfig:
  """AdamW at a constant rate."""
  return OptimizerConfig(learning_rate=work["learning_rate"], schedule="constant")


def train(name: str) -> Callable[[Turns, pathlib.Path, dict[str, Any], str], None]:
  """Turns of an algorithm's step on the one batch of pairs."""

  def run(turns: Turns, folder: pathlib.Path, work: dict[str, Any], dtype: str) -> None:
    scores = ALGORITHMS[name].head == "scalar"
    model = make_model(work, dtype=dtype, **({"head": "scalar"} if scores else {}))
    with np.load(folder / "tokens.npz") as tokens:
      pairs = tokens["pairs"]
    params = load(folder / ("reward" if scores else "policy"), model)
    frozen = {} if scores else {"reference": load(folder / "reference", model)}
    batch = lay_out(pairs.reshape(len(pairs), -1), sides=2)
    step = compile_step(name, model, params, frozen, batch, optimizer(work))
    losses: list[float] = []
    while True:
      turns.begin(losses=losses)
      metrics = step.run()
      turns.end()
      losses.append(float(metrics["loss"]))

  return run


def ppo(turns: Turns, folder: pathlib.Path, work: dict[str, Any], dtype: str) -> None:
  """Turns of an iteration of PPO."""
  model, judge = make_model(work, dtype=dtype), make_model(work, dtype=dtype, head="scalar")
  policy, reward = load(folder / "policy", model), load(folder / "reward", judge)
  frozen = {"reference": load(folder / "reference", model), "reward_model": reward}
  params = critic.start("own", policy | {"value": reward}, reward)
  with np.load(folder / "tokens.npz") as tokens:
    prompts = tokens["prompts"]
  sizes = {"max_new_tokens": work["new_tokens"], "epochs": work["epochs"], "minibatches": 1}
  iterate = compile_iteration(model, judge, params, frozen, prompts, sizes, optimizer(work))
  found: dict[str, list[float]] = {"kl": [], "score": []}
  while True:
    turns.begin(**found)
    _, metrics = iterate()
    turns.end()
    found["kl"].append(float(metrics["objective/kl"]))
    found["score"].append(float(metrics["objective/scores"]))


def generate(turns: Turns, folder: pathlib.Path, work: dict[str, Any], dtype: str) -> None:
  """Turns of the sampler: one batch, which nothing stops."""
  model = make_model(work, dtype=dtype, param_dtype=dtype)
  params, run = load(folder / "policy", model), make_generate(model, work["batch_new_tokens"])
  with np.load(folder / "tokens.npz") as tokens:
    prompts = tokens["batch"]
  rows, width = prompts.shape
  ids = np.arange(rows, dtype=np.int32)
  options = {"prompts": prompts, "prompt_lengths": np.full(rows, width, np.int32), "prompt_ids": ids}
  options |= {"sample_ids": 0 * ids, "stop_id": -1, "pad_id": None}
  greedy = np.asarray(run(params, **options, key=jax.random.key(0), temperature=0.0).tokens).tolist()
  turn = 0
  while True:
    turns.begin(greedy=greedy)
    samples = jax.block_until_ready(run(params, **options, key=jax.random.key(turn), temperature=1.0))
    turns.end()
    assert (np.asarray(samples.lengths) == work["batch_new_tokens"]).all()
    turn += 1


TASKS = {"dpo": train("preference"), "reward": train("reward"), "ppo": ppo, "generate": generate}


def main() -> None:
  folder, task, dtype = sys.argv[1:]
  turns = Turns("jax", "flax", "optax")
  work = json.loads((pathlib.Path(folder) / "work.json").read_text())
  with jax.set_mesh(sharding.make_mesh()):
    TASKS[task](turns, pathlib.Path(folder), work, dtype)


if __name__ == "__main__":
  malloc.keep_freed()  # as the command line does
  main()
