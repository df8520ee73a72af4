"""The sizes and options of the decoder."""

import dataclasses

from alignjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder: pre-norm, rotary positions, grouped-query attention, SwiGLU.

  The defaults are a toy's; every config file spells its own.
  """

  vocab: int = 0  # V; 0 takes the tokenizer's
  layers: int = 4  # L
  embed: int = 128  # D
  heads: int = 4  # N, query heads
  kv_heads: int = 2  # K, key/value heads; N is a multiple
  head_dim: int = 32  # H
  mlp: int = 384  # F
  rope_theta: float = 10_000.0  # base of the rotary frequencies
  norm_eps: float = 1e-6  # of RMSNorm
  tied: bool = True  # the unembedding is the embedding
  head: str = "none"  # "scalar" adds the score head of reward and value models
  score_heads: int = 1  # of the score: several are an ensemble, trained apart on one trunk
  dtype: str = "float32"  # of activations and matmul operands; sums are float32 always
  param_dtype: str = "float32"  # of the stored weights
  remat: str = "none"  # what the backward pass recomputes: "none", "dots" (keeps matmuls), "full"
  attention: str = "auto"  # implementation, see model/attention.py
  module: str = ""  # "module:function" that makes the model from this config, in place of the decoder: docs/flax.md

  def __post_init__(self):
    options = {
      "head": ("none", "scalar"),
      "dtype": ("float32", "bfloat16", "float64"),
      "param_dtype": ("float32", "bfloat16", "float64"),
      "remat": ("none", "dots", "full"),
      "attention": ("auto", "xla"),
    }
    for field, allowed in options.items():
      if getattr(self, field) not in allowed:
        raise InputError(f"model.{field}={getattr(self, field)!r}: use one of {', '.join(allowed)}")
    for field in ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "score_heads"):
      if getattr(self, field) < 1:
        raise InputError(f"model.{field}={getattr(self, field)}: use a positive number")
    if self.heads % self.kv_heads:
      raise InputError(f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}; change one")
    if self.head_dim % 2:
      raise InputError(f"model.head_dim={self.head_dim}: rotary positions need an even number")
