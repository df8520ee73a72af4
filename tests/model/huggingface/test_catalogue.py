"""The catalogue's sizes give the parameter counts that their makers publish."""

import pytest

from alignjax.errors import InputError
from alignjax.model import ModelConfig, decoder
from alignjax.model.huggingface.catalogue import MODELS, sizes


def sees_images(embed):
  """What Gemma 3 counts beside its text model: SigLIP (27 layers of 1152, patches of 14 x 14), and a projection."""
  width, mlp = 1152, 4304
  layer = 4 * (width + 1) * width + 2 * width * mlp + mlp + width + 4 * width
  return (3 * 14 * 14 + 1) * width + 4096 * width + 27 * layer + 2 * width + width * embed + width


# Of the safetensors index of each model on Hugging Face.
PUBLISHED = {
  "llama-3.2-1b": 1_235_814_400,
  "llama-3.2-3b": 3_212_749_824,
  "llama-3.1-8b": 8_030_261_248,
  "llama-3.1-70b": 70_553_706_496,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "qwen3-14b": 14_768_307_200,
  "qwen3-32b": 32_762_123_264,
  "gemma-2-2b": 2_614_341_888,
  "gemma-2-9b": 9_241_705_984,
  "gemma-2-27b": 27_227_128_320,
  "gemma-3-1b": 999_885_952,
  "gemma-3-4b": 4_300_079_472 - sees_images(2560),
  "gemma-3-12b": 12_187_325_040 - sees_images(3840),
  "gemma-3-27b": 27_432_406_640 - sees_images(5376),
  "mistral-7b": 7_248_023_552,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_has_its_published_number_of_parameters(name):
  assert decoder.make(MODELS[name]).num_params() == PUBLISHED[name]


def test_a_published_model_is_computed_as_the_run_says():
  own = ModelConfig(vocab=100, dtype="bfloat16", remat="full", layers=1)
  found = sizes("llama-3.1-8b", own)
  assert (found.layers, found.vocab, found.dtype, found.remat) == (32, 128_256, "bfloat16", "full")


def test_an_unknown_model_names_the_nearest():
  with pytest.raises(InputError, match=r"the nearest is llama-3\.1-8b"):
    sizes("llama-3-8b", ModelConfig())
