"""Attention against a dense float64 computation."""

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.model.attention import QUERY_BLOCK, attention, cached_attention


def dense(q, k, v, query_segments, key_segments, first_column=0):
  """[B, T, N, H] in float64: every head and every query by itself."""
  B, T, N, H = q.shape
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((B, T, N, H))
  for b, t, n in np.ndindex(B, T, N):
    shared = n // (N // k.shape[2])
    columns = np.arange(k.shape[1])
    seen = (columns <= first_column + t) & (key_segments[b] == query_segments[b, t])
    weights = np.exp(k[b, seen, shared] @ q[b, t, n] / np.sqrt(H))
    out[b, t, n] = weights @ v[b, seen, shared] / weights.sum()
  return out


def inputs(length, columns=None, rows=2, heads=4, kv_heads=2, size=8, seed=0):
  """q, k, v and the segment ids of rows of three segments; queries are the last of the columns."""
  rng = np.random.default_rng(seed)
  columns = columns or length
  q = rng.normal(size=(rows, length, heads, size)).astype(np.float32)
  k, v = rng.normal(size=(2, rows, columns, kv_heads, size)).astype(np.float32)
  segments = np.sort(rng.integers(1, 4, (rows, columns)), axis=1).astype(np.int32)
  return q, k, v, segments[:, columns - length :], segments


def cached(q, k, v, query_segments, key_segments, turn=0):
  """`cached_attention` over the same keys and values, laid out as a ring that begins in column `turn`."""
  columns = k.shape[1]
  k, v, key_segments = (np.roll(x, turn, axis=1) for x in (k, v, key_segments))
  last = jnp.int32((columns - 1 + turn) % columns)
  return cached_attention(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), query_segments, key_segments, last)


@pytest.mark.parametrize("length", [24, QUERY_BLOCK, 2 * QUERY_BLOCK + 3])
def test_attention_equals_the_dense_computation(length):
  *qkv, segments, _ = inputs(length, rows=1, heads=2, kv_heads=1)
  np.testing.assert_allclose(attention("xla", *qkv, segments), dense(*qkv, segments, segments), atol=2e-6)


@pytest.mark.parametrize("queries", [1, 5, 24])
def test_the_newest_tokens_of_a_cache_see_all_columns_before_them(queries):
  arguments = inputs(queries, columns=24)
  expected = dense(*arguments, first_column=24 - queries)
  for turn in (0, 3, 23):
    np.testing.assert_allclose(cached(*arguments, turn=turn), expected, atol=2e-6)


def test_grouped_heads_equal_repeated_key_heads():
  q, k, v, segments, _ = inputs(24)
  repeated = attention("xla", q, k.repeat(2, axis=2), v.repeat(2, axis=2), segments)
  np.testing.assert_allclose(attention("xla", q, k, v, segments), repeated, atol=1e-6)


def test_a_query_that_sees_nothing_yields_a_number():
  q, k, v, _, key_segments = inputs(4)
  out = cached(q, k, v, np.full((2, 4), 9, np.int32), key_segments)
  assert np.isfinite(out).all()


def test_large_scores_do_not_overflow():
  q, k, v, *segments = inputs(24)
  assert np.isfinite(attention("xla", 1e4 * q, 1e4 * k, v, segments[0])).all()
  assert np.isfinite(cached(1e4 * q, 1e4 * k, v, *segments)).all()


def test_bfloat16_keeps_its_dtype_and_its_three_digits():
  q, k, v, *segments = inputs(24)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  for out in (attention("xla", *half, segments[0]), cached(*half, *segments)):
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), dense(*half, *segments), atol=0.03)


def test_an_unknown_implementation_is_an_error():
  with pytest.raises(ValueError, match="magic"):
    attention("magic", *inputs(4)[:-1])
