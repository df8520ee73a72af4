"""Adapters in PEFT's files: its names, its orientation, its numbers; and what is written can be read."""

import dataclasses
import json
import os
import subprocess

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignjax.errors import InputError
from alignjax.model import ModelConfig, decoder, lora
from alignjax.model.huggingface import families, peft
from alignjax.model.lora import LoraConfig
from tests import trl_environment

CONFIG = ModelConfig(vocab=96, layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48, tied=False)
FACTORS = LoraConfig(rank=4, alpha=8.0)
PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def params():
  """The base, and factors whose b is not 0."""
  params = jax.jit(lora.adapt(decoder.make(CONFIG), FACTORS).init)(jax.random.key(0))
  grow = lambda pair: pair | {"b": 0.1 * jax.random.normal(jax.random.key(pair["a"].size), pair["b"].shape)}
  return params | {"lora": lora.map_targets(grow, params["lora"])}


@pytest.fixture(scope="module")
def mesh(one_device):
  return one_device


@pytest.fixture
def adapter(params, tmp_path):
  """The folder of an exported adapter."""
  peft.save_adapter(tmp_path, params, FACTORS, "someone/llama")
  return tmp_path


def config(adapter, **changes):
  return LoraConfig(**{"rank": 4, "alpha": 8.0, "init": str(adapter)} | changes)


def abstract(mesh, factors=FACTORS):
  return lora.adapt(decoder.make(CONFIG), factors).abstract(mesh)


def test_names_and_shapes_are_peft_s(adapter):
  tensors = load_file(adapter / peft.WEIGHTS)
  sizes = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 16), "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (32, 48), "mlp.up_proj": (32, 48), "mlp.down_proj": (48, 32),
  }  # fmt: skip
  expected = {}
  for layer in range(2):
    for module, (fan_in, fan_out) in sizes.items():
      expected[f"{PREFIX}.{layer}.{module}.lora_A.weight"] = (4, fan_in)
      expected[f"{PREFIX}.{layer}.{module}.lora_B.weight"] = (fan_out, 4)
  assert {name: tensor.shape for name, tensor in tensors.items()} == expected
  record = json.loads((adapter / peft.CONFIG).read_text())
  assert (record["r"], record["lora_alpha"], record["use_rslora"]) == (4, 8.0, False)
  assert record["base_model_name_or_path"] == "someone/llama"
  assert record["task_type"] == "CAUSAL_LM"
  assert set(record["target_modules"]) == {name.split(".")[1] for name in sizes}


def test_update_of_a_module_is_b_times_a_as_peft_multiplies(adapter, params):
  tensors = load_file(adapter / peft.WEIGHTS)
  merged = lora.merge(params, FACTORS)
  for name, module in families.PROJECTIONS.items():
    for layer in range(2):
      a, b = (tensors[f"{PREFIX}.{layer}.{module}.lora_{side}.weight"] for side in "AB")
      delta = (merged["layers"][name] - params["layers"][name])[layer]
      # Hugging Face stores [out, in], heads one after the other.
      np.testing.assert_allclose(delta.reshape(a.shape[1], b.shape[0]).T, 2.0 * b @ a, atol=1e-6)


def test_roundtrip_is_exact(adapter, params, mesh):
  found = peft.load_adapter(config(adapter), abstract(mesh))
  assert found.keys() == {"lora"}
  jax.tree.map(np.testing.assert_array_equal, found["lora"], params["lora"])
  assert jax.tree.all(jax.tree.map(lambda x, to: x.sharding == to.sharding, found["lora"], abstract(mesh)["lora"]))


def test_a_head_is_a_module_to_save_and_is_found_again(params, mesh, tmp_path):
  score = np.random.default_rng(0).normal(size=(32, 2)).astype(np.float32)
  peft.save_adapter(tmp_path, params | {"score": score}, FACTORS)
  assert load_file(tmp_path / peft.WEIGHTS)[peft.HEAD].shape == (2, 32)
  heads = lambda count: dataclasses.replace(CONFIG, head="scalar", score_heads=count)
  whole = lambda count: lora.adapt(decoder.make(heads(count)), FACTORS).abstract(mesh)
  np.testing.assert_array_equal(peft.load_adapter(config(tmp_path), whole(2))["score"], score)
  with pytest.raises(InputError, match=r"score.weight is \[2, 32\]; it is another model's adapter"):
    peft.load_adapter(config(tmp_path), whole(1))
  with pytest.raises(InputError, match=r"nothing here takes its base_model.model.score.weight"):
    peft.load_adapter(config(tmp_path), abstract(mesh))
  record = json.loads((tmp_path / peft.CONFIG).read_text())
  assert (record["task_type"], record["modules_to_save"]) == ("SEQ_CLS", ["score"])


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"rank": 8}, "its r is 4 and not 8"),
    ({"alpha": 16.0}, "its lora_alpha is 8.0 and not 16.0"),
    ({"scaling": "rslora"}, "its use_rslora is False and not True"),
    ({"targets": "layers/(q|v)"}, "nothing here takes its"),
    ({"init": "nowhere"}, "no PEFT adapter can be read there"),
  ],
)
def test_another_adapter_is_one_line(adapter, mesh, changes, said):
  with pytest.raises(InputError, match=said):
    peft.load_adapter(config(adapter, **changes), abstract(mesh, config(adapter, **changes)))


