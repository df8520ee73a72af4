"""A model config that can not work says which field is wrong."""

import pytest

from alignjax.errors import InputError
from alignjax.model import ModelConfig


@pytest.mark.parametrize(
  ("field", "value"),
  [("head", "vector"), ("dtype", "float16"), ("remat", "some"), ("attention", "magic")],
)
def test_an_unknown_option_names_the_field_and_the_choices(field, value):
  with pytest.raises(InputError, match=rf"model\.{field}='{value}': use one of "):
    ModelConfig(vocab=8, **{field: value})


@pytest.mark.parametrize("field", ["layers", "embed", "heads", "kv_heads", "head_dim", "mlp"])
def test_a_size_is_positive(field):
  with pytest.raises(InputError, match=rf"model\.{field}=0"):
    ModelConfig(vocab=8, **{field: 0})


def test_query_heads_are_a_multiple_of_key_heads():
  with pytest.raises(InputError, match=r"model\.heads=4 is not a multiple of model\.kv_heads=3"):
    ModelConfig(vocab=8, heads=4, kv_heads=3)


def test_the_head_size_is_even():
  with pytest.raises(InputError, match=r"model\.head_dim=7"):
    ModelConfig(vocab=8, head_dim=7)
