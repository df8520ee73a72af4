"""The decoder's parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.model.layers import einsum, rms_norm, rotary_angles, rotary_frequencies, rotate

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("equation", ["btd,dnh->btnh", "btnh,nhd->btd", "btd,df->btf"])
def test_bfloat16_einsum_and_its_gradients_are_float32_products_rounded_once(equation):
  sizes = dict(zip("btdnhf", (2, 5, 16, 4, 8, 24), strict=True))
  inputs, out = equation.split("->")
  x, w = (RNG.normal(size=[sizes[axis] for axis in names]) for names in inputs.split(","))
  x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.float32)
  g = jnp.asarray(RNG.normal(size=[sizes[axis] for axis in out]), jnp.bfloat16)

  wide = lambda x, w: jnp.einsum(equation, x, w, precision="highest")
  expected, expected_vjp = jax.vjp(wide, x.astype(jnp.float32), w.astype(jnp.bfloat16).astype(jnp.float32))
  value, vjp = jax.vjp(lambda x, w: einsum(equation, x, w), x, w)
  pairs = zip((value, *vjp(g)), (expected, *expected_vjp(g.astype(jnp.float32))), strict=True)
  assert value.dtype == jnp.bfloat16
  for got, exact in pairs:
    np.testing.assert_allclose(np.float32(got), exact, rtol=2**-7, atol=1e-3)


def test_einsum_in_float32_is_jax_numpys():
  x, w = jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float32), jnp.asarray(RNG.normal(size=(4, 5)))
  np.testing.assert_array_equal(einsum("btd,df->btf", x, w), jnp.einsum("btd,df->btf", x, w))


def test_rms_norm_yields_root_mean_square_one_times_scale():
  x = RNG.normal(size=(3, 64)).astype(np.float32) * 100
  out = np.asarray(rms_norm(jnp.asarray(x), jnp.full(64, 2.0), 1e-6))
  np.testing.assert_allclose(np.sqrt((out**2).mean(axis=-1)), 2.0, rtol=1e-5)


def test_rms_norm_of_small_bfloat16_numbers_does_not_underflow():
  x = jnp.full((1, 64), 1e-3, jnp.bfloat16)
  np.testing.assert_allclose(np.float32(rms_norm(x, jnp.ones(64), 1e-12)), 1.0, rtol=1e-2)


def test_rotary_scores_depend_on_distance_alone():
  q, k = RNG.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

  def score(query_position, key_position):
    at = lambda x, position: rotate(x, rotary_angles(np.array([[position]]), rotary_frequencies(16, 10_000.0)))
    return float(jnp.vdot(at(q, query_position), at(k, key_position)))

  assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
  assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_rotary_angles_at_position_zero_turn_nothing():
  x = RNG.normal(size=(1, 2, 3, 8)).astype(np.float32)
  np.testing.assert_array_equal(rotate(x, rotary_angles(np.zeros((1, 2), np.int32), rotary_frequencies(8, 100.0))), x)
