"""Import and export of the weights in Hugging Face folders, one tensor at a time in the host's memory.

Their matrices are [out, in], one per layer. Ours have the inputs first, heads as a dimension of their own, and the
layers stacked. The model's table says which of our dimensions are inputs, so that one rule converts all.
"""

import functools
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from alignjax.errors import InputError
from alignjax.model.config import ModelConfig
from alignjax.model.decoder import Model
from alignjax.model.huggingface import families, tensor_file
from alignjax.model.huggingface.tensor_file import Entry, Tensor
from alignjax.system import output
from alignjax.system.hub import CONFIG, INDEX, WEIGHTS, called, local, read_json, shown
from alignjax.types import Params

SHARD_BYTES = 5 * 10**9
UNREAD = re.compile(r".*\.rotary_emb\.inv_freq")  # the rotary frequencies, which are in some old files


def read_config(path: str) -> ModelConfig:
  """Reads the config of the model in a Hugging Face folder.

  Raises:
    InputError: as `families.model_config`, or no config can be read.
  """
  where = local(path) / CONFIG
  return families.model_config(read_json(where), str(where))


def load(path: str, model: Model, params: Params, fresh: Sequence[str] = ()) -> Params:
  """Loads the weights in a folder, with the layout and dtypes of `params`.

  The host never holds more than its part of one layer's weight.

  Args:
    path: of the folder.
    model: the model that has these weights.
    params: abstract, with shardings.
    fresh: top-level names that the folder may lack; those that it lacks are left out of the result.

  Raises:
    InputError: a tensor is missing, has the wrong shape, or does not belong to the model; or a file is damaged.
  """
  tensors = read_tensors(path)
  absent = {name for name in fresh if name != "score" or families.SCORE not in tensors}  # no folder has a critic
  params = {name: tree for name, tree in params.items() if name not in absent}
  used: set[str] = set()

  def load_leaf(keys, leaf):
    layout, names = _sources(model, tuple(key.key for key in keys))
    for name in names:
      _check(path, tensors, name, layout)
    used.update(names)
    sources = [tensors[name] for name in names]
    if layout.stacked:
      return _stack(sources, layout, leaf)
    return _place(sources[0], layout, leaf.sharding, leaf.dtype)

  loaded = jax.tree_util.tree_map_with_path(load_leaf, params)
  _check_rest(path, model.config, tensors, used)
  return loaded


class _Layout(NamedTuple):
  """The dimensions of a tensor.

  Attributes:
    inputs: our input dimensions, without that of the layers.
    outputs: our output dimensions, which follow them.
    theirs: the shape in the file.
    stacked: whether ours has a first dimension of the layers.
  """

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  theirs: tuple[int, ...]
  stacked: bool


def _sources(model: Model, path: Sequence[str]) -> tuple[_Layout, list[str]]:
  """Returns the layout and the names of the tensors that make up the weight at a path: one, or one for each layer."""
  weight = functools.reduce(operator.getitem, path, model.weights())
  shape = weight.shape
  names = [families.tensor_name(model.config, path)]
  stacked = path[0] == "layers"
  if stacked:
    shape = weight.shape[1:]
    names = [names[0].format(layer=layer) for layer in range(weight.shape[0])]
  count = 1 if path[0] == "score" else weight.inputs
  inputs = shape[:count]
  outputs = shape[count:]
  theirs = shape
  if inputs:
    theirs = (math.prod(outputs), math.prod(inputs))
  elif stacked:
    theirs = (math.prod(outputs),)
  return _Layout(inputs, outputs, theirs, stacked), names


def read_tensors(path: str) -> dict[str, Tensor]:
  """Reads the places of all tensors in a folder, by name, from its index or its only file.

  Raises:
    InputError: there is no tensor, or a file is damaged.
  """
  folder = local(path)
  if not (folder / INDEX).exists():
    if not (folder / WEIGHTS).exists():
      raise InputError(f"{folder}: has no {WEIGHTS}; weights are read from safetensors alone, so convert what is there")
    return tensor_file.read_header(folder / WEIGHTS)
  places = _places(folder / INDEX)
  headers = {name: tensor_file.read_header(folder / name) for name in sorted(set(places.values()))}
  lacking = [name for name, file in places.items() if name not in headers[file]]
  if lacking:
    raise InputError(
      f"{folder / places[lacking[0]]}: lacks {called(lacking[0])}, which {INDEX} says it has; fetch it again"
    )
  return {name: headers[file][name] for name, file in places.items()}


def _places(index: epath.Path) -> dict[str, str]:
  """Reads the file of each tensor in an index.

  It must be a bare name, so that nothing outside of the folder is read.
  """
  places = read_json(index).get("weight_map")
  if not isinstance(places, dict) or not places:
    raise InputError(f"{index}: weight_map is {shown(places)}; it must name the file of each tensor; fetch it again")
  for name, file in places.items():
    if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0"):
      raise InputError(
        f"{index}: weight_map has {called(name)} in {shown(file)}; it must be the name of a file beside it"
      )
  return places


def _check(path: str, tensors: Mapping[str, Tensor], name: str, layout: _Layout) -> None:
  """Raises InputError unless the folder has a tensor with this name and layout."""
  if name not in tensors:
    raise InputError(f"{path}: has no tensor {name}, which a model of its {CONFIG} has; fetch the folder again")
  if (shape := tensors[name].shape) != layout.theirs:
    raise InputError(f"{path}: {name} is {list(shape)} and not {list(layout.theirs)}, as its {CONFIG} would have it")


