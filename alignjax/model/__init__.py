"""Models: a table of weights and pure functions of it.

Files here change that function: layers, adapters, quantised matrices. Code that only reads a model belongs elsewhere.
It may import `losses` (whose functions avoid logits) and `system`.
"""

from alignjax.model.config import ModelConfig
from alignjax.model.decoder import Model, Weight

__all__ = ["Model", "ModelConfig", "Weight"]
