"""Laws of the mixture of two policies: its logits are those of the formula, its samples those of the ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.online_preference import mixture_logits
from alignjax.model import ModelConfig, decoder, mixture
from alignjax.sampling.generate import make_generate, sampling_logps
from alignjax.sampling.queue import make_generate_queue

VOCAB, ROWS, WIDTH, NEW = 24, 6, 5, 8
MODEL = decoder.make(ModelConfig(vocab=VOCAB, layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48))
MIXED = mixture.mix(MODEL)


def params(coef):
  louder = lambda p: p | {"embed": 8 * p["embed"]}  # logits that differ enough for their order to matter
  made = {name: louder(jax.jit(MODEL.init)(jax.random.key(i))) for i, name in enumerate(mixture.PARTS)}
  return made | {"coef": jnp.float32(coef)}


def inputs():
  tokens = np.random.default_rng(0).integers(4, VOCAB, (ROWS, WIDTH)).astype(np.int32)
  return tokens, np.full(ROWS, WIDTH, np.int32)


def drawn(make, weights, *args):
  ids = np.arange(ROWS, dtype=np.int32)
  options = {"key": jax.random.key(1), "prompt_ids": ids, "sample_ids": 0 * ids, "stop_id": 3, "pad_id": 0}
  found = make(weights, *inputs(), *args, **options)
  return jax.device_get(found[0] if isinstance(found, tuple) else found)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, weights, tokens):
  hidden, _ = model.forward(weights, tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(WIDTH), tokens.shape))
  return jnp.einsum("btd,vd->btv", hidden, model.unembedding(weights))


@pytest.mark.parametrize("coef", [0.0, 0.125, 0.5, 1.0])
def test_its_logits_are_those_of_the_formula(coef):
  weights, tokens = params(coef), jnp.asarray(inputs()[0])
  policy, reference = (logits(MODEL, weights[name], tokens) for name in ("policy", "reference"))
  expected = mixture_logits(policy, reference, coef)
  np.testing.assert_allclose(logits(MIXED, weights, tokens), expected, atol=1e-4)


@pytest.mark.parametrize(("coef", "whose"), [(0.0, "policy"), (1.0, "reference")])
def test_at_the_ends_its_samples_are_one_sides(coef, whose):
  weights = params(coef)
  mixed = drawn(make_generate(MIXED, NEW), weights)
  alone = drawn(make_generate(MODEL, NEW), weights[whose])
  np.testing.assert_array_equal(mixed.tokens, alone.tokens)
  np.testing.assert_allclose(mixed.logps, alone.logps, atol=1e-5)


def test_between_the_ends_the_sampled_tokens_have_the_mixtures_log_probs():
  weights, (tokens, _) = params(0.25), inputs()
  samples = drawn(make_generate(MIXED, NEW), weights)
  first = sampling_logps(logits(MIXED, weights, jnp.asarray(tokens))[:, -1], excluded=0)
  np.testing.assert_allclose(samples.logps[:, 0], first[np.arange(ROWS), samples.tokens[:, 0]], atol=1e-4)
  others = [drawn(make_generate(MODEL, NEW), weights[name]).tokens for name in mixture.PARTS]
  assert not any(np.array_equal(samples.tokens, other) for other in others)


def test_slots_that_take_the_next_prompt_draw_the_same():
  weights = params(0.5)
  static, queued = (
    drawn(make, weights)
    for make in (make_generate(MIXED, NEW), make_generate_queue(MIXED, NEW, 4 * jax.device_count()))
  )
  np.testing.assert_array_equal(queued.tokens, static.tokens)


def test_its_table_is_that_of_its_parameters():
  made = jax.jit(MIXED.init)(jax.random.key(0))
  jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), made, MIXED.abstract())
