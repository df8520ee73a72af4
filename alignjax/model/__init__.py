"""Models: a table of weights and pure functions of it."""

from alignjax.model.config import ModelConfig
from alignjax.model.decoder import Model, Weight

__all__ = ["Model", "ModelConfig", "Weight"]
