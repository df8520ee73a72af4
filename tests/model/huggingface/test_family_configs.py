"""config.json of published models reads as what they are, and what is exported says it so that transformers agrees."""

import dataclasses
import json
from pathlib import Path

import pytest

from alignjax.errors import InputError
from alignjax.model import decoder
from alignjax.model.config import ModelConfig, sliding
from alignjax.model.huggingface import families
from tests.model.huggingface import published_configs as published

SAVED = Path(__file__).parent / "families"
EXPECTED = {
  "LLAMA_3_1_8B": (8_030_261_248, {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_theta": 5e5, "head_dim": 128}),
  "LLAMA_3_2_1B": (1_235_814_400, {"rope_factor": 32.0, "head_dim": 64, "tied": True}),
  "QWEN_2_5_7B": (7_615_616_512, {"pattern": "f", "window": 0, "biases": "q,k,v", "rope_theta": 1e6}),
  "QWEN_3_0_6B": (596_049_920, {"pattern": "f", "query_key_norm": True, "biases": "", "rope_theta": 1e6}),
  "MISTRAL_7B_V0_1": (7_241_732_096, {"pattern": "s", "window": 4096, "rope_theta": 1e4}),
  "MISTRAL_7B_V0_3": (7_248_023_552, {"pattern": "f", "window": 0, "rope_theta": 1e6}),
  "GEMMA_2_2B": (
    2_614_341_888,
    {"pattern": "sf", "window": 4096, "attention_scale": 1 / 16, "attention_softcap": 50.0, "final_softcap": 30.0},
  ),
  "GEMMA_2_27B": (27_227_128_320, {"attention_scale": 1 / 12, "head_dim": 128, "activation": "gelu"}),
  "GEMMA_3_1B": (
    999_885_952,
    {"pattern": "sssssf", "window": 512, "rope_theta": 1e6, "rope_sliding_theta": 1e4, "attention_softcap": 0.0},
  ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_published_config_has_the_model_s_size_and_options(name):
  size, options = EXPECTED[name]
  config = families.model_config(getattr(published, name), name)
  assert decoder.make(config).num_params() == size
  assert {option: getattr(config, option) for option in options} == options
  assert families.model_config(families.to_hugging_face(config, {}, "bfloat16"), name) == config


def test_what_gemma_3_does_not_say_of_its_positions_is_its_family_s():
  raw = {name: value for name, value in published.GEMMA_3_1B.items() if not name.startswith("rope")}
  assert families.model_config(raw, "") == families.model_config(published.GEMMA_3_1B, "")


def test_sliding_layers_of_qwen_are_exported_with_the_switch_that_transformers_asks_for():
  config = ModelConfig(vocab=8, layers=4, query_key_norm=True, pattern="ffss", window=3)
  raw = families.to_hugging_face(config, {}, "float32")
  assert (raw["use_sliding_window"], raw["max_window_layers"], raw["sliding_window"]) == (True, 2, 3)
  old = {name: value for name, value in raw.items() if name != "layer_types"}
  assert sliding(families.model_config(old, "old")) == sliding(config)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"pattern": "sf", "window": 3}, "model.pattern='sf': no family"),
    ({"pattern": "s", "window": 3, "biases": "q,k,v,o"}, "model.biases='q,k,v,o': no family"),
    ({"query_key_norm": True, "biases": "gate,up,down"}, "model.biases='gate,up,down': no family"),
    ({"biases": "q,k"}, "model.biases='q,k': no family"),
  ],
)
def test_what_transformers_would_not_compute_is_not_exported(options, message):
  with pytest.raises(InputError, match=message):
    families.to_hugging_face(ModelConfig(vocab=8, **options), {}, "float32")


@pytest.mark.parametrize(
  "change",
  [{"layer_types": ["sliding_attention"] * 3}, {"use_sliding_window": False}, {"sliding_window": None}],
)
def test_layer_types_that_the_other_keys_contradict_are_refused(change):
  config = ModelConfig(vocab=8, layers=4, query_key_norm=True, pattern="ffss", window=3)
  with pytest.raises(InputError, match="layer_types does not fit"):
    families.model_config(families.to_hugging_face(config, {}, "float32") | change, "config.json")


def test_a_gemma_whose_scale_is_the_usual_one_is_exported_with_it():
  config = families.model_config(json.loads((SAVED / "gemma2" / "config.json").read_text()), "")
  usual = dataclasses.replace(config, attention_scale=0.0)
  assert families.to_hugging_face(usual, {}, "float32")["query_pre_attn_scalar"] == usual.head_dim


@pytest.mark.parametrize("heads", [1, 3])
def test_an_exported_ensemble_is_read_as_one(heads):
  config = dataclasses.replace(families.model_config(published.LLAMA_3_2_1B, "x"), head="scalar", score_heads=heads)
  raw = families.to_hugging_face(config, {"eos_token_id": 1}, "float32")
  assert families.model_config(raw, "x").score_heads == heads


@pytest.mark.parametrize("labels", [{}, {"id2label": {"0": "NEGATIVE", "1": "POSITIVE"}}], ids=str)
def test_a_classifier_of_several_classes_is_no_reward_model(labels):
  raw = published.LLAMA_3_2_1B | {"architectures": ["LlamaForSequenceClassification"]} | labels
  with pytest.raises(InputError, match=r"config\.json: id2label has 2 classes; a reward model has one"):
    families.model_config(raw, "config.json")
