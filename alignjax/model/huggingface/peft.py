"""LoRA factors in the files of Hugging Face's PEFT: adapter_model.safetensors and adapter_config.json.

PEFT has two matrices per module, lora_A [R, in] and lora_B [out, R]. Here the layers are stacked, the inputs come first
and heads have a dimension of their own: a [L, inputs.., R], b [L, R, outputs..].
"""

import json
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from safetensors.numpy import save

from alignjax.errors import InputError
from alignjax.model.huggingface import tensor_file
from alignjax.model.huggingface.families import PROJECTIONS
from alignjax.model.lora import LoraConfig
from alignjax.system import output
from alignjax.system.hub import called, read_json, shown
from alignjax.types import Params

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HEAD = "base_model.model.score.weight"  # the tensor's name in WEIGHTS


def save_adapter(directory: epath.PathLike, params: Params, config: LoraConfig, base: str = "") -> None:
  """Writes the factors of `params`, and its head if it has one, as a PEFT adapter; every process calls it.

  Args:
    directory: made if missing.
    params: with the entry "lora".
    config: of the factors; its rank, alpha and scaling are written.
    base: the name under which PEFT looks for the base model; "" leaves it to the adapter's user.
  """
  tensors = {}
  for name, pair in params["lora"]["layers"].items():
    a = _on_host(pair["a"])
    b = _on_host(pair["b"])
    for layer in range(len(a)):
      tensors[_key(layer, name, "A")] = a[layer].reshape(-1, config.rank).T
      tensors[_key(layer, name, "B")] = b[layer].reshape(config.rank, -1).T
  if "score" in params:
    tensors[HEAD] = _on_host(params["score"]).T
  if jax.process_index() != 0:
    return
  directory = epath.Path(directory).expanduser()
  # Contiguous: safetensors would write the bytes of a transposed view in their old order.
  tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
  output.write(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
  output.write(directory / CONFIG, json.dumps(_adapter_config(params, config, base), indent=2) + "\n")


def _on_host(x: jax.Array) -> np.ndarray:
  """Returns the whole array on every host."""
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _adapter_config(params: Params, config: LoraConfig, base: str) -> dict[str, Any]:
  """Returns the content of adapter_config.json."""
  has_head = "score" in params
  return {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM",
    "base_model_name_or_path": base or None,
    "r": config.rank,
    "lora_alpha": config.alpha,
    "use_rslora": config.scaling == "rslora",
    "use_dora": False,
    "target_modules": [PROJECTIONS[name].split(".")[1] for name in params["lora"]["layers"]],
    "modules_to_save": ["score"] if has_head else None,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }


def load_adapter(config: LoraConfig, abstract: Params) -> Params:
  """Loads a PEFT adapter from the folder `config.init`, to start LoRA training from it.

  Returns {"lora": ...}, and "score" if both the adapter and `abstract` have a head, on the devices and in the dtypes of
  `abstract`.

  Args:
    config: the LoRA settings that the adapter must agree with: targets, rank and scale.
    abstract: the whole model's abstract parameters, with shardings; only "lora" and "score" are read.

  Raises:
    InputError: the folder has no readable adapter, its settings or sizes differ from `config` and the model, it lacks a
      factor, or it has tensors that the model has no place for.
  """
  directory = epath.Path(config.init).expanduser()
  try:
    record = read_json(directory / CONFIG)
    tensors = tensor_file.read_header(directory / WEIGHTS)
  except InputError as error:
    raise InputError(f"lora.init={config.init}: no PEFT adapter can be read there: {error}") from error
  _check(config, record)

  def read(key, shape):
    if key not in tensors:
      raise InputError(f"lora.init={config.init}: {WEIGHTS} lacks {key}; change lora.targets, or the adapter")
    if (tensor := tensors.pop(key)).shape != shape:
      raise InputError(f"lora.init={config.init}: {key} is {list(tensor.shape)}; it is another model's adapter")
    return tensor_file.read(tensor).reshape(shape).T

  def place(tensor, leaf):
    return jax.device_put(tensor.astype(leaf.dtype), leaf.sharding)

  def load_factor(path, leaf):
    name = path[-2].key
    side = path[-1].key.upper()
    shape = (config.rank, int(np.prod(leaf.shape[1:])) // config.rank)  # of lora_A
    if side == "B":
      shape = shape[::-1]
    layers = [read(_key(layer, name, side), shape).reshape(leaf.shape[1:]) for layer in range(leaf.shape[0])]
    return place(np.stack(layers), leaf)

  loaded = {"lora": jax.tree_util.tree_map_with_path(load_factor, abstract["lora"])}
  if "score" in abstract and HEAD in tensors:
    loaded["score"] = place(read(HEAD, abstract["score"].shape[::-1]), abstract["score"])
  if tensors:  # `read` takes out those that it reads
    raise InputError(f"lora.init={config.init}: nothing here takes its {called(min(tensors))}; change lora.targets")
  return loaded


def _check(config: LoraConfig, record: dict[str, Any]) -> None:
  """Raises InputError if the adapter's own config differs from ours."""
  required: dict[str, tuple[Any, Any]] = {
    "peft_type": ("LORA", None),
    "r": (config.rank, None),
    "lora_alpha": (config.alpha, None),
    "use_rslora": (config.scaling == "rslora", False),
    "use_dora": (False, False),
    "rank_pattern": ({}, {}),
    "alpha_pattern": ({}, {}),
    "bias": ("none", "none"),
    "fan_in_fan_out": (False, False),
  }
  for key, (value, default) in required.items():
    if (recorded := record.get(key, default)) != value:
      raise InputError(
        f"lora.init={config.init}: its {key} is {shown(recorded)} and not {value!r}; set lora.* to what it is"
      )


def _key(layer: int, name: str, side: str) -> str:
  """Returns PEFT's name of a factor: `side` is A or B."""
  return f"base_model.model.model.layers.{layer}.{PROJECTIONS[name]}.lora_{side}.weight"
