"""Every family of models: Hugging Face's weights compute what transformers computes with them, and go back unchanged.

The folders in tests/model/huggingface/families are benchmarks/transformers_models.py's; the slow tests make others.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.errors import InputError
from alignjax.losses import chunks
from alignjax.losses.logps import next_token_logps
from alignjax.model import decoder, heads
from alignjax.model.huggingface import families, tensor_file, weights
from alignjax.system import sharding
from tests import trl_environment

SAVED = Path(__file__).parent / "families"
FAMILIES = sorted(folder.name for folder in SAVED.iterdir())
POLICIES = [name for name in FAMILIES if not name.endswith("reward")]
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOLERANCE = 2e-5  # 2e-4 is asked


def opened(folder, mesh=None):
  """The model in a folder, and its parameters."""
  model = decoder.make(weights.read_config(str(folder)))
  return model, weights.load(str(folder), model, model.abstract(mesh or sharding.make_mesh(devices=jax.devices()[:1])))


@functools.cache
def saved(family, mesh=None):
  """The same of a folder in the repository: read once, never donated."""
  return opened(SAVED / family, mesh)


def numbers(folder):
  return dict(np.load(folder / "numbers.npz"))


def positions(mask):
  return np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, hidden):
  return chunks.logits(hidden, chunks.capped(model.unembedding(params)))


def logits(model, params, hidden):
  return np.asarray(_logits(model, params, hidden))


def computed(folder, model, params):
  """Our numbers and transformers' of every token that is no padding, or of every row of a reward model."""
  theirs = numbers(folder)
  tokens, mask = theirs["tokens"].astype(np.int32), theirs["mask"].astype(np.int32)
  hidden, _ = jax.jit(model.forward)(params, tokens, mask, positions(mask))
  if model.config.head == "none":
    return logits(model, params, hidden)[mask > 0], theirs["logits"][mask > 0]
  return heads.last_token_score(heads.score(params, hidden), mask, 1), theirs["logits"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers_whole_and_padded_on_either_side(family):
  ours, theirs = computed(SAVED / family, *saved(family))
  np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("family", POLICIES)
def test_packed_rows_equal_rows_of_their_own(family):
  model, params = saved(family)
  theirs = numbers(SAVED / family)
  lengths = theirs["mask"].sum(axis=1)
  real = [row[m > 0] for row, m in zip(theirs["tokens"], theirs["mask"], strict=True)]
  segments = np.repeat(np.arange(1, 4), lengths)[None].astype(np.int32)
  place = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
  hidden, _ = jax.jit(model.forward)(params, np.concatenate(real)[None].astype(np.int32), segments, place)
  expected = np.concatenate([row[m > 0] for row, m in zip(theirs["logits"], theirs["mask"], strict=True)])
  np.testing.assert_allclose(logits(model, params, hidden)[0], expected, atol=TOLERANCE)


@pytest.mark.parametrize("family", POLICIES)
def test_a_cache_filled_in_pieces_equals_the_whole_row(family):
  model, params = saved(family)
  theirs = numbers(SAVED / family)
  tokens, ones = theirs["tokens"][:1].astype(np.int32), np.ones((1, 24), np.int32)
  forward, cache, found = jax.jit(model.forward), model.init_cache(1, 24), []
  for start, stop in ((0, 5), (5, 10), (10, 15), *((i, i + 1) for i in range(15, 24))):
    part = np.s_[:, start:stop]
    hidden, cache = forward(params, tokens[part], ones[part], positions(ones)[part], cache)
    found.append(hidden)
  ours = logits(model, params, np.concatenate(found, axis=1))
  np.testing.assert_allclose(ours[0], theirs["logits"][0], atol=TOLERANCE)


@pytest.mark.parametrize("family", [pytest.param("gemma2", marks=pytest.mark.long), "gemma3", "llama_biases"])
def test_weights_and_their_numbers_are_the_same_on_a_mesh(family, mesh):
  model, params = saved(family, mesh)
  _, one = saved(family)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(one))
  expected = jax.tree.leaves(sharding.weight_shardings(model.weights(), mesh))
  assert [x.sharding for x in jax.tree.leaves(params)] == expected
  theirs = numbers(SAVED / family)
  tokens = np.tile(theirs["tokens"][:1], (8, 1)).astype(np.int32)
  ones = np.ones_like(tokens)
  with jax.set_mesh(mesh):
    hidden, _ = jax.jit(model.forward)(params, tokens, ones, positions(ones))
  np.testing.assert_allclose(logits(model, one, jax.device_get(hidden))[3], theirs["logits"][0], atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_reads_back_bit_for_bit(family, tmp_path):
  model, params = saved(family)
  weights.save(tmp_path, model, params, SPECIAL, shard_bytes=8000)
  assert len(list(tmp_path.glob("*.safetensors"))) > 1
  again, read = opened(tmp_path)
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_generations_of_config_say_the_same(family, tmp_path):
  raw = json.loads((SAVED / family / "config.json").read_text())
  new = families.model_config(raw, "new")
  old = {name: value for name, value in raw.items() if name not in ("rope_parameters", "layer_types", "dtype")}
  rope = raw["rope_parameters"]
  full = rope.get("full_attention", rope)
  stretch = {name: value for name, value in full.items() if name not in ("rope_theta", "rope_type")}
  old |= {"rope_theta": full["rope_theta"], "torch_dtype": "float32"}
  old["rope_scaling"] = {"type": full["rope_type"]} | stretch if stretch else None
  if "sliding_attention" in rope:
    old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
  assert families.model_config(old, "old") == new


def test_the_softcap_of_logits_is_in_their_gradient():
  model, params = saved("gemma2")
  theirs = numbers(SAVED / "gemma2")
  hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 24, 16)), jnp.float32)
  tokens = theirs["tokens"][:1].astype(np.int32)

  def plain(hidden, matrix):
    z = jnp.einsum("btd,vd->btv", hidden, matrix)
    z = jax.nn.log_softmax(3.0 * jnp.tanh(z / 3.0) / 0.7)
    return jnp.sum(jnp.take_along_axis(z[:, :-1], tokens[:, 1:, None], axis=-1))

  def ours(hidden, matrix):
    return jnp.sum(next_token_logps(hidden, chunks.Capped(matrix, 3.0), tokens, temperature=0.7, chunk=8))

  arguments = hidden, params["embed"]
  (own, own_gradients), (expected, gradients) = (
    jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*arguments) for f in (ours, plain)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), own_gradients, gradients)
  np.testing.assert_allclose(own, expected, rtol=1e-6)
  assert model.config.final_softcap == 3.0


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "gpt2"}, "model_type='gpt2' is not known"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn' is not supported"),
    ({"hidden_act": "relu"}, "activation 'relu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"hidden_size": None}, "hidden_size"),
  ],
)
def test_a_model_that_is_not_supported_is_refused_by_name(change, message):
  raw = json.loads((SAVED / "llama" / "config.json").read_text()) | change
  raw = {name: value for name, value in raw.items() if value is not None}
  with pytest.raises(InputError, match=message):
    families.model_config(raw, "config.json")


