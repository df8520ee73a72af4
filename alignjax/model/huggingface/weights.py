"""The weights of Hugging Face folders, in and out: each tensor is read, laid out on the mesh and let go by itself.

Their matrices are [out, in], one per layer; ours have the inputs first, heads as a dimension of their own, and the
layers stacked. Which dimensions of ours are inputs is said by the model's table, so one rule converts all.
"""

import functools
import json
import math
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
UNREAD = re.compile(r".*\.rotary_emb\.inv_freq")  # the rotary frequencies, which some old files hold too


def read_config(path: str) -> ModelConfig:
  """The config of the model in a folder.

  Raises:
    InputError: as `families.model_config`, or none can be read.
  """
  where = local(path) / CONFIG
  return families.model_config(read_json(where), str(where))


def load(path: str, model: Model, params: Params, fresh: Sequence[str] = ()) -> Params:
  """The weights in a folder, as `params` lays them out and types them.

  The host never holds more than its part of one layer's weight.

  Args:
    path: of the folder.
    model: whose weights they are.
    params: abstract, with shardings.
    fresh: top-level names that the folder may lack: left out of the result where it does.

  Raises:
    InputError: a tensor is missing, misshapen, or none that the model has.
  """
  tensors = read_tensors(path)
  absent = {name for name in fresh if name != "score" or families.SCORE not in tensors}  # they have no critics
  params = {name: tree for name, tree in params.items() if name not in absent}
  used: set[str] = set()

  def one(keys, leaf):
    layout, sources = _sources(model, tuple(key.key for key in keys))
    for source in sources:
      _check(path, tensors, source, layout)
    used.update(sources)
    found = [tensors[source] for source in sources]
    return _stack(found, layout, leaf) if layout.stacked else _place(found[0], layout, leaf.sharding, leaf.dtype)

  loaded = jax.tree_util.tree_map_with_path(one, params)
  _check_rest(path, model.config, tensors, used)
  return loaded


class _Layout(NamedTuple):
  """One tensor: our dimensions, inputs and then outputs, without that of the layers; and theirs."""

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  theirs: tuple[int, ...]
  stacked: bool


def _sources(model: Model, path: Sequence[str]) -> tuple[_Layout, list[str]]:
  """The layout of the tensors that the weight at a path is made of, and their names: one, or one of each layer."""
  weight = functools.reduce(lambda node, name: node[name], path, model.weights())
  stacked = path[0] == "layers"
  shape = weight.shape[1:] if stacked else weight.shape
  count = 1 if path[0] == "score" else weight.inputs
  inputs, outputs = shape[:count], shape[count:]
  theirs = (math.prod(outputs), *([math.prod(inputs)] if inputs else [])) if stacked or inputs else shape
  name = families.tensor_name(model.config, path)
  names = [name.format(layer=layer) for layer in range(weight.shape[0])] if stacked else [name]
  return _Layout(inputs, outputs, theirs, stacked), names


def read_tensors(path: str) -> dict[str, Tensor]:
  """All tensors of a folder by name, from its index or its only file.

  Raises:
    InputError: there are none, or a file is damaged.
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
  """The file of each tensor, by an index: a bare name, so that nothing beside the folder is read."""
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
  if name not in tensors:
    raise InputError(f"{path}: has no tensor {name}, which a model of its {CONFIG} has; fetch the folder again")
  if (found := tensors[name].shape) != layout.theirs:
    raise InputError(f"{path}: {name} is {list(found)} and not {list(layout.theirs)}, as its {CONFIG} would have it")


def _check_rest(path: str, config: ModelConfig, tensors: Mapping[str, Tensor], used: set[str]) -> None:
  """Raises InputError where there are tensors that the model has no place for."""
  rest = [name for name in tensors if name not in used and not UNREAD.fullmatch(name)]
  unembed, embed = (tensors.get(families.TENSORS[name]) for name in ("unembed", "embed"))
  if unembed and unembed.name in rest and (config.head == "scalar" or _same(unembed, embed)):
    rest.remove(unembed.name)
  if rest:
    more = f" (and {len(rest) - 1} more)" if len(rest) > 1 else ""
    raise InputError(
      f"{path}: nothing in the model takes its tensor {called(rest[0])}{more}; is {CONFIG} that of these weights?"
    )


def _same(one: Tensor, other: Tensor) -> bool:
  """Whether two tensors hold the same numbers."""
  if one.shape != other.shape:
    return False
  size, step = math.prod(one.shape), 1 << 24
  pieces = ((start, min(start + step, size)) for start in range(0, size, step))
  return all(np.array_equal(tensor_file.read(one, *piece), tensor_file.read(other, *piece)) for piece in pieces)


def _place(tensor: Tensor, layout: _Layout, sharding: NamedSharding, dtype: Any) -> jax.Array:
  """One tensor on the mesh, in our dimensions: every device's part is read by itself."""
  shape = layout.inputs + layout.outputs
  return jax.make_array_from_callback(shape, sharding, lambda index: _piece(tensor, layout, index, dtype))


