"""Families of models on Hugging Face: their config.json as a ModelConfig and back, and the names of their tensors.

Both generations of config.json are read: that of transformers 5 (`rope_parameters`, `layer_types`, `dtype`) and the one
before. One decoder computes them all; a family is a choice among its options.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
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
FULL = "full_attention"
SLIDING = "sliding_attention"
GELU = ("gelu_pytorch_tanh", "gelu_new")  # two names of the approximation by tanh
# Options that the decoder does not have, and the values that mean that they are off.
UNSUPPORTED = {
  "partial_rotary_factor": (None, 1.0),
  "pretraining_tp": (None, 1),
  "use_bidirectional_attention": (None, False),
}

# Our names of tensors and theirs; for those of a layer, the part after "model.layers.N.".
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
# If there are norms after both, the name of the one before the feed-forward is used for the one after attention.
POST_NORM_MODULES = {
  "attention_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}


def tensor_name(config: ModelConfig, path: Sequence[str]) -> str:
  """Returns Hugging Face's name of the weight at a path of ours; with "{layer}" in it if the layers are stacked.

  Args:
    config: its post_norms is read: with them, the norms have other names.
    path: the keys of the weight in the model's table, such as ("layers", "q").
  """
  if path[0] == "score":
    return SCORE
  if path[0] != "layers":
    return TENSORS[path[0]]
  modules = MODULES
  if config.post_norms:
    modules = MODULES | POST_NORM_MODULES
  part = "bias" if path[1].endswith("_bias") else "weight"
  return f"model.layers.{{layer}}.{modules[path[1].removesuffix('_bias')]}.{part}"


def model_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
  """Converts a parsed config.json to a ModelConfig; dtypes, remat and the implementation of attention are our defaults.

  Args:
    raw: its object.
    where: its path, for error messages.

  Raises:
    InputError: the family is unknown, the decoder does not support one of the options, or a field is missing or has an
      invalid value.
  """
  family = raw.get("model_type")
  if not isinstance(family, str) or family not in FAMILIES:
    raise InputError(f"{where}: model_type={shown(family)} is not known; it is one of {', '.join(FAMILIES)}")
  for key, allowed in UNSUPPORTED.items():
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
  """Returns the fields of the ModelConfig; KeyError if config.json lacks one that a family has."""
  gemma = family.startswith("gemma")
  layers = raw["num_hidden_layers"]
  heads = raw["num_attention_heads"]
  pattern = _pattern(_layer_types(raw, family, where))
  fields = dict(
    vocab=raw["vocab_size"],
    layers=layers,
    embed=raw["hidden_size"],
    heads=heads,
    kv_heads=raw.get("num_key_value_heads") or heads,
    head_dim=raw.get("head_dim") or _head_dim(raw["hidden_size"], heads, where),
    mlp=raw["intermediate_size"],
    pattern=pattern,
    biases=_biases(raw, family),
    query_key_norm=family in ("qwen3", "gemma3_text"),
    norm_eps=raw["rms_norm_eps"],
    activation=_activation(raw, gemma, where),
    tied=bool(raw.get("tie_word_embeddings", gemma)),
    max_positions=raw.get("max_position_embeddings") or 0,
  )
  fields |= _rope(raw, family, where)
  if "s" in pattern:
    fields["window"] = raw["sliding_window"] or 0
  if gemma:
    fields |= _gemma_fields(raw)
  if next(iter(raw.get("architectures") or [""])).endswith(SCORING):
    # A score needs no unembedding.
    fields |= {"tied": True, "head": "scalar", "score_heads": _score_heads(raw, where)}
  return fields


def _gemma_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields in which the Gemma families differ from the others."""
  return dict(
    attention_scale=float(raw["query_pre_attn_scalar"]) ** -0.5,
    attention_softcap=float(raw.get("attn_logit_softcapping") or 0),
    final_softcap=float(raw.get("final_logit_softcapping") or 0),
    post_norms=True,
    norm_offset=1.0,
    embed_scale=math.sqrt(raw["hidden_size"]),
  )


def _head_dim(embed: int, heads: int, where: str) -> int:
  if embed % heads:
    raise InputError(
      f"{where}: num_attention_heads is {heads}, which does not divide hidden_size, {embed}; set head_dim"
    )
  return embed // heads


def _score_heads(raw: Mapping[str, Any], where: str) -> int:
  """Counts the score heads: one, or those of an ensemble that was exported here. A classifier is not supported."""
  labels = raw.get("id2label", {"0": "", "1": ""}).values()  # transformers' own default has two
  if len(labels) > 1 and not all(label.startswith(ENSEMBLE) for label in labels):
    raise InputError(f"{where}: id2label has {len(labels)} classes; a reward model has one")
  return len(labels)


def _layer_types(raw: Mapping[str, Any], family: str, where: str) -> list[str]:
  """Returns the type of each layer, FULL or SLIDING.

  Transformers before 5 leaves them to the family if `layer_types` is missing; that of llama and mistral is never read.
  """
  layers = raw["num_hidden_layers"]
  types = raw.get("layer_types")
  may_slide = raw.get("sliding_window") is not None
  if family.startswith("qwen"):
    may_slide = may_slide and raw.get("use_sliding_window", False)
  if types is None or family in ("llama", "mistral"):
    sliding_layers = _default_sliding_layers(raw, family, may_slide)
    return [SLIDING if layer in sliding_layers else FULL for layer in range(layers)]
  if unknown := set(types) - {FULL, SLIDING}:
    raise InputError(f"{where}: layer_types has {shown(min(unknown))}; supported are {FULL} and {SLIDING}")
  if len(types) != layers or (SLIDING in types and not may_slide):
    raise InputError(f"{where}: layer_types does not fit its num_hidden_layers, sliding_window or use_sliding_window")
  return types


