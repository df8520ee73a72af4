"""How fast is attention by each implementation on this machine's accelerator, and what memory does it take?

  python -m benchmarks.attention [--rounds 20]

Forward and backward pass of one layer's attention with the heads of llama-3.1-8b in bfloat16, 16,384 tokens in rows of
2,048 and of 8,192: one text to a row, and two, as a pair lies in it. Those that the device does not have are left out
with the reason. Temporary bytes are the compiler's; "difference" is the largest from XLA's output and gradients, over
the largest number of these. Writes benchmarks/results/attention.json.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.errors import InputError
from alignjax.model.attention import kernel
from alignjax.model.attention.attention import attention
from alignjax.model.attention.form import Form, Segments
from alignjax.model.huggingface.catalogue import MODELS
from benchmarks import result
from benchmarks.step_time import seconds_of

IMPLEMENTATIONS = ("xla", "cudnn", "splash")  # the first is what the others are compared with
TOKENS, LENGTHS, TEXTS = 16_384, (2048, 8192), (1, 2)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--rounds", type=int, default=20, help="times that each is run")
  rounds = parser.parse_args().rounds
  cases = [measure(length, texts, rounds) for length in LENGTHS for texts in TEXTS]
  print(result.write("attention", {"model": "llama-3.1-8b", "dtype": "bfloat16", "tokens": TOKENS, "cases": cases}))


def measure(length: int, texts: int, rounds: int) -> dict[str, Any]:
  """Of rows of so many tokens that hold so many texts each: what every implementation takes."""
  given, segments = inputs(length, texts)
  found, expected = {}, None
  for name in IMPLEMENTATIONS:
    if name == "splash" and kernel.platform() != "tpu":
      found[name] = {"left_out": "it is interpreted outside of TPUs"}
      continue
    try:
      compiled = jax.jit(both(name, segments)).lower(*given).compile()
    except InputError as error:
      found[name] = {"left_out": str(error)}
      continue
    results = jax.block_until_ready(compiled(*given))
    run = lambda: jax.block_until_ready(compiled(*given))  # noqa: B023
    seconds = [seconds_of(run) for _ in range(rounds)]
    memory = compiled.memory_analysis()
    found[name] = {"seconds": statistics.median(seconds), "temporary_bytes": memory.temp_size_in_bytes}
    if expected is None:
      expected = results
    else:
      found[name]["difference"] = difference(results, expected)
    print(length, texts, name, found[name])
  return {"row_length": length, "texts": texts, **found}


def inputs(length: int, texts: int) -> tuple[list[jax.Array], Segments]:
  """(q, k, v, the gradient of the output) and the segments; a text ends a few tokens before the next."""
  c, rows = MODELS["llama-3.1-8b"], TOKENS // length
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, heads: jax.random.normal(key, (rows, length, heads, c.head_dim), jnp.bfloat16)
  given = [draw(key, heads) for key, heads in zip(keys, (c.heads, c.kv_heads, c.kv_heads, c.heads), strict=True)]
  column = jnp.arange(length)
  each = length // texts
  ids = jnp.where(column % each < each - 100, 1 + column // each, 0)
  return given, Segments(jnp.broadcast_to(ids, (rows, length)), texts)


def both(implementation: str, segments: Segments) -> Callable[..., tuple[jax.Array, ...]]:
  """(q, k, v, gradient of the output) -> the output and the gradients of q, k and v, 0 on padding."""
  form = Form(MODELS["llama-3.1-8b"].head_dim ** -0.5)
  counts = (segments.ids > 0)[..., None, None]

  def run(q, k, v, d_out):
    attend = lambda q, k, v: jnp.where(counts, attention(implementation, form, q, k, v, segments), 0)
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)

  return run


def difference(results: tuple[jax.Array, ...], expected: tuple[jax.Array, ...]) -> float:
  """The largest of any array, over the largest number of that array."""
  wide = lambda x: x.astype(jnp.float32)
  pairs = zip(results, expected, strict=True)
  return max(float(jnp.max(jnp.abs(wide(x) - wide(y))) / jnp.max(jnp.abs(wide(y)))) for x, y in pairs)


if __name__ == "__main__":
  main()
