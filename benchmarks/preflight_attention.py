"""Memory that attention alone takes for its forward and backward pass, by the kernel and without, as the compiler says.

  python -m benchmarks.preflight_attention OUT.json

A row of 8,192 tokens with the heads of llama-3.1-8b on one v5e chip, in bfloat16. Part of benchmarks/preflight.py.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from alignjax.model.attention.attention import attention
from alignjax.model.attention.form import Form
from alignjax.model.huggingface.catalogue import MODELS
from alignjax.preflight import chip
from alignjax.system import sharding

TOKENS = 8192


def main() -> None:
  jax.config.update("jax_enable_compilation_cache", False)
  c = MODELS["llama-3.1-8b"]
  _, devices = chip.devices("v5e:1x1")
  mesh = sharding.make_mesh(devices=devices)
  place = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))
  heads = lambda count: place(jnp.bfloat16, 1, TOKENS, count, c.head_dim)
  given = heads(c.heads), heads(c.kv_heads), heads(c.kv_heads), place(jnp.int32, 1, TOKENS)

  def both(implementation):
    total = lambda q, k, v, ids: attention(implementation, Form(c.head_dim**-0.5), q, k, v, ids).sum(dtype=jnp.float32)
    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))

  found = {"tokens": TOKENS, "heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim, "topology": "v5e:1x1"}
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    for name in ("xla", "splash"):
      memory = both(name).trace(*given).lower().compile().memory_analysis()
      found[name] = {"temporaries": memory.temp_size_in_bytes}
  pathlib.Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
  main()