def _piece(tensor: Tensor, layout: _Layout, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
  """What lies at an index of ours. Of the file, the rows are read that the first output dimension's slice needs."""
  inputs, outputs = layout.inputs, layout.outputs
  start, stop, _ = index[len(inputs)].indices(outputs[0])
  width, rest = math.prod(inputs), outputs[1:]
  rows = tensor_file.read(tensor, *(edge * math.prod(rest) * width for edge in (start, stop)))
  ours = rows.reshape(-1, width).T.reshape(*inputs, stop - start, *rest)
  return np.ascontiguousarray(ours[(*index[: len(inputs)], slice(None), *index[len(inputs) + 1 :])].astype(dtype))


def _stack(tensors: Sequence[Tensor], layout: _Layout, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """The tensors of all layers as one array: each takes its place before the next is read."""
  sharding = leaf.sharding
  of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
  stack = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
  for layer, tensor in enumerate(tensors):
    stack = _put(sharding)(stack, _place(tensor, layout, of_layer, leaf.dtype), layer).block_until_ready()
  return stack


@functools.cache
def _put(sharding: NamedSharding) -> Callable[..., jax.Array]:
  put = lambda stack, x, layer: jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0)
  return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def save(
  folder: epath.PathLike,
  model: Model,
  params: Params,
  special: Mapping[str, int],
  dtype: str = "",
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a folder that transformers and vLLM load: safetensors, and config.json when those are whole.

  Args:
    folder: made if missing.
    model: whose weights they are.
    params: of it, without LoRA factors.
    special: "bos_token_id", "eos_token_id", "pad_token_id" of its tokenizer.
    dtype: of what is written; "" as in `params`.
    shard_bytes: the most in one file, where a single tensor is not more.

  Raises:
    InputError: no family of transformers has such a model.
  """
  folder = epath.Path(folder).expanduser()
  dtype = dtype or str(params["embed"].dtype)
  config = families.to_hugging_face(model.config, special, dtype)
  # A model that scores needs no unembedding, though ours may have kept one from the policy that it began as.
  leave_out = ("unembed",) if model.config.head == "scalar" else ()
  params = {name: tree for name, tree in params.items() if name not in leave_out}
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
  """What is written, in the order of the parameters; each tensor is fetched from the mesh when it is its turn."""
  host = lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True))

  def make(name, x, layer, layout):
    x = host(_layer(x, layer) if layout.stacked else x)
    if dtype == np.float16 and not np.max(np.abs(x)) <= np.finfo(dtype).max:
      raise InputError(f"{name}: has numbers that are too large for float16; export bfloat16")
    return x.reshape(math.prod(layout.inputs), -1).T.reshape(layout.theirs)

  entries = []
  for keys, x in jax.tree_util.tree_leaves_with_path(params):
    layout, names = _sources(model, tuple(key.key for key in keys))
    entries += [
      Entry(name, dtype, layout.theirs, functools.partial(make, name, x, layer, layout))
      for layer, name in enumerate(names)
    ]
  return entries


_layer = jax.jit(lambda x, layer: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False))


def _files(entries: Sequence[Entry], shard_bytes: int) -> dict[str, list[Entry]]:
  """The entries by file, in order, each file with as many as fit."""
  parts: list[list[Entry]] = [[]]
  for entry in entries:
    if parts[-1] and sum(other.nbytes for other in parts[-1]) + entry.nbytes > shard_bytes:
      parts.append([])
    parts[-1].append(entry)
  if len(parts) == 1:
    return {WEIGHTS: parts[0]}
  return {f"model-{number:05}-of-{len(parts):05}.safetensors": part for number, part in enumerate(parts, 1)}