def test_a_model_of_no_family_is_not_exported():
  config = dataclasses.replace(weights.read_config(str(SAVED / "llama")), embed_scale=2.0)
  with pytest.raises(InputError, match=r"embed_scale=2\.0: no family"):
    families.to_hugging_face(config, SPECIAL, "float32")


@pytest.mark.slow
def test_transformers_loads_what_is_written_with_equal_logits_and_gradients(tmp_path):
  theirs, ours = tmp_path / "theirs", tmp_path / "ours"
  script = "transformers_models.py"
  trl_environment.run(script, "make", str(theirs), "--seed", "7", "--shards")
  for folder in theirs.iterdir():
    weights.save(ours / folder.name, *opened(folder), SPECIAL)
  for folder in (theirs, ours):
    trl_environment.run(script, "score", str(folder), "--gradients")
  for folder in theirs.iterdir():
    expected, found = numbers(folder), numbers(ours / folder.name)
    assert json.loads((ours / folder.name / "report.json").read_text()) == {
      "missing_keys": [],
      "unexpected_keys": [],
      "mismatched_keys": [],
    }
    np.testing.assert_array_equal(found["logits"], expected["logits"])
    np.testing.assert_allclose(*computed(folder, *opened(folder)), atol=TOLERANCE)
    if folder.name in POLICIES:
      _compare_gradients(folder, expected, tmp_path)


def _compare_gradients(folder, expected, tmp_path):
  """Ours of the first row's mean cross-entropy, written under their names, against theirs."""
  model, params = opened(folder)
  tokens = expected["tokens"][:1].astype(np.int32)
  ones = np.ones_like(tokens)

  def loss(params):
    hidden, _ = model.forward(params, tokens, ones, positions(ones))
    return -jnp.sum(next_token_logps(hidden, model.unembedding(params), tokens)) / (tokens.shape[1] - 1)

  written = tmp_path / "gradients" / folder.name
  weights.save(written, model, jax.jit(jax.grad(loss))(params), SPECIAL)
  for name, tensor in weights.read_tensors(str(written)).items():
    found = tensor_file.read(tensor).reshape(tensor.shape)
    np.testing.assert_allclose(found, expected[f"gradient/{name}"], atol=TOLERANCE, err_msg=f"{folder.name} {name}")
