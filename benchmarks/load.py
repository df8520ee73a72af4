"""How much memory of the host does it take to load a checkpoint of 4 GB, beside the weights themselves, and how long?

  python -m benchmarks.load [--layers 28] [--folder DIR]

Writes a Llama of 1.9 billion random weights in bfloat16 in Hugging Face's layout, in files of 1 GB, to DIR (a temporary
folder by default), and loads it in a fresh process onto one device and onto a mesh of eight, which on a CPU are all
parts of the same memory: of the highest resident set, what the process held before and the weights are taken off.
Asked: at most the largest tensor and 500 MB. Writes benchmarks/results/load.json.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

MODEL = {"vocab": 32_000, "embed": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128, "mlp": 8192}
ALLOWED = 500 * 10**6
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--layers", type=int, default=28)
  parser.add_argument("--folder", type=pathlib.Path, help="of the checkpoint; kept")
  parser.add_argument("--part", choices=("write", "read"), help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.part:
    print(json.dumps({"write": write, "read": read}[arguments.part](arguments.folder, arguments.layers)))
    return
  from benchmarks import result

  with tempfile.TemporaryDirectory() as temporary:
    folder = arguments.folder or pathlib.Path(temporary)
    if not (folder / "config.json").exists():
      process(folder, arguments.layers, "write", 1)
    loads = {f"{devices} devices": process(folder, arguments.layers, "read", devices) for devices in (1, 8)}
  for name, load in loads.items():
    print(
      f"{name}: {load['weights_bytes'] / 1e9:.2f} GB in {load['seconds']:.1f} s; host memory beside them "
      f"{load['beside_bytes'] / 1e6:.0f} MB, the largest tensor being {load['largest_tensor_bytes'] / 1e6:.0f} MB"
    )
    if load["beside_bytes"] > load["largest_tensor_bytes"] + ALLOWED:
      sys.exit(f"{name}: more than the largest tensor and {ALLOWED / 1e6:.0f} MB")
  numbers = {"question": "What does loading a checkpoint cost in memory of the host?", "model": MODEL, "loads": loads}
  print("wrote", result.write("load", numbers | {"layers": arguments.layers}))


def process(folder: pathlib.Path, layers: int, part: str, devices: int) -> dict[str, float]:
  """A part in a process of its own."""
  command = [sys.executable, "-m", "benchmarks.load", "--folder", str(folder), "--layers", str(layers), "--part", part]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
  done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def write(folder: pathlib.Path, layers: int) -> dict[str, float]:
  """A checkpoint of random bits, but for those of the exponent that make numbers large."""
  import jax
  import jax.numpy as jnp

  from alignjax.model import ModelConfig, decoder
  from alignjax.model.huggingface import weights

  model = decoder.make(ModelConfig(**MODEL, layers=layers, param_dtype="bfloat16"))
  random = lambda x: jax.random.bits(jax.random.key(len(x.shape)), x.shape, jnp.uint16) & 0xBFFF
  params = jax.tree.map(lambda x: jax.lax.bitcast_convert_type(random(x), jnp.bfloat16), model.abstract())
  weights.save(folder, model, params, SPECIAL, shard_bytes=10**9)
  return {}


def read(folder: pathlib.Path, layers: int) -> dict[str, float]:
  """Loads it, and says what that took."""
  import dataclasses

  import jax

  from alignjax.model import decoder
  from alignjax.model.huggingface import weights
  from alignjax.system import malloc, sharding

  malloc.keep_freed()
  model = decoder.make(dataclasses.replace(weights.read_config(str(folder)), param_dtype="bfloat16"))
  mesh = sharding.make_mesh()
  jax.block_until_ready(jax.numpy.zeros(8))
  resident = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  before, began = resident(), time.perf_counter()
  params = jax.block_until_ready(weights.load(str(folder), model, model.abstract(mesh)))
  seconds, held = time.perf_counter() - began, sum(x.nbytes for x in jax.tree.leaves(params))
  tensors = weights.read_tensors(str(folder)).values()
  return {
    "weights_bytes": held,
    "seconds": seconds,
    "gb_per_s": held / seconds / 1e9,
    "before_bytes": before,
    "beside_bytes": resident() - before - held,
    "largest_tensor_bytes": max(tensor.nbytes for tensor in tensors),
  }


if __name__ == "__main__":
  main()
