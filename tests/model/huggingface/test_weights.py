"""Folders of weights: what is wrong with one is said in a line that names the tensor, and files are read in parts."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from alignjax.errors import InputError
from alignjax.model import decoder
from alignjax.model.huggingface import tensor_file, weights
from alignjax.system import sharding

SAVED = Path(__file__).parent / "families"


@pytest.fixture
def folder(tmp_path):
  """A Llama's, which a test may change."""
  return Path(shutil.copytree(SAVED / "llama", tmp_path / "llama"))


def change(folder, change):
  """Rewrites the file with the library that everybody writes it with."""
  tensors = load_file(folder / weights.WEIGHTS)
  save_file(change(tensors), folder / weights.WEIGHTS)


def opened(folder, fresh=(), **options):
  config = weights.read_config(str(folder))
  model = decoder.make(dataclasses.replace(config, **options) if options else config)
  return weights.load(str(folder), model, model.abstract(sharding.make_mesh(devices=jax.devices()[:1])), fresh)


without = lambda name: lambda tensors: {key: x for key, x in tensors.items() if key != name}


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    (without("model.layers.1.mlp.up_proj.weight"), r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
    (lambda tensors: tensors | {"model.extra": np.ones(3)}, r"nothing in the model takes its tensor model\.extra"),
    (
      lambda tensors: tensors | {"model.norm.weight": np.ones(15, np.float32)},
      r"model\.norm\.weight is \[15\] and not \[16\]",
    ),
    (lambda tensors: tensors | {"model.norm.weight": np.ones(16, np.int32)}, r"model\.norm\.weight is I32"),
  ],
)
def test_a_tensor_that_is_missing_or_too_many_or_of_another_shape_is_named(folder, changed, message):
  change(folder, changed)
  with pytest.raises(InputError, match=message):
    opened(folder)


def test_a_file_that_is_cut_off_is_refused(folder):
  whole = (folder / weights.WEIGHTS).read_bytes()
  for end, message in ((5, "safetensors"), (len(whole) - 10, "is cut off")):
    (folder / weights.WEIGHTS).write_bytes(whole[:end])
    with pytest.raises(InputError, match=message):
      opened(folder)


def test_weights_in_another_format_are_refused(folder):
  (folder / weights.WEIGHTS).rename(folder / "pytorch_model.bin")
  with pytest.raises(InputError, match="weights are read from safetensors alone"):
    opened(folder)


def test_an_index_that_names_what_is_not_there_is_refused(folder):
  index = {"weight_map": {"model.norm.weight": weights.WEIGHTS, "model.other": weights.WEIGHTS}}
  (folder / weights.INDEX).write_text(json.dumps(index))
  with pytest.raises(InputError, match=r"lacks model\.other"):
    opened(folder)


def test_an_unembedding_beside_a_tied_config_has_to_be_the_embedding(folder):
  tied = Path(shutil.copytree(SAVED / "llama_biases", folder.parent / "tied"))
  change(tied, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
  opened(tied)
  change(tied, lambda tensors: tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]})
  with pytest.raises(InputError, match=r"takes its tensor lm_head\.weight"):
    opened(tied)


def test_a_policy_s_weights_begin_a_reward_model_and_its_head_is_left_to_the_caller(folder):
  found = opened(folder, fresh=("score",), head="scalar", tied=True)
  assert set(found) == {"embed", "layers", "norm"}
  assert "score" in opened(SAVED / "llama_reward", fresh=("score",))
  with pytest.raises(InputError, match=r"score\.weight"):
    opened(folder, head="scalar", tied=True)


def test_halves_are_read_as_what_they_stand_for(folder):
  exact = load_file(folder / weights.WEIGHTS)["model.norm.weight"]
  for dtype in (ml_dtypes.bfloat16, np.float16):
    change(folder, lambda tensors: tensors | {"model.norm.weight": exact.astype(dtype)})  # noqa: B023
    np.testing.assert_array_equal(opened(folder)["norm"], exact.astype(dtype).astype(np.float32))


def test_written_files_are_the_library_s(tmp_path):
  tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)}
  path = epath.Path(tmp_path / "x.safetensors")
  tensor_file.write(path, [tensor_file.Entry(n, x.dtype, x.shape, lambda x=x: x) for n, x in tensors.items()])
  for name, x in load_file(path).items():
    np.testing.assert_array_equal(x, tensors[name])
  transposed = tensor_file.Entry("a", np.dtype(np.float32), (3, 2), lambda: tensors["a"].T)
  tensor_file.write(path, [transposed])
  np.testing.assert_array_equal(load_file(path)["a"], tensors["a"].T)


def test_only_the_rows_that_a_device_needs_are_read(folder, monkeypatch):
  read, numbers = tensor_file.read, []

  def counted(tensor, *edges):
    numbers.append(len(read(tensor, *edges)))
    return read(tensor, *edges)

  monkeypatch.setattr(tensor_file, "read", counted)
  mesh = sharding.make_mesh(fsdp=1, tensor=2, devices=jax.devices()[:2])
  model = decoder.make(weights.read_config(str(folder)))
  weights.load(str(folder), model, model.abstract(mesh))
  vocabulary = 48 * 16
  assert vocabulary // 2 in numbers
  assert vocabulary not in numbers


def test_parameters_may_be_stored_in_another_dtype(folder):
  found = opened(folder, param_dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


def test_what_float16_can_not_hold_is_not_written_in_it(folder, tmp_path):
  model = decoder.make(weights.read_config(str(folder)))
  params = opened(folder)
  large = params | {"norm": params["norm"].at[3].set(7e4)}
  special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
  weights.save(tmp_path / "small", model, params, special, "float16")
  with pytest.raises(InputError, match=r"model\.norm\.weight: has numbers that are too large for float16"):
    weights.save(tmp_path / "large", model, large, special, "float16")