def _check_rest(path: str, config: ModelConfig, tensors: Mapping[str, Tensor], used: set[str]) -> None:
  """Raises InputError if there are tensors that do not belong to the model."""
  rest = [name for name in tensors if name not in used and not UNREAD.fullmatch(name)]
  unembed = tensors.get(families.TENSORS["unembed"])
  embed = tensors.get(families.TENSORS["embed"])
  if unembed and unembed.name in rest and (config.head == "scalar" or (embed and _same(unembed, embed))):
    rest.remove(unembed.name)
  if not rest:
    return
  more = f" (and {len(rest) - 1} more)" if len(rest) > 1 else ""
  raise InputError(
    f"{path}: nothing in the model takes its tensor {called(rest[0])}{more}; is {CONFIG} that of these weights?"
  )


def _same(left: Tensor, right: Tensor) -> bool:
  """Returns True if two tensors hold the same numbers."""
  if left.shape != right.shape:
    return False
  size = math.prod(left.shape)
  step = 1 << 24
  pieces = ((start, min(start + step, size)) for start in range(0, size, step))
  return all(np.array_equal(tensor_file.read(left, *piece), tensor_file.read(right, *piece)) for piece in pieces)


def _place(tensor: Tensor, layout: _Layout, sharding: NamedSharding, dtype: Any) -> jax.Array:
  """Returns a tensor on the mesh, in our dimensions; each device's part is read separately."""
  shape = layout.inputs + layout.outputs

  def piece(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None
    return _piece(tensor, layout, index, dtype)

  return jax.make_array_from_callback(shape, sharding, piece)


def _piece(tensor: Tensor, layout: _Layout, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
  """Reads the part of a tensor at an index of ours.

  Only the rows in the slice of the first output dimension are read.
  """
  inputs = layout.inputs
  outputs = layout.outputs
  start, stop, _ = index[len(inputs)].indices(outputs[0])
  width = math.prod(inputs)
  row = math.prod(outputs[1:]) * width
  rows = tensor_file.read(tensor, start * row, stop * row)
  ours = rows.reshape(-1, width).T.reshape(*inputs, stop - start, *outputs[1:])
  return np.ascontiguousarray(ours[(*index[: len(inputs)], slice(None), *index[len(inputs) + 1 :])].astype(dtype))


def _stack(tensors: Sequence[Tensor], layout: _Layout, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns the tensors of all layers as one array; each is written to it before the next is read."""
  sharding = leaf.sharding
  of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
  stack = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
  for layer, tensor in enumerate(tensors):
    stack = _put(sharding)(stack, _place(tensor, layout, of_layer, leaf.dtype), layer).block_until_ready()
  return stack


@functools.cache
def _put(sharding: NamedSharding) -> Callable[..., jax.Array]:
  """Returns a compiled (stack, x, layer) -> the stack with x as a layer; the old stack is donated."""
  put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
  return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def save(
  folder: epath.PathLike,
  model: Model,
  params: Params,
  special: Mapping[str, int],
  dtype: str = "",
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a folder that transformers and vLLM load: safetensors files, and config.json after them.

  Every process calls it; the first one writes.

  Args:
    folder: made if missing.
    model: the model of `params`.
    params: without LoRA factors.
    special: "bos_token_id", "eos_token_id", "pad_token_id" of its tokenizer.
    dtype: of the written tensors; "": that of `params`.
    shard_bytes: the most in one file; a larger tensor has a file of its own.

  Raises:
    InputError: no family of transformers has such a model, or a number is too large for float16.
  """
  folder = epath.Path(folder).expanduser()
  dtype = dtype or str(params["embed"].dtype)
  config = families.to_hugging_face(model.config, special, dtype)
  if model.config.head == "scalar":
    # A model that scores needs no unembedding, but ours may have one from the policy that it started from.
    params = {name: tree for name, tree in params.items() if name != "unembed"}
  entries = _entries(model, params, np.dtype(jnp.dtype(dtype)))
  writes = jax.process_index() == 0
  files = _files(entries, shard_bytes)
  for name, part in files.items():
    tensor_file.write(folder / name if writes else None, part)
  if writes and len(files) > 1:
    places = {entry.name: name for name, part in files.items() for entry in part}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": places}
    output.write(folder / INDEX, json.dumps(index, indent=2) + "\n")
  if writes:
    output.write(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _entries(model: Model, params: Params, dtype: np.dtype) -> list[Entry]:
  """Returns the tensors to write, in the order of the parameters; each is fetched from the mesh when it is written."""

  def make(name, x, layer, layout):
    if layout.stacked:
      x = _layer(x, layer)
    tensor = np.asarray(multihost_utils.process_allgather(x, tiled=True))
    if dtype == np.float16 and not np.max(np.abs(tensor)) <= np.finfo(dtype).max:
      raise InputError(f"{name}: has numbers that are too large for float16; export bfloat16")
    return tensor.reshape(math.prod(layout.inputs), -1).T.reshape(layout.theirs)

  entries = []
  for keys, x in jax.tree_util.tree_leaves_with_path(params):
    layout, names = _sources(model, tuple(key.key for key in keys))
    entries += [
      Entry(name, dtype, layout.theirs, functools.partial(make, name, x, layer, layout))
      for layer, name in enumerate(names)
    ]
  return entries


@jax.jit
def _layer(x, layer):
  """Returns a layer of a stack."""
  return jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)


def _files(entries: Sequence[Entry], shard_bytes: int) -> dict[str, list[Entry]]:
  """Returns the entries by file, in order, each file with as many entries as fit."""
  parts: list[list[Entry]] = [[]]
  for entry in entries:
    if parts[-1] and sum(other.nbytes for other in parts[-1]) + entry.nbytes > shard_bytes:
      parts.append([])
    parts[-1].append(entry)
  if len(parts) == 1:
    return {WEIGHTS: parts[0]}
  return {f"model-{number:05}-of-{len(parts):05}.safetensors": part for number, part in enumerate(parts, 1)}