def test_missing_tensor_is_named(adapter, mesh):
  tensors = load_file(adapter / peft.WEIGHTS)
  gone = f"{PREFIX}.1.mlp.up_proj.lora_B.weight"
  del tensors[gone]
  save_file(tensors, adapter / peft.WEIGHTS)
  with pytest.raises(InputError, match=f"lacks {gone}"):
    peft.load_adapter(config(adapter), abstract(mesh))


@pytest.mark.parametrize(
  "text", ["[1]", "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "", '{"r": "' + "x" * 100_000 + '"}']
)
def test_a_config_that_is_none_is_one_short_line(adapter, mesh, text):
  (adapter / peft.CONFIG).write_text(text)
  with pytest.raises(InputError, match=r"lora\.init=") as caught:
    peft.load_adapter(config(adapter), abstract(mesh))
  assert len(str(caught.value)) < 600


def test_cut_file_is_named(adapter, mesh):
  whole = (adapter / peft.WEIGHTS).read_bytes()
  (adapter / peft.WEIGHTS).write_bytes(whole[: len(whole) // 2])
  with pytest.raises(InputError, match="no PEFT adapter can be read there"):
    peft.load_adapter(config(adapter), abstract(mesh))


SCRIPT = """
import sys, numpy as np, torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM
folder = sys.argv[1]
data = np.load(f"{folder}/data.npz")
config = LlamaConfig(
  vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=False,
)
model = LlamaForCausalLM(config)
model.load_state_dict({k: torch.tensor(data[k]) for k in data.files if k != "tokens"}, strict=True)
model = PeftModel.from_pretrained(model, f"{folder}/adapter").eval()
with torch.no_grad():
  logits = model(torch.tensor(data["tokens"]).long()).logits.numpy()
np.save(f"{folder}/logits.npy", logits)
"""


def hugging_face(params):
  """The base's weights under the names and in the orientation of LlamaForCausalLM."""
  layers, names = params["layers"], {}
  flat = lambda w, inputs: np.asarray(w).reshape(inputs, -1).T
  inputs = dict.fromkeys(families.PROJECTIONS, 32) | {"down": 48}
  for i in range(2):
    for name, module in families.PROJECTIONS.items():
      names[f"model.layers.{i}.{module}.weight"] = flat(layers[name][i], inputs[name])
    names[f"model.layers.{i}.input_layernorm.weight"] = layers["attention_norm"][i]
    names[f"model.layers.{i}.post_attention_layernorm.weight"] = layers["mlp_norm"][i]
  names |= {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["norm"]}
  return names | {"lm_head.weight": params["unembed"]}


@pytest.mark.slow
def test_peft_loads_it_and_computes_the_same(params, tmp_path):
  peft.save_adapter(tmp_path / "adapter", params, FACTORS)
  tokens = np.random.default_rng(0).integers(1, 96, (3, 17)).astype(np.int32)
  np.savez(tmp_path / "data.npz", tokens=tokens, **hugging_face(params))
  environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
  subprocess.run([trl_environment.python(), "-c", SCRIPT, tmp_path], env=environment, check=True)
  model = lora.adapt(decoder.make(CONFIG), FACTORS)
  positions = np.tile(np.arange(17, dtype=np.int32), (3, 1))

  def logits(params):
    hidden, _ = jax.jit(model.forward)(params, tokens, np.ones_like(tokens), positions)
    return np.asarray(hidden) @ np.asarray(params["unembed"]).T

  found = np.load(tmp_path / "logits.npy")
  np.testing.assert_allclose(found, logits(params), atol=1e-5)
  without = {name: tree for name, tree in params.items() if name != "lora"}
  assert np.abs(found - logits(without)).max() > 1e-2
