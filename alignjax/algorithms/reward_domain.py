"""The domain of a reward model, where it has seen data, as parameters beside the model's own.

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
from alignjax.types import Params


def of(model: Model) -> Model:
  """Returns `model`, a reward model, with the domain's parameters in place of its own; only `place` reads them.

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
  """Computes how far features [..., D] lie from the middle of the domain, [...], in its deviations."""
  return jnp.linalg.norm((features - domain["mean"]) @ domain["whitening"], axis=-1)


def place(domain: Params, features: jax.Array, rewards: jax.Array) -> dict[str, jax.Array]:
  """Returns "distance", "outside" and "z" [B] of texts with features [B, D].

  outside is 1.0 beyond the domain's limit. The z-score is of rewards [B], by the held-out mean and deviation; it is 0
  where the held-out rewards are all equal: there is no deviation to count in.

  Args:
    domain: parameters of `of`.
    features: the reward model's last hidden state at the last token, as in `reward.last_states`.
    rewards: of the same texts, of an ensemble their mean.
  """
  far = distance(domain, features)
  spread = domain["reward_std"]
  z = (rewards - domain["reward_mean"]) / jnp.where(spread > 0, spread, 1)
  return {
    "distance": far,
    "outside": (far > domain["limit"]).astype(jnp.float32),
    "z": jnp.where(spread > 0, z, 0),
  }
