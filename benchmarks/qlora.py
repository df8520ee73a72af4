"""What does it save to hold the base under LoRA factors in fewer bits, and what does it cost?

  python -m benchmarks.qlora --run runs/quickstart/sft [--rounds 5] [--topology v5e:1x1]

Memory: what the compiler says of a DPO step of factors (rank 16, all linear layers) on the model and the batch of
benchmarks/step_time.py: bytes of the held base, of all arguments, and of what the step and its `prepare` hold beside
them; for this machine in float32, and for one device of a TPU topology in bfloat16 (needs libtpu; no TPU).
Time: of such a step on this machine, the forms taking turns.
Error: of the log-probability of each completion token of held-out pairs, against the base as stored, for the run that
--run names (an SFT run that has held-out pairs: the quickstart's).
Writes benchmarks/results/qlora.json.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from alignjax.algorithms import preference
from alignjax.data.loader import Dataset
from alignjax.losses.logps import next_token_logps
from alignjax.model import ModelConfig, decoder, lora, quantised
from alignjax.runs.run import load
from alignjax.system import malloc, sharding
from alignjax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from alignjax.training.step import create_state, make_train_step
from alignjax.types import Trees
from benchmarks import result
from benchmarks.step_time import MODEL, make_batch, seconds_of, spread

RANK = 16
FORMS = ("float32", "bfloat16", "int8", "nf4")


class Step(NamedTuple):
  """A jitted step, its `prepare`, what makes the state and the base, and what the compiler says of them."""

  step: Callable
  prepare: Callable
  fresh: Callable
  held: Callable
  bytes: dict[str, int]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--run", required=True, help="directory of an SFT run with held-out pairs")
  parser.add_argument("--rounds", type=int, default=5, help="times that every step takes its turn")
  parser.add_argument("--topology", default="", help='also compile for one device of it, e.g. "v5e:1x1"')
  arguments = parser.parse_args()
  here = jax.devices()[0]
  steps = {form: make_step(form, "float32", here) for form in FORMS}
  seconds = measure(steps, arguments.rounds)
  errors = logp_errors(arguments.run)
  numbers = {
    "question": "what does it save to hold the base under LoRA factors in fewer bits, and what does it cost?",
    "model": MODEL,
    "rank": RANK,
    "rounds": arguments.rounds,
    "compilers_bytes": {f"{here.platform}, float32": {form: step.bytes for form, step in steps.items()}},
    "step": {
      form: {"seconds": spread(took), "over_float32": spread(took / seconds["float32"])}
      for form, took in seconds.items()
    },
    "logp_error": errors,
  }
  if arguments.topology:
    device = tpu(arguments.topology)
    numbers["compilers_bytes"][f"{arguments.topology}, bfloat16"] = {
      form: make_step(form, "bfloat16", device).bytes for form in FORMS
    }
  for target, rows in numbers["compilers_bytes"].items():
    for form, sizes in rows.items():
      print(f"{target} {form:8s}", "  ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()))
  for form in FORMS:
    error = errors["forms"][form]
    print(
      f"{form:8s} a step takes {numbers['step'][form]['over_float32']['median']:.2f} times that of float32;"
      f" log-prob error a token {error['mean']:.5f} nats, at most {error['max']:.4f}"
    )
  print("wrote", result.write("qlora", numbers))


def make_step(form: str, dtype: str, device: jax.Device) -> Step:
  """Compiles DPO of factors over a base in `form` for one device, which need not be there."""
  mesh = sharding.make_mesh(devices=[device])
  model = lora.adapt(decoder.make(ModelConfig(**MODEL, dtype=dtype)), lora.LoraConfig(rank=RANK, base=form))
  algorithm, config = preference.RECIPE.build(model), OptimizerConfig()
  tx = make_optimizer(config)
  create = lambda params: create_state(params, tx, jax.random.key(1))
  params, held = model.split(model.abstract(mesh))
  state = jax.eval_shape(create, params)
  shardings = sharding.state_shardings(state, tx, jax.tree.map(lambda x: x.sharding, params), mesh)
  placed = lambda tree, shardings: jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )
  everywhere = lambda tree: placed(tree, jax.tree.map(lambda _: sharding.replicated(mesh), tree))
  hparams = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in (*preference.RECIPE.hparams(), "learning_rate")}
  batch, key = everywhere(make_batch("preference")), everywhere(jax.eval_shape(lambda: jax.random.key(0)))
  reference = Trees({"reference": held})
  train_step = make_train_step(algorithm.loss, tx, make_schedule(config, 1000))
  with jax.set_mesh(mesh):
    prepared = everywhere(jax.eval_shape(algorithm.prepare, reference, batch, key))
    prepare = jax.jit(algorithm.prepare)
    step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
    # Asked for its memory only: a program compiled ahead refuses arrays of 4 bits in the layout that they have on CPUs.
    memory = lambda f, *arguments: f.lower(*arguments).compile().memory_analysis()
    of_step = memory(step, placed(state, shardings), prepared, everywhere(hparams), held)
    sizes = {
      "base": memory(jax.jit(lambda held: held), held).argument_size_in_bytes,
      "arguments": of_step.argument_size_in_bytes,
      "temp": of_step.temp_size_in_bytes,
      "prepare_temp": memory(prepare, reference, batch, key).temp_size_in_bytes,
    }
  own = lambda key: model.split(model.init(key))
  return Step(
    step,
    prepare,
    jax.jit(lambda key: create(own(key)[0]), out_shardings=shardings),
    jax.jit(lambda key: own(key)[1], out_shardings=jax.tree.map(lambda x: x.sharding, held)),
    sizes,
  )


def measure(steps: dict[str, Step], rounds: int) -> dict[str, np.ndarray]:
  """Seconds of each form's step, `prepare` included, in every round."""
  runs = {form: make_run(step) for form, step in steps.items()}
  times = {form: [] for form in runs}
  for _ in range(rounds + 1):
    for form, run in runs.items():
      times[form].append(seconds_of(run))
  return {form: np.array(values[1:]) for form, values in times.items()}  # the first of each warms up