def _default_sliding_layers(raw: Mapping[str, Any], family: str, may_slide: bool) -> Collection[int]:
  """Returns the numbers of the layers that slide in a family, if config.json does not list the types."""
  layers = range(raw["num_hidden_layers"])
  if family == "gemma2":
    return layers[::2]
  if family == "gemma3_text":
    period = raw.get("sliding_window_pattern", 6)
    return [layer for layer in layers if (layer + 1) % period != 0]
  if family == "mistral" and may_slide:
    return layers
  if family.startswith("qwen") and may_slide:
    return layers[raw["max_window_layers"] :]
  return ()


def _pattern(types: Sequence[str]) -> str:
  """Returns the shortest `ModelConfig.pattern` of these layers."""
  letters = "".join("s" if kind == SLIDING else "f" for kind in types)
  prefixes = (letters[:length] for length in range(1, len(letters) + 1))
  return next(prefix for prefix in prefixes if (prefix * len(letters)).startswith(letters))


def _rope(raw: Mapping[str, Any], family: str, where: str) -> dict[str, Any]:
  """Returns the fields of the rotary positions."""
  default_theta = 1e4
  default_sliding_theta = 0.0
  if family == "gemma3_text":
    default_theta = 1e6
    default_sliding_theta = 1e4
  rope = raw.get("rope_parameters")
  if rope is None:
    stretch = dict(raw.get("rope_scaling") or {})
    rope = {"rope_theta": raw.get("rope_theta", default_theta), "rope_type": stretch.pop("type", "default")} | stretch
  sliding_theta = raw.get("rope_local_base_freq", default_sliding_theta)
  if FULL in rope:
    sliding_rope = rope.get(SLIDING, {})
    rope = rope[FULL]
    sliding_theta = sliding_rope.get("rope_theta", default_sliding_theta)
    if sliding_rope.get("rope_type", "default") != "default":
      raise InputError(f"{where}: rotary positions of sliding layers that are stretched are not supported")
  fields = {"rope_theta": float(rope.get("rope_theta", default_theta)), "rope_sliding_theta": float(sliding_theta)}
  kind = rope.get("rope_type", "default")
  if kind == "default":
    return fields
  if kind not in ("linear", "llama3"):
    raise InputError(f"{where}: rope_type={shown(kind)} is not supported; it is one of default, linear, llama3")
  fields |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
  if kind == "llama3":
    fields["rope_low_factor"] = float(rope["low_freq_factor"])
    fields["rope_high_factor"] = float(rope["high_freq_factor"])
    fields["rope_original"] = rope["original_max_position_embeddings"]
    if not fields["rope_low_factor"] < fields["rope_high_factor"]:
      raise InputError(
        f"{where}: low_freq_factor is {rope['low_freq_factor']} and high_freq_factor {rope['high_freq_factor']}; the "
        "first must be smaller"
      )
  return fields


def _biases(raw: Mapping[str, Any], family: str) -> str:
  """Returns the projections that have a bias, as `ModelConfig.biases`."""
  if family == "qwen2":
    return "q,k,v"
  biases = []
  if raw.get("attention_bias") and family != "mistral":
    biases.append("q,k,v,o")
  if raw.get("mlp_bias") and family == "llama":
    biases.append("gate,up,down")
  return ",".join(biases)


def _activation(raw: Mapping[str, Any], gemma: bool, where: str) -> str:
  """Returns the activation, as `ModelConfig.activation`."""
  name = raw.get("hidden_act", "silu")
  if gemma:
    name = raw.get("hidden_activation") or GELU[0]
  if name == "silu":
    return "silu"
  if name not in GELU:
    raise InputError(f"{where}: the activation {shown(name)} is not supported; it is one of silu, {', '.join(GELU)}")
  return "gelu"


def to_hugging_face(config: ModelConfig, special: Mapping[str, int], dtype: str) -> dict[str, Any]:
  """Converts a ModelConfig to the object of config.json, in the fields that transformers 4 and 5 read.

  Args:
    config: with its vocabulary.
    special: "bos_token_id", "eos_token_id", "pad_token_id".
    dtype: of the tensors that are exported with it.

  Raises:
    InputError: no family has the options of this model.
  """
  family = _family(config)
  scoring = config.head == "scalar"
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
  if family.startswith("gemma"):
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
  """Returns the simplest family that has the model's options; `_check_same` finds options that no family has."""
  if config.norm_offset:
    return "gemma3_text" if config.query_key_norm else "gemma2"
  if config.query_key_norm:
    return "qwen3"
  if biased(config) == ("q", "k", "v"):
    return "qwen2"
  if config.pattern == "s":
    return "mistral"
  return "llama"


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
  """Returns the field of this name in config.json."""
  if config.rope_scaling == "none":
    return None
  stretch = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
  if config.rope_scaling == "llama3":
    stretch |= {"low_freq_factor": config.rope_low_factor, "high_freq_factor": config.rope_high_factor}
    stretch |= {"original_max_position_embeddings": config.rope_original}
  return stretch


def _check_same(config: ModelConfig, raw: Mapping[str, Any]) -> None:
  """Raises InputError unless config.json reads back as the model that it describes."""
  ours = _meaning(config)
  theirs = _meaning(model_config(raw, "config.json"))
  if different := [field for field in ours if ours[field] != theirs[field]]:
    raise InputError(
      f"model.{different[0]}={getattr(config, different[0])!r}: no family of transformers has such a model, the "
      f"nearest being {raw['model_type']}; it can be kept as a run, not exported"
    )


def _meaning(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that change a number; equivalent values are mapped to one."""
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
