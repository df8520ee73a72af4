"""The sizes and options of the decoder."""

import dataclasses

from alignjax.errors import InputError
from alignjax.system import ranges
from alignjax.system.ranges import Count, Finite, NonNegative, Positive, Whole

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
HABITS = ("dtype", "param_dtype", "remat", "attention", "score_heads")  # the run's choice, whatever weights it loads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder: RMS norms, rotary positions, grouped-query attention, a gated feed-forward, and the options in which
  families of models differ (model/huggingface/families.py sets these from a Hugging Face config).

  The defaults are those of a toy; every config file sets its own.
  """

  vocab: Whole = 0  # V; 0 takes the tokenizer's
  layers: Count = 4  # L
  embed: Count = 128  # D
  heads: Count = 4  # N, query heads
  kv_heads: Count = 2  # K, key/value heads; N is a multiple
  head_dim: Count = 32  # H
  mlp: Count = 384  # F
  rope_theta: Positive = 10_000.0  # base of the rotary frequencies
  rope_scaling: str = "none"  # how these are stretched for longer rows: "none", "linear", "llama3"
  rope_factor: Positive = 1.0  # by how much
  rope_low_factor: Positive = 1.0  # llama3: wavelengths above original / low are stretched whole,
  rope_high_factor: Positive = 4.0  # those below original / high not at all
  rope_original: Count = 8192  # tokens of the rows before
  rope_sliding_theta: NonNegative = 0.0  # base in sliding layers, which are not stretched; 0: as in the others
  pattern: str = "f"  # which layers see the whole row ("f") or slide ("s"), repeated over all: "sf" is Gemma 2's
  window: Whole = 0  # how many tokens, its own included, a token sees in a sliding layer
  attention_scale: NonNegative = 0.0  # of queries times keys; 0: head_dim ** -0.5
  attention_softcap: NonNegative = 0.0  # squashes those scores into (-cap, cap); 0: not
  final_softcap: NonNegative = 0.0  # squashes the logits so; 0: not
  biases: str = ""  # projections that have a bias, separated by commas, of q, k, v, o, gate, up, down
  query_key_norm: bool = False  # whether each head's query and key is normed
  post_norms: bool = False  # whether the output of attention and feed-forward is normed too
  norm_eps: Positive = 1e-6  # of RMSNorm
  norm_offset: Finite = 0.0  # what is added to its scales: 1 in Gemma
  activation: str = "silu"  # of the feed-forward's gate: "silu", or "gelu" (by tanh)
  embed_scale: Positive = 1.0  # what embeddings are multiplied by
  tied: bool = True  # the unembedding is the embedding
  head: str = "none"  # "scalar" adds the score head of reward and value models
  score_heads: Count = 1  # of the score: several are an ensemble, trained apart on one trunk
  max_positions: Whole = 0  # tokens of the longest row that the model was made for; 0: unknown
  dtype: str = "float32"  # of activations and matmul operands; sums are float32 always
  param_dtype: str = "float32"  # of the stored weights; those in bfloat16 are rounded stochastically when trained
  remat: str = "none"  # what the backward pass recomputes: "none", "dots" (all but products with weights), "full",
  # "offload" ("full" with the layers' inputs kept in the host's memory)
  attention: str = "auto"  # implementation, see model/attention/attention.py
  module: str = ""  # "module:function" that makes the model from this config, in place of the decoder: docs/flax.md

  def __post_init__(self):
    ranges.check_record("model", self)
    options = {
      "head": ("none", "scalar"),
      "dtype": ("float32", "bfloat16", "float64"),
      "param_dtype": ("float32", "bfloat16", "float64"),
      "remat": ("none", "dots", "full", "offload"),
      "attention": ("auto", "splash", "cudnn", "xla"),
      "rope_scaling": ("none", "linear", "llama3"),
      "activation": ("silu", "gelu"),
    }
    for field, allowed in options.items():
      if getattr(self, field) not in allowed:
        raise InputError(f"model.{field}={getattr(self, field)!r}: use one of {', '.join(allowed)}")
    if self.heads % self.kv_heads:
      raise InputError(f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}; change one")
    if unknown := set(biased(self)) - set(PROJECTIONS):
      raise InputError(f"model.biases={self.biases!r}: {min(unknown)!r} is none of {', '.join(PROJECTIONS)}")
    if not self.pattern or set(self.pattern) - {"f", "s"}:
      raise InputError(f"model.pattern={self.pattern!r}: use a letter for each layer, f (full) or s (sliding)")
    if ("s" in self.pattern) != (self.window > 0):
      raise InputError(f"model.window={self.window}, model.pattern={self.pattern!r}: sliding layers need a window >= 1")
    if self.head_dim % 2:
      raise InputError(f"model.head_dim={self.head_dim}: rotary positions need an even number")

  def computed_as(self, own: "ModelConfig") -> "ModelConfig":
    """Returns these sizes and options with the `HABITS` of `own`: a run decides on these, whatever weights it loads.

    The module is that of `own` too, if it names one; its parameters are checked when they are loaded.
    """
    module = own.module or self.module
    return dataclasses.replace(self, module=module, **{name: getattr(own, name) for name in HABITS})


def biased(c: ModelConfig) -> tuple[str, ...]:
  """Returns the names of the projections that have a bias, in the order of `c.biases`."""
  return tuple(filter(None, c.biases.split(",")))


def sliding(c: ModelConfig) -> tuple[bool, ...]:
  """Returns a bool for each layer: True if it slides."""
  return tuple(c.pattern[layer % len(c.pattern)] == "s" for layer in range(c.layers))
