"""Attention against a dense float64 computation."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.errors import InputError
from alignjax.model.attention import kernel
from alignjax.model.attention.attention import QUERY_BLOCK, attention, cached_attention
from alignjax.model.attention.form import Form
from alignjax.system import sharding

PLAIN = Form(8**-0.5)
FORMS = {
  "plain": PLAIN,
  "scaled": Form(0.7),
  "capped": Form(8**-0.5, softcap=1.5),
  "window": Form(8**-0.5, window=7),
  "wide window": Form(8**-0.5, window=QUERY_BLOCK + 5),
  "all": Form(0.7, softcap=1.5, window=7),
}

IMPLEMENTATIONS = ("xla", "splash")  # the kernel is interpreted


def dense(q, k, v, query_segments, key_segments, first_column=0, form=PLAIN):
  """[B, T, N, H] in float64: every head and every query by itself."""
  B, T, N, H = q.shape
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((B, T, N, H))
  for b, t, n in np.ndindex(B, T, N):
    shared = n // (N // k.shape[2])
    columns = np.arange(k.shape[1])
    seen = (columns <= first_column + t) & (key_segments[b] == query_segments[b, t])
    seen &= columns > first_column + t - (form.window or len(columns))
    scores = k[b, seen, shared] @ q[b, t, n] * form.scale
    scores = form.softcap * np.tanh(scores / form.softcap) if form.softcap else scores
    weights = np.exp(scores)
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


def cached(q, k, v, query_segments, key_segments, turn=0, form=PLAIN):
  """`cached_attention` over the same keys and values, laid out as a ring that begins in column `turn`."""
  columns = k.shape[1]
  k, v, key_segments = (np.roll(x, turn, axis=1) for x in (k, v, key_segments))
  last = jnp.int32((columns - 1 + turn) % columns)
  keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
  return jax.jit(cached_attention, static_argnums=0)(form, q, keys, values, query_segments, key_segments, last)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("length", [24, QUERY_BLOCK, 2 * QUERY_BLOCK + 3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_equals_the_dense_computation(implementation, length, form):
  *qkv, segments, _ = inputs(length, rows=1, heads=2, kv_heads=1)
  out = jax.jit(attention, static_argnums=(0, 1))(implementation, form, *qkv, segments)
  np.testing.assert_allclose(out, dense(*qkv, segments, segments, form=form), atol=3e-6)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_equal_those_of_the_softmax_written_out(implementation, form):
  q, k, v, segments, _ = inputs(QUERY_BLOCK + 30, rows=1)

  def plain(q, k, v):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bcnh->bntc", q, k) * form.scale
    scores = form.softcap * jnp.tanh(scores / form.softcap) if form.softcap else scores
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    seen = (distance >= 0) & (distance < (form.window or q.shape[1])) & (segments[:, :, None] == segments[:, None])
    return jnp.einsum("bntc,bcnh->btnh", jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30)), v)

  gradients = lambda f: jax.jit(jax.grad(lambda *qkv: jnp.sum(jnp.sin(f(*qkv))), argnums=(0, 1, 2)))(q, k, v)
  for found, expected in zip(
    gradients(lambda *qkv: attention(implementation, form, *qkv, segments)), gradients(plain), strict=True
  ):
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
  "sizes",
  [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "sequence": 4}],
  ids=str,
)
def test_the_kernel_on_a_mesh_equals_itself_alone(sizes):
  q, k, v, segments, _ = inputs(128, rows=8)
  gradients = lambda: jax.jit(
    jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(attention("splash", FORMS["all"], *qkv, segments))), (0, 1, 2))
  )(q, k, v)
  alone = gradients()
  with jax.set_mesh(sharding.make_mesh(**sizes)):
    jax.tree.map(
      lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6), gradients(), alone
    )


def test_heads_that_the_mesh_does_not_divide_are_an_input_error():
  *qkv, segments, _ = inputs(24, heads=4, kv_heads=2)
  message = "sequence x tensor = 8 does not divide the 4 heads"
  with jax.set_mesh(sharding.make_mesh(fsdp=1, sequence=8)), pytest.raises(InputError, match=message):
    jax.eval_shape(lambda *x: attention("xla", PLAIN, *x), *qkv, segments)


def test_automatic_is_the_kernel_on_tpus_and_not_elsewhere():
  arguments = inputs(24)[:-1]
  programs = {name: str(jax.make_jaxpr(lambda *x: attention(name, PLAIN, *x))(*arguments)) for name in ("auto", "xla")}  # noqa: B023
  assert programs["auto"] == programs["xla"]
  assert "pallas_call" not in programs["auto"]
  with mock.patch.object(kernel, "platform", return_value="tpu"):
    assert "pallas_call" in str(jax.make_jaxpr(lambda *x: attention("auto", PLAIN, *x))(*arguments))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("queries", [1, 5, 24])
def test_the_newest_tokens_of_a_cache_see_the_columns_before_them(queries, form):
  arguments = inputs(queries, columns=24)
  expected = dense(*arguments, first_column=24 - queries, form=form)
  for turn in (0, 3, 23):
    np.testing.assert_allclose(cached(*arguments, turn=turn, form=form), expected, atol=3e-6)


def test_grouped_heads_equal_repeated_key_heads():
  q, k, v, segments, _ = inputs(24)
  repeated = attention("xla", PLAIN, q, k.repeat(2, axis=2), v.repeat(2, axis=2), segments)
  np.testing.assert_allclose(attention("xla", PLAIN, q, k, v, segments), repeated, atol=1e-6)


def test_a_query_that_sees_nothing_yields_a_number():
  q, k, v, _, key_segments = inputs(4)
  out = cached(q, k, v, np.full((2, 4), 9, np.int32), key_segments)
  assert np.isfinite(out).all()


def test_large_scores_do_not_overflow():
  q, k, v, *segments = inputs(24)
  assert np.isfinite(attention("xla", PLAIN, 1e4 * q, 1e4 * k, v, segments[0])).all()
  assert np.isfinite(cached(1e4 * q, 1e4 * k, v, *segments)).all()


def test_bfloat16_keeps_its_dtype_and_its_three_digits():
  q, k, v, *segments = inputs(24)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  for out in (attention("xla", PLAIN, *half, segments[0]), cached(*half, *segments)):
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), dense(*half, *segments), atol=0.03)


def test_an_unknown_implementation_is_an_error():
  with pytest.raises(ValueError, match="magic"):
    attention("magic", PLAIN, *inputs(4)[:-1])
