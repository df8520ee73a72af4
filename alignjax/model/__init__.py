"""Models: a table of weights and pure functions of it.

What changes the function comes in here: layers, adapters, quantised matrices; what only reads a model does not.
It may import `losses` (for what never makes logits) and `system`.
"""

from alignjax.model.config import ModelConfig
from alignjax.model.decoder import Model, Weight

__all__ = ["Model", "ModelConfig", "Weight"]
