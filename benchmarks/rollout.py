"""How many tokens a second do rollouts of long-tailed lengths sample, by continuous batching and in static batches?

  python -m benchmarks.rollout [--rounds 7]

Random weights, and a bias on the stop token's logit that ends a completion with a probability of about 1/32 at every
token: geometric lengths, cut at 256, of which the longest in a batch is several times the mean. `generate_queue` with
its default refill and with others, against `generate` in batches of as many rows as slots; both sample the same tokens.
The contestants take turns in one run, so that whatever else the machine does slows all alike. Prefills count;
compilation does not. At equal lengths, beside others' samplers: benchmarks/peers.py.
Writes benchmarks/results/rollout.json.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from alignjax.commands.quickstart import MODEL as QUICKSTART
from alignjax.commands.quickstart import VOCAB
from alignjax.model import Model, ModelConfig, decoder
from alignjax.sampling.generate import make_generate
from alignjax.sampling.queue import make_generate_queue
from alignjax.system import malloc
from alignjax.types import Params
from benchmarks import result
from benchmarks.step_time import MODEL, seconds_of, spread

PAD, STOP = 0, 1
MEAN_LENGTH = 32  # of the completions, about
# name -> model, slots, prompts in the queue, tokens of a prompt, of a completion at most
LONG_TAILED = {
  "quickstart": (QUICKSTART | {"vocab": VOCAB}, 64, 512, 32, 256),
  "27M": (MODEL, 32, 128, 64, 256),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--rounds", type=int, default=7, help="times that every contestant takes its turn")
  parser.add_argument("--models", nargs="+", choices=LONG_TAILED, default=list(LONG_TAILED))
  a = parser.parse_args()
  numbers: dict[str, Any] = {"question": __doc__.splitlines()[0], "rounds": a.rounds, "long_tailed": {}}
  for name in a.models:
    numbers["long_tailed"][name] = long_tailed(*LONG_TAILED[name], a.rounds)
    print(name, json.dumps(numbers["long_tailed"][name], indent=2))
  print("wrote", result.write("rollout", numbers))


def take_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
  """Seconds of each contestant in every round, after one that warms up."""
  seconds = {name: [] for name in contestants}
  for _ in range(rounds + 1):
    for name, contestant in contestants.items():
      seconds[name].append(contestant())
  return {name: np.array(values[1:]) for name, values in seconds.items()}


def long_tailed(sizes: dict[str, Any], slots: int, queue: int, width: int, new_tokens: int, rounds: int):
  """Tokens/s of a queue of prompts, sampled in static batches and through slots."""
  model, params, prompts = make_model(sizes, queue, width, stop_probability=1 / MEAN_LENGTH)
  static = make_generate(model, new_tokens)
  batches = [{name: x[start : start + slots] for name, x in prompts.items()} for start in range(0, queue, slots)]
  options = {"key": jax.random.key(1), "stop_id": STOP, "pad_id": PAD}
  run_static = lambda: jax.block_until_ready([static(params, **batch, **options) for batch in batches])
  refills = {"default": None} | {str(refill): refill for refill in (1, slots // 8, slots // 2, slots)}
  run_queue = {
    name: functools.partial(make_generate_queue(model, new_tokens, slots, refill), params, **prompts, **options)
    for name, refill in refills.items()
  }
  lengths = np.concatenate([np.asarray(samples.lengths) for samples in run_static()])
  longest = lengths.reshape(-1, slots).max(axis=1)

  contestants = {"static": lambda: seconds_of(run_static)}
  for name, run in run_queue.items():
    contestants[name] = lambda run=run: seconds_of(lambda: jax.block_until_ready(run()))
  took = take_turns(contestants, rounds)
  rows = {}
  for name, run in run_queue.items():
    samples, occupancy = run()
    assert (np.asarray(samples.lengths) == lengths).mean() > 0.98, "other completions than the static sampler's"
    rows[name] = {
      "tokens_per_s": spread(lengths.sum() / took[name]),
      "over_static": spread(took["static"] / took[name]),
      "decode_steps": int(occupancy.steps),
      "refills": int(occupancy.refills),
      "occupancy": float(occupancy.share),
    }
  return {
    "model": sizes, "slots": slots, "prompts": queue, "prompt_tokens": width, "max_new_tokens": new_tokens,
    "lengths": {"mean": float(lengths.mean()), "median": float(np.median(lengths)), "max": int(lengths.max())},
    "static": {
      "tokens_per_s": spread(lengths.sum() / took["static"]),
      "decode_steps": int((longest - 1).sum()),
      "occupancy": float((lengths - 1).sum() / (slots * (longest - 1).sum())),
    },
    "queue_by_refill": rows,
  }  # fmt: skip


def make_model(
  sizes: dict[str, Any], rows: int, width: int, stop_probability: float
) -> tuple[Model, Params, dict[str, np.ndarray]]:
  """A decoder with random weights that stops by chance, and as many random prompts."""
  model = decoder.make(ModelConfig(**sizes))
  model, params = with_stops(model, jax.jit(model.init)(jax.random.key(0)), stop_probability)
  ids = np.arange(rows, dtype=np.int32)
  tokens = np.random.default_rng(0).integers(2, sizes["vocab"], (rows, width)).astype(np.int32)
  lengths = np.full(rows, width, np.int32)
  return model, params, {"prompts": tokens, "prompt_lengths": lengths, "prompt_ids": ids, "sample_ids": 0 * ids}


def with_stops(model: Model, params: Params, probability: float) -> tuple[Model, Params]:
  """A model that samples STOP about that often: one feature becomes a constant, whose weight is STOP's bias.

  Its other logits are near 0, as random weights leave them.
  """
  bias = math.log(probability / (1 - probability) * model.config.vocab)

  def forward(*args):
    hidden, cache = model.forward(*args)
    return hidden.at[..., -1].set(1), cache

  name = "embed" if model.config.tied else "unembed"
  matrix = params[name].at[:, -1].set(0).at[STOP, -1].set(bias)
  return model._replace(forward=forward), params | {name: matrix}


if __name__ == "__main__":
  malloc.keep_freed()  # as the command line does
  main()
