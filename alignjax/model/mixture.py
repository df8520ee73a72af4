"""Two policies as one: the geometric mixture p^(1 - c) p_ref^c, token by token, as a Model that any sampler takes.

Its states are both models' side by side, [c h_ref ; (1 - c) h], and so are their unembeddings: the logits of the pair
are those of `losses.online_preference.mixture_logits`, and nothing of size tokens x vocabulary is made twice.
"""

import jax
import jax.numpy as jnp
from jax.nn.initializers import constant

from alignjax.model.decoder import Model, Weight
from alignjax.types import Params

PARTS = ("reference", "policy")


def mix(model: Model) -> Model:
  """The mixture of two parameters of `model`: {"policy", "reference", "coef"}, coef being c, a scalar.

  Source: Munos et al. 2023, eq. 5 (arXiv:2312.00886)
  """

  def shares(params):
    return dict(zip(PARTS, (params["coef"], 1 - params["coef"]), strict=True))

  def forward(params, tokens, segment_ids, positions, cache=None):
    states, kept = [], {}
    for name, share in shares(params).items():
      own = {"index": cache["index"]} | cache[name] if cache else None
      hidden, own = model.forward(params[name], tokens, segment_ids, positions, own)
      states.append((share * hidden).astype(hidden.dtype))
      kept |= {name: own}
    return jnp.concatenate(states, axis=-1), _paired(kept) if cache else None

  def unembedding(params: Params) -> jax.Array:
    return jnp.concatenate([model.unembedding(params[name]) for name in PARTS], axis=-1)

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
  """The caches as one, whose index is theirs."""
  arrays = lambda cache: {name: tree for name, tree in cache.items() if name != "index"}
  return {name: arrays(cache) for name, cache in caches.items()} | {"index": caches[PARTS[0]]["index"]}
