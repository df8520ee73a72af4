"""Whether a text lies where a reward model has seen data: its domain as parameters beside the model's own.

A text's features are the reward model's last hidden state at its last token, which the reward is a linear function of.
The domain is a Gaussian of the training data's features (evaluation/reward_domain.py fits it, `alignjax domain` writes
it), so that every rollout's place in it is computed on the device with its reward.

Source: Lee et al. 2018, section 2.1 (arXiv:1807.03888): the Mahalanobis distance of features as a sign of foreign
inputs
"""

import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros

from alignjax.model import decoder
from alignjax.model.decoder import Model, Weight
from alignjax.types import Batch, Params


def of(model: Model) -> Model:
  """The domain of a reward model as the parameters of a model that only `place` reads.

  mean [D] and whitening [D, D]: |(features - mean) @ whitening| is the distance; limit []: beyond it a text lies
  outside; reward_mean, reward_std []: of held-out texts, for z-scores.
  """
  size = model.config.embed
  shapes = {"mean": (size,), "whitening": (size, size), "limit": (), "reward_mean": (), "reward_std": ()}
  table = {name: Weight(shape, (None,) * len(shape), zeros, dtype="float32") for name, shape in shapes.items()}
  return model._replace(
    weights=lambda: table,
    init=lambda key: decoder.init_weights(table, key, "float32"),
    trained=(),
  )


def distance(domain: Params, features: jax.Array) -> jax.Array:
  """How far features [..., D] lie from the middle of the domain, [...], in its deviations."""
  return jnp.linalg.norm((features - domain["mean"]) @ domain["whitening"], axis=-1)


def place(domain: Params, features: jax.Array, rewards: jax.Array) -> Batch:
  """Columns [B] of texts with features [B, D] and rewards [B]: distance, whether outside, and z-score.

  The z-score is 0 where the held-out rewards are all equal: there is no deviation to count in.
  """
  far = distance(domain, features)
  spread = domain["reward_std"]
  z = (rewards - domain["reward_mean"]) / jnp.where(spread > 0, spread, 1)
  return {
    "domain/distance": far,
    "domain/outside": (far > domain["limit"]).astype(jnp.float32),
    "domain/z": jnp.where(spread > 0, z, 0),
  }
