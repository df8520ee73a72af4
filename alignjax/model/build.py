"""The model of a config: our decoder, or the model that `model.module` names."""

import importlib

from alignjax.errors import InputError
from alignjax.model import decoder
from alignjax.model.config import ModelConfig
from alignjax.model.decoder import Model


def make(config: ModelConfig) -> Model:
  """Builds the model that `config` describes: the decoder, or that of `config.module`.

  Args:
    config: with its vocabulary, which must not be 0.

  Raises:
    InputError: `config.module` cannot be imported, fails, or does not make a model of this config.
  """
  if config.module:
    return _named(config)
  return decoder.make(config)


def _named(config: ModelConfig) -> Model:
  """Returns the model that the function `config.module`, "module:function", makes of the config."""
  place = f"model.module={config.module}"
  module, _, name = config.module.partition(":")
  try:
    function = getattr(importlib.import_module(module), name)
  except Exception as error:  # the module is the user's own code
    raise InputError(
      f"{place}: {type(error).__name__}: {error}; give module:function, with the module's folder in PYTHONPATH"
    ) from error
  try:
    model = function(config)
  except InputError as error:
    raise InputError(f"{place}: {error}") from error
  except Exception as error:
    raise InputError(f"{place}: {type(error).__name__}: {error}; it must take a ModelConfig") from error
  if not isinstance(model, Model):
    raise InputError(f"{place}: returns a {type(model).__name__}; return a Model, such as model.flax.wrap makes")
  if (model.config.vocab, model.config.head) != (config.vocab, config.head):
    raise InputError(f"{place}: returns a model of another config; hand on the config that it is called with")
  return model
