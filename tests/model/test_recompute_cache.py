"""Reading the row again for each token gives what the decoder's cache of keys and values gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.model import check, recompute_cache
from alignjax.sampling.generate import make_generate


@pytest.fixture(scope="module")
def again(model):
  """The decoder without its cache."""

  def forward(params, tokens, segment_ids, positions, cache=None):
    if cache is None:
      return model.forward(params, tokens, segment_ids, positions)
    states = lambda *inputs: model.forward(params, *inputs)[0]
    return recompute_cache.forward(states, cache, tokens, segment_ids, positions)

  return model._replace(forward=forward, init_cache=recompute_cache.empty, unstack=lambda params: params)


def test_completions_are_those_of_the_decoders_cache(model, again, params):
  prompts = np.array([[0, 0, 5, 6], [1, 2, 3, 4], [0, 0, 0, 9]], np.int32)
  numbers = np.arange(3, dtype=np.int32)
  options = {"key": jax.random.key(0), "prompt_ids": numbers, "sample_ids": numbers, "stop_id": 7, "pad_id": 0}
  lengths = np.array([2, 4, 1], np.int32)
  own, other = (make_generate(one, 12)(params, prompts, lengths, **options) for one in (model, again))
  np.testing.assert_array_equal(own.tokens, other.tokens)
  np.testing.assert_allclose(own.logps, other.logps, atol=1e-5)


@pytest.mark.parametrize("start", [0, -5, 3])
def test_ring_of_several_laps_holds_the_newest(model, again, params, start):
  step = jax.jit(model.forward), jax.jit(again.forward)
  caches = [one.init_cache(2, 6) | {"index": jnp.int32(start)} for one in (model, again)]
  tokens = np.random.default_rng(0).integers(0, 96, (2, 17)).astype(np.int32)
  place = 0
  for count in (4, 1, 1, 3, 1, 1, 6):
    part = tokens[:, place : place + count]
    positions = np.broadcast_to(np.arange(place, place + count), part.shape)
    hidden = []
    for number in (0, 1):
      found, caches[number] = step[number](params, part, np.ones_like(part), positions, caches[number])
      hidden.append(found)
    if place < 6 or count == 6:  # beyond, keys that were laid down know of tokens that the ring has lost
      np.testing.assert_allclose(*hidden, atol=1e-5)
    place += count
  assert caches[1]["index"] == start + place
  np.testing.assert_array_equal(np.sort(caches[1]["tokens"]), np.sort(tokens[:, -6:]))


def test_our_decoder_keeps_the_laws(model, params, mesh):
  with jax.set_mesh(mesh):
    check.check(model, params)
