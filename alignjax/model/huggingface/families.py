"""Families of models on Hugging Face: their config.json as a ModelConfig and back, and what they call their tensors.

Both generations of config.json are read: that of transformers 5 (`rope_parameters`, `layer_types`, `dtype`) and the one
before. One decoder computes them all; a family is a choice among its options.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignjax.errors import InputError
from alignjax.model.config import ModelConfig, biased, sliding
from alignjax.model.huggingface import config_field
from alignjax.system.hub import shown

FAMILIES = {  # model_type -> the first half of the names of its classes
  "llama": "Llama",
  "mistral": "Mistral",
  "qwen2": "Qwen2",
  "qwen3": "Qwen3",
  "gemma2": "Gemma2",
  "gemma3_text": "Gemma3",
}
ENSEMBLE = "REWARD_"  # what the labels of an exported ensemble begin with, and its heads' numbers follow
SCORING = "ForSequenceClassification"
FULL, SLIDING = "full_attention", "sliding_attention"
GELU = ("gelu_pytorch_tanh", "gelu_new")  # two names of the one with tanh
# What would change the numbers, were it not as here.
NOT_HERE = {
  "partial_rotary_factor": (None, 1.0),
  "pretraining_tp": (None, 1),
  "use_bidirectional_attention": (None, False),
}

# Our names of tensors and theirs; of a layer's, what follows "model.layers.N.".
TENSORS = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "unembed": "lm_head.weight"}
SCORE = "score.weight"
PROJECTIONS = {
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "o": "self_attn.o_proj",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}
MODULES = PROJECTIONS | {
  "q_norm": "self_attn.q_norm",
  "k_norm": "self_attn.k_norm",
  "attention_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
}
# With norms behind both, the name of the one before the feed-forward passes to the one behind attention.
POST_NORM_MODULES = {
  "attention_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}


def tensor_name(config: ModelConfig, path: Sequence[str]) -> str:
  """Their name of the weight at a path of ours; with "{layer}" in it where the layers are stacked."""
  if path[0] != "layers":
    return SCORE if path[0] == "score" else TENSORS[path[0]]
  modules = MODULES | (POST_NORM_MODULES if config.post_norms else {})
  name, bias = path[1].removesuffix("_bias"), path[1].endswith("_bias")
  return f"model.layers.{{layer}}.{modules[name]}.{'bias' if bias else 'weight'}"


def model_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
  """The ModelConfig of a parsed config.json; dtypes, remat and the implementation of attention are our defaults.

  Raises:
    InputError: another family, a member of one that computes something else than the decoder can, or a field that holds
      what it may not.
  """
  family = raw.get("model_type")
  if not isinstance(family, str) or family not in FAMILIES:
    raise InputError(f"{where}: model_type={shown(family)} is not known; it is one of {', '.join(FAMILIES)}")
  for key, allowed in NOT_HERE.items():
    if raw.get(key) not in allowed:
      raise InputError(f"{where}: {key}={shown(raw[key])} is not supported; use a model with {key}={allowed[-1]!r}")
  config_field.check(raw, where, (FULL, SLIDING))
  try:
    fields = _fields(raw, family, where)
  except KeyError as error:
    raise InputError(f"{where}: has no {error}; is it the whole config.json of a {family} model?") from error
  try:
    return ModelConfig(**fields)
  except InputError as error:  # sizes that do not go together
    raise InputError(f"{where}: {error}") from error


def _fields(raw: Mapping[str, Any], family: str, where: str) -> dict[str, Any]:
  gemma, layers, heads = family.startswith("gemma"), raw["num_hidden_layers"], raw["num_attention_heads"]
  scoring = next(iter(raw.get("architectures") or [""])).endswith(SCORING)
  pattern = _pattern(_layer_types(raw, family, where))
  return dict(
    vocab=raw["vocab_size"],
    layers=layers,
    embed=raw["hidden_size"],
    heads=heads,
    kv_heads=raw.get("num_key_value_heads") or heads,
    head_dim=raw.get("head_dim") or _head_dim(raw["hidden_size"], heads, where),
    mlp=raw["intermediate_size"],
    **_rope(raw, family, where),
    pattern=pattern,
    window=raw["sliding_window"] or 0 if "s" in pattern else 0,
    attention_scale=float(raw["query_pre_attn_scalar"]) ** -0.5 if gemma else 0.0,
    attention_softcap=float(raw.get("attn_logit_softcapping") or 0) if gemma else 0.0,
    final_softcap=float(raw.get("final_logit_softcapping") or 0) if gemma else 0.0,
    biases=_biases(raw, family),
    query_key_norm=family in ("qwen3", "gemma3_text"),
    post_norms=gemma,
    norm_eps=raw["rms_norm_eps"],
    norm_offset=1.0 if gemma else 0.0,
    activation=_activation(raw, gemma, where),
    embed_scale=math.sqrt(raw["hidden_size"]) if gemma else 1.0,
    tied=True if scoring else bool(raw.get("tie_word_embeddings", gemma)),  # a score needs no unembedding
    head="scalar" if scoring else "none",
    score_heads=_score_heads(raw, where) if scoring else 1,
    max_positions=raw.get("max_position_embeddings") or 0,
  )


def _head_dim(embed: int, heads: int, where: str) -> int:
  if embed % heads:
    raise InputError(
      f"{where}: num_attention_heads is {heads}, which does not divide hidden_size, {embed}; set head_dim"
    )
  return embed // heads


def _score_heads(raw: Mapping[str, Any], where: str) -> int:
  """One, or as many as an ensemble has that was exported from here; the labels of a classifier are no such heads."""
  labels = raw.get("id2label", {"0": "", "1": ""}).values()  # transformers' own default has two
  if len(labels) > 1 and not all(label.startswith(ENSEMBLE) for label in labels):
    raise InputError(f"{where}: id2label has {len(labels)} classes; a reward model has one")
  return len(labels)


def _layer_types(raw: Mapping[str, Any], family: str, where: str) -> list[str]:
  """Of each layer; what transformers before 5 left to the family is spelt out."""
  layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
  may_slide = window is not None and (not family.startswith("qwen") or raw.get("use_sliding_window", False))
  slides = {
    "mistral": lambda layer: may_slide,
    "qwen2": lambda layer: may_slide and layer >= raw["max_window_layers"],
    "qwen3": lambda layer: may_slide and layer >= raw["max_window_layers"],
    "gemma2": lambda layer: layer % 2 == 0,
    "gemma3_text": lambda layer: (layer + 1) % raw.get("sliding_window_pattern", 6) != 0,
  }.get(family, lambda layer: False)
  types = raw.get("layer_types")
  if types is None or family in ("llama", "mistral"):  # transformers reads none of these two's
    return [SLIDING if slides(layer) else FULL for layer in range(layers)]
  if unknown := set(types) - {FULL, SLIDING}:
    raise InputError(f"{where}: layer_types has {shown(min(unknown))}; supported are {FULL} and {SLIDING}")
  if len(types) != layers or (SLIDING in types and not may_slide):
    raise InputError(f"{where}: layer_types does not fit its num_hidden_layers, sliding_window or use_sliding_window")
  return types


def _pattern(types: Sequence[str]) -> str:
  """The shortest `ModelConfig.pattern` of these layers."""
  letters = "".join("s" if kind == SLIDING else "f" for kind in types)
  repeated = lambda period: (letters[:period] * len(letters))[: len(letters)]
  return next(letters[:period] for period in range(1, len(letters) + 1) if repeated(period) == letters)


def _rope(raw: Mapping[str, Any], family: str, where: str) -> dict[str, Any]:
  """The fields of the rotary positions."""
  base, base_of_sliding = (1e6, 1e4) if family == "gemma3_text" else (1e4, 0.0)  # where nothing is said
  rope = raw.get("rope_parameters")
  if rope is None:
    stretch = dict(raw.get("rope_scaling") or {})
    rope = {"rope_theta": raw.get("rope_theta", base), "rope_type": stretch.pop("type", "default")} | stretch
  local = raw.get("rope_local_base_freq", base_of_sliding)
  if FULL in rope:
    of_sliding, rope = rope.get(SLIDING, {}), rope[FULL]
    local = of_sliding.get("rope_theta", base_of_sliding)
    if of_sliding.get("rope_type", "default") != "default":
      raise InputError(f"{where}: rotary positions of sliding layers that are stretched are not supported")
  kind, theta = rope.get("rope_type", "default"), float(rope.get("rope_theta", base))
  if kind == "default":
    return {"rope_theta": theta, "rope_sliding_theta": float(local)}
  if kind not in ("linear", "llama3"):
    raise InputError(f"{where}: rope_type={shown(kind)} is not supported; it is one of default, linear, llama3")
  found = {"rope_theta": theta, "rope_sliding_theta": float(local)}
  found |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
  if kind == "llama3":
    found["rope_low_factor"], found["rope_high_factor"] = (
      float(rope["low_freq_factor"]),
      float(rope["high_freq_factor"]),
    )
    found["rope_original"] = rope["original_max_position_embeddings"]
    if not found["rope_low_factor"] < found["rope_high_factor"]:
      raise InputError(
        f"{where}: low_freq_factor is {rope['low_freq_factor']} and high_freq_factor {rope['high_freq_factor']}; the "
        "first must be smaller"
      )
  return found


def _biases(raw: Mapping[str, Any], family: str) -> str:
  if family == "qwen2":
    return "q,k,v"
  attention = "q,k,v,o" if raw.get("attention_bias") and family != "mistral" else ""
  return ",".join(filter(None, (attention, "gate,up,down" if raw.get("mlp_bias") and family == "llama" else "")))


def _activation(raw: Mapping[str, Any], gemma: bool, where: str) -> str:
  name = (raw.get("hidden_activation") or GELU[0]) if gemma else raw.get("hidden_act", "silu")
  if name == "silu":
    return "silu"
  if name not in GELU:
    raise InputError(f"{where}: the activation {shown(name)} is not supported; it is one of silu, {', '.join(GELU)}")
  return "gelu"


def to_hugging_face(config: ModelConfig, special: Mapping[str, int], dtype: str) -> dict[str, Any]:
  """The config.json of a model, in words that transformers 4 and 5 read.

  Args:
    config: with its vocabulary.
    special: "bos_token_id", "eos_token_id", "pad_token_id".
    dtype: of the tensors beside it.

  Raises:
    InputError: no family computes what this model does.
  """
  family = _family(config)
  scoring, gemma = config.head == "scalar", family.startswith("gemma")
  types = [SLIDING if slides else FULL for slides in sliding(config)]
  raw = {
    "architectures": [FAMILIES[family] + (SCORING if scoring else "ForCausalLM")],
    "model_type": family,
    "vocab_size": config.vocab,
    "num_hidden_layers": config.layers,
    "hidden_size": config.embed,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.mlp,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tied,
    "attention_bias": "o" in biased(config),
    "mlp_bias": "gate" in biased(config),
    "hidden_act": "silu",
    "sliding_window": config.window or None,
    "layer_types": types,
    "max_position_embeddings": config.max_positions or 32_768,
    "rope_theta": config.rope_theta,
    "rope_scaling": _rope_scaling(config),
    "torch_dtype": dtype,
    **special,
  }
  if family.startswith("qwen"):
    raw |= {"use_sliding_window": bool(config.window), "max_window_layers": types.count(FULL)}
  if gemma:
    raw |= {"hidden_activation": GELU[0], "query_pre_attn_scalar": round(_attention_scale(config) ** -2)}
    raw |= {"attn_logit_softcapping": config.attention_softcap or None}
    raw |= {"final_logit_softcapping": config.final_softcap or None}
  if family == "gemma3_text":
    raw["rope_local_base_freq"] = config.rope_sliding_theta or config.rope_theta
  if scoring:
    raw["id2label"] = {str(head): f"{ENSEMBLE}{head}" for head in range(config.score_heads)}
  _check_same(config, raw)
  return raw


def _attention_scale(config: ModelConfig) -> float:
  return config.attention_scale or config.head_dim**-0.5


def _family(config: ModelConfig) -> str:
  """The simplest family that has the model's options; `_check_same` finds those that none has."""
  if config.norm_offset:
    return "gemma3_text" if config.query_key_norm else "gemma2"
  if config.query_key_norm:
    return "qwen3"
  if biased(config) == ("q", "k", "v"):
    return "qwen2"
  return "mistral" if config.pattern == "s" else "llama"


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
  if config.rope_scaling == "none":
    return None
  stretch = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
  if config.rope_scaling == "llama3":
    stretch |= {"low_freq_factor": config.rope_low_factor, "high_freq_factor": config.rope_high_factor}
    stretch |= {"original_max_position_embeddings": config.rope_original}
  return stretch


