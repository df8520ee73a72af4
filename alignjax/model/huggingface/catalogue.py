"""Published models by name: their sizes, for a run that is planned before any weight is downloaded.

Source: the config.json of each on Hugging Face; a test compares the parameter counts with the published ones.
"""

import difflib
from typing import Any

from alignjax.errors import InputError
from alignjax.model.config import ModelConfig


def _llama(**sizes: Any) -> ModelConfig:
  stretch: dict[str, Any] = dict(
    rope_theta=500_000.0, rope_scaling="llama3", rope_factor=8.0, norm_eps=1e-5, max_positions=131_072
  )
  return ModelConfig(**(stretch | dict(vocab=128_256, kv_heads=8, head_dim=128, tied=False) | sizes))


def _qwen3(**sizes) -> ModelConfig:
  fixed = dict(vocab=151_936, kv_heads=8, head_dim=128, rope_theta=1e6, query_key_norm=True, max_positions=40_960)
  return ModelConfig(**(fixed | sizes))


def _gemma(**sizes) -> ModelConfig:
  fixed = dict(norm_offset=1.0, post_norms=True, activation="gelu", embed_scale=sizes["embed"] ** 0.5, tied=True)
  return ModelConfig(**(fixed | sizes))


def _gemma2(**sizes) -> ModelConfig:
  caps = dict(attention_softcap=50.0, final_softcap=30.0, pattern="sf", window=4096, max_positions=8192)
  return _gemma(**(dict(vocab=256_000, attention_scale=256**-0.5) | caps | sizes))


def _gemma3(**sizes) -> ModelConfig:
  slides = dict(pattern="sssssf", window=1024, rope_theta=1e6, rope_sliding_theta=10_000.0)
  stretch = dict(rope_scaling="linear", rope_factor=8.0, max_positions=131_072)
  fixed = dict(vocab=262_208, head_dim=256, attention_scale=256**-0.5, query_key_norm=True)
  return _gemma(**(fixed | slides | stretch | sizes))


MODELS = {
  "llama-3.2-1b": _llama(layers=16, embed=2048, heads=32, head_dim=64, mlp=8192, tied=True, rope_factor=32.0),
  "llama-3.2-3b": _llama(layers=28, embed=3072, heads=24, mlp=8192, tied=True, rope_factor=32.0),
  "llama-3.1-8b": _llama(layers=32, embed=4096, heads=32, mlp=14_336),
  "llama-3.1-70b": _llama(layers=80, embed=8192, heads=64, mlp=28_672),
  "qwen3-0.6b": _qwen3(layers=28, embed=1024, heads=16, mlp=3072, tied=True),
  "qwen3-1.7b": _qwen3(layers=28, embed=2048, heads=16, mlp=6144, tied=True),
  "qwen3-4b": _qwen3(layers=36, embed=2560, heads=32, mlp=9728, tied=True),
  "qwen3-8b": _qwen3(layers=36, embed=4096, heads=32, mlp=12_288, tied=False),
  "qwen3-14b": _qwen3(layers=40, embed=5120, heads=40, mlp=17_408, tied=False),
  "qwen3-32b": _qwen3(layers=64, embed=5120, heads=64, mlp=25_600, tied=False),
  "gemma-2-2b": _gemma2(layers=26, embed=2304, heads=8, kv_heads=4, head_dim=256, mlp=9216),
  "gemma-2-9b": _gemma2(layers=42, embed=3584, heads=16, kv_heads=8, head_dim=256, mlp=14_336),
  "gemma-2-27b": _gemma2(
    layers=46, embed=4608, heads=32, kv_heads=16, head_dim=128, mlp=36_864, attention_scale=144**-0.5
  ),
  "gemma-3-1b": _gemma3(
    vocab=262_144,
    layers=26,
    embed=1152,
    heads=4,
    kv_heads=1,
    mlp=6912,
    window=512,
    rope_scaling="none",
    rope_factor=1.0,
    max_positions=32_768,
  ),
  "gemma-3-4b": _gemma3(layers=34, embed=2560, heads=8, kv_heads=4, mlp=10_240),  # without the part that sees images
  "gemma-3-12b": _gemma3(layers=48, embed=3840, heads=16, kv_heads=8, mlp=15_360),
  "gemma-3-27b": _gemma3(
    layers=62, embed=5376, heads=32, kv_heads=16, head_dim=128, mlp=21_504, attention_scale=168**-0.5
  ),
  "mistral-7b": ModelConfig(  # v0.3, which slides no longer
    vocab=32_768,
    layers=32,
    embed=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp=14_336,
    rope_theta=1e6,
    norm_eps=1e-5,
    tied=False,
    max_positions=32_768,
  ),
}


def sizes(name: str, own: ModelConfig) -> ModelConfig:
  """Returns the config of a published model, computed as `own` is (`ModelConfig.computed_as`).

  Args:
    name: a key of `MODELS`.
    own: the config of the run, whose sizes are not read.

  Raises:
    InputError: an unknown name.
  """
  if name not in MODELS:
    hint = ""
    if nearest := difflib.get_close_matches(name, MODELS, n=1):
      hint = f"; the nearest is {nearest[0]}"
    raise InputError(f"--model={name}: use one of {', '.join(MODELS)}{hint}")
  return MODELS[name].computed_as(own)
