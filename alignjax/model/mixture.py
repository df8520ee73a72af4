"""Two policies as one Model that any sampler takes: their geometric mixture p^(1 - c) p_ref^c, token by token.

Its hidden states are those of both models concatenated, [c h_ref ; (1 - c) h], and so are the unembeddings. The logits
are those of `losses.online_preference.mixture_logits`, and no array of size tokens x vocabulary is made twice.
"""

import jax
import jax.numpy as jnp
from jax.nn.initializers import constant

from alignjax.losses.chunks import Capped
from alignjax.model.decoder import Model, Weight
from alignjax.types import Params

PARTS = ("reference", "policy")


def mix(model: Model) -> Model:
  """Makes the model of mixtures: its parameters are {"policy", "reference", "coef"}, two of `model` and the scalar c.

  Args:
    model: without final_softcap, which is not supported here.

  Source: Munos et al. 2023, eq. 5 (arXiv:2312.00886)
  """

  def forward(params, tokens, segment_ids, positions, cache=None):
    shares = {"reference": params["coef"], "policy": 1 - params["coef"]}
    states = []
    caches = {}
    for name in PARTS:
      part_cache = None
      if cache:
        part_cache = {"index": cache["index"]} | cache[name]
      hidden, caches[name] = model.forward(params[name], tokens, segment_ids, positions, part_cache)
      states.append((shares[name] * hidden).astype(hidden.dtype))
    states = jnp.concatenate(states, axis=-1)
    if not cache:
      return states, None
    return states, _paired(caches)

  def unembedding(params: Params) -> jax.Array:
    matrices = []
    for name in PARTS:
      matrix = model.unembedding(params[name])
      assert not isinstance(matrix, Capped)  # nash_md refuses such a model
      matrices.append(matrix)
    return jnp.concatenate(matrices, axis=-1)

  return Model(
    model.config,
    weights=lambda: {name: model.weights() for name in PARTS} | {"coef": Weight((), (), constant(0.5))},
    init=lambda key: {name: model.init(key) for name in PARTS} | {"coef": jnp.float32(0.5)},
    forward=forward,
    init_cache=lambda rows, columns: _paired({name: model.init_cache(rows, columns) for name in PARTS}),
    unembedding=unembedding,
    unstack=lambda params: params | {name: model.unstack(params[name]) for name in PARTS},
  )


def _paired(caches):
  """Returns the caches of both parts as one, with the index that they share."""
  paired = {"index": caches[PARTS[0]]["index"]}
  for part, cache in caches.items():
    paired[part] = {name: tree for name, tree in cache.items() if name != "index"}
  return paired