def _check_same(config: ModelConfig, raw: Mapping[str, Any]) -> None:
  """Raises InputError unless config.json reads back as the model that it describes."""
  mine, theirs = _meaning(config), _meaning(model_config(raw, "config.json"))
  if other := [field for field in mine if mine[field] != theirs[field]]:
    raise InputError(
      f"model.{other[0]}={getattr(config, other[0])!r}: no family of transformers has such a model, the nearest being "
      f"{raw['model_type']}; it can be kept as a run, not exported"
    )


def _meaning(config: ModelConfig) -> dict[str, Any]:
  """The fields that change a number, each with one value for what is the same."""
  meaning = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  for field in ("dtype", "param_dtype", "remat", "attention", "max_positions"):
    del meaning[field]
  meaning |= {"pattern": sliding(config), "biases": {*biased(config)}}
  meaning["attention_scale"] = _attention_scale(config)
  if config.head == "scalar":
    meaning["tied"] = True
  if config.rope_scaling != "llama3":
    meaning |= dict.fromkeys(("rope_low_factor", "rope_high_factor", "rope_original"))
  if config.rope_scaling == "none":
    meaning |= {"rope_factor": 1.0, "rope_sliding_theta": config.rope_sliding_theta or config.rope_theta}
  if "s" not in config.pattern:
    meaning["rope_sliding_theta"] = config.rope_theta
  return meaning