def make_run(step: Step) -> Callable[[], None]:
  """Takes one step and waits for it."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    state, held = step.fresh(jax.random.key(0)), step.held(jax.random.key(0))
  hparams = preference.RECIPE.hparams() | {"learning_rate": OptimizerConfig().learning_rate}
  place = lambda tree: jax.device_put(tree, sharding.replicated(mesh))
  hparams, batch, key = place(jax.tree.map(jnp.float32, hparams)), place(make_batch("preference")), jax.random.key(1)
  key = place(key)

  def run():
    nonlocal state
    with jax.set_mesh(mesh):
      state, metrics = step.step(state, step.prepare(Trees({"reference": held}), batch, key), hparams, held)
    jax.block_until_ready((state, metrics))

  return run


def logp_errors(workdir: str) -> dict[str, Any]:
  """How far each form moves the log-probability of completion tokens, in nats."""
  run = load(workdir)
  data = dataclasses.replace(run.config.data, row_length=2 * run.config.data.row_length)  # a row holds two sides
  dataset = Dataset.open(data, run.tokenizer, "preference", "eval", run.config.run.seed)

  @jax.jit
  def score(params, rows):
    hidden, _ = run.model.forward(params, rows["tokens"], rows["segment_ids"], rows["positions"])
    return next_token_logps(hidden, run.model.unembedding(params), rows["tokens"])

  found = {}
  with jax.set_mesh(run.mesh):
    for form in FORMS:
      hold = lambda params: quantised.hold(params, run.model.weights(), form)  # noqa: B023
      params, values = jax.jit(hold)(run.params), []
      for batch in dataset.epoch():
        token_logps = np.asarray(score(params, sharding.to_mesh(batch, run.mesh).rows))
        values.append(token_logps[batch["loss_mask"] > 0])
      found[form] = np.concatenate(values).astype(np.float64)
  stored = found["float32"]
  errors = {form: np.abs(values - stored) for form, values in found.items()}
  return {
    "run": {"model": dataclasses.asdict(run.model.config), "step": run.step},
    "pairs": len(dataset),
    "tokens": len(stored),
    "mean_logp": float(stored.mean()),
    "forms": {
      form: {"mean": float(error.mean()), "p99": float(np.quantile(error, 0.99)), "max": float(error.max())}
      for form, error in errors.items()
    },
  }


def tpu(topology: str) -> jax.Device:
  """A device of a topology that only the compiler knows."""
  known = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
  for name, value in known.items():  # libtpu looks for its machine otherwise
    os.environ.setdefault(name, value)
  return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


if __name__ == "__main__":
  malloc.keep_freed()  # as the command line does
  main()
