"""Log-probabilities in chunks against the whole matrix of logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.logps import (
  next_token_logps,
  next_token_scores,
  segment_sum,
  token_logps,
  token_scores,
)
from alignjax.losses.support import Support
from tests import golden
from tests.model.reference import log_softmax

B, T, D, V = 3, 13, 16, 101


def inputs(dtype=np.float32, scale=1.0):
  """hidden [B, T, D], unembedding [V, D], targets [B, T] and a cotangent [B, T]."""
  rng = np.random.default_rng(0)
  hidden, unembedding = rng.normal(size=(B, T, D)), scale * rng.normal(size=(V, D))
  arrays = (jnp.asarray(x, dtype) for x in (hidden, unembedding, rng.normal(size=(B, T))))
  hidden, unembedding, cotangent = arrays
  return hidden, unembedding, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32), cotangent


def dense(hidden, unembedding, targets, temperature=1.0):
  """token_logps with all logits at once, in the inputs' dtype."""
  logits = jnp.einsum("btd,vd->btv", hidden, unembedding, precision="highest") / temperature
  logps = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnums=(0, 5))
def value_and_grads(f, hidden, unembedding, targets, cotangent, arguments=()):
  """f's values [B, T] and its gradients to hidden and unembedding."""
  score = lambda h, u: f(h, u, targets, *arguments)
  values, vjp = jax.vjp(score, hidden, unembedding)
  return values, *vjp(cotangent)


@pytest.mark.parametrize(
  ("chunk", "temperature"),
  [(None, 1.0), (1, 1.0), (4, 1.0), (13, 1.0), (50, 1.0), (None, 0.7), (5, 1.7)],
)
def test_values_and_gradients_equal_the_dense_computation(chunk, temperature):
  got = value_and_grads(token_logps, *inputs(), (temperature, chunk))
  expected = value_and_grads(dense, *inputs(), (temperature,))
  for one, other in zip(got, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_float64_agrees_to_its_own_precision(temperature):
  with jax.enable_x64(True):
    got = value_and_grads(token_logps, *inputs(np.float64), (temperature, 4))
    expected = value_and_grads(dense, *inputs(np.float64), (temperature,))
    for one, other in zip(got, expected, strict=True):
      assert one.dtype == jnp.float64
      np.testing.assert_allclose(one, other, atol=1e-12, rtol=1e-12)


def test_gradients_equal_finite_differences():
  with jax.enable_x64(True):
    hidden, unembedding, targets, cotangent = inputs(np.float64)
    _, d_hidden, d_unembedding = value_and_grads(token_logps, hidden, unembedding, targets, cotangent, (1.0, 4))
    total = lambda h, u: float(jnp.vdot(cotangent, token_logps(h, u, targets, chunk=4)))
    rng, step = np.random.default_rng(1), 1e-6
    along_hidden, along_unembedding = rng.normal(size=hidden.shape), rng.normal(size=(V, D))
    ahead = total(hidden + step * along_hidden, unembedding + step * along_unembedding)
    behind = total(hidden - step * along_hidden, unembedding - step * along_unembedding)
    slope = np.vdot(d_hidden, along_hidden) + np.vdot(d_unembedding, along_unembedding)
    assert (ahead - behind) / (2 * step) == pytest.approx(float(slope), rel=1e-7)


def test_bfloat16_inputs_lose_no_more_than_their_own_rounding():
  # The scores are float32 sums of bfloat16 products, so the values equal float32 arithmetic on the rounded inputs; the
  # gradients' operands are rounded to 8 bits once more: within 1% of the largest was measured.
  hidden, unembedding, targets, cotangent = inputs(jnp.bfloat16)
  cotangent = cotangent.astype(jnp.float32)
  values, *grads = value_and_grads(token_logps, hidden, unembedding, targets, cotangent, (1.0, 4))
  wide = (hidden.astype(jnp.float32), unembedding.astype(jnp.float32), targets, cotangent)
  expected, *expected_grads = value_and_grads(dense, *wide)
  assert values.dtype == jnp.float32
  np.testing.assert_allclose(values, expected, atol=1e-5)
  for one, other in zip(grads, expected_grads, strict=True):
    assert one.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(one), other, atol=0.01 * np.abs(other).max())


def test_extreme_logits_stay_finite():
  got = value_and_grads(token_logps, *inputs(scale=1e4), (1.0, 4))
  assert all(np.isfinite(x).all() for x in got)
  assert got[0].min() < -1e4
  assert got[0].max() <= 0


def test_entropy_top1_and_squares_equal_the_dense_computation():
  hidden, unembedding, targets, _ = inputs()
  logits = np.float64(hidden) @ np.float64(unembedding).T / 0.7
  best = logits.argmax(axis=-1)
  targets = np.where(np.arange(T) % 2, targets, best).astype(np.int32)  # half of them are the likeliest
  asked = {"entropy": True, "log_sum_sq_probs": True}
  scores = token_scores(hidden, unembedding, targets, temperature=0.7, chunk=4, **asked)
  logps = log_softmax(logits)
  np.testing.assert_allclose(scores.log_sum_sq_probs, np.log(np.exp(2 * logps).sum(axis=-1)), atol=1e-5)
  np.testing.assert_allclose(scores.entropy, -(np.exp(logps) * logps).sum(axis=-1), atol=1e-5)
  np.testing.assert_array_equal(scores.is_top1, targets == best)


def test_only_log_probabilities_have_a_gradient():
  hidden, unembedding, targets, _ = inputs()

  def other_fields(h):
    scores = token_scores(h, unembedding, targets, entropy=True, log_sum_sq_probs=True)
    return scores.entropy.sum() + scores.is_top1.sum() + scores.log_sum_sq_probs.sum()

  assert not jax.grad(other_fields)(hidden).any()


@pytest.mark.parametrize("excluded", [None, 3])
def test_the_gradient_of_the_entropy_equals_the_dense_computation(excluded):
  hidden, unembedding, targets, cotangent = inputs()
  targets = jnp.where(targets == excluded, 4, targets) if excluded else targets
  asked = {"entropy": True, "entropy_gradient": True, "support": Support(excluded)}

  def chunked(h, u, targets):
    scores = token_scores(h, u, targets, 0.7, 5, **asked)
    return scores.entropy + 0.3 * scores.logps

  def whole(h, u, targets):
    logits = jnp.einsum("btd,vd->btv", h, u, precision="highest") / 0.7
    logits = jnp.delete(logits, excluded, axis=-1) if excluded else logits
    logps = jax.nn.log_softmax(logits)
    places = targets - (targets > excluded) if excluded else targets
    return -jnp.sum(jnp.exp(logps) * logps, axis=-1) + 0.3 * jnp.take_along_axis(logps, places[..., None], -1)[..., 0]

  got, expected = (value_and_grads(f, hidden, unembedding, targets, cotangent) for f in (chunked, whole))
  for one, other in zip(got, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)


def test_entropy_of_a_certain_token_is_zero_and_of_no_knowledge_log_v():
  unembedding = jnp.eye(V, D)
  certain = token_scores(jnp.eye(D)[None, :1] * 1e4, unembedding, jnp.zeros((1, 1), int), entropy=True)
  ignorant = token_scores(jnp.zeros((1, 1, D)), unembedding, jnp.zeros((1, 1), int), entropy=True)
  assert certain.entropy[0, 0] == pytest.approx(0, abs=1e-6)
  assert ignorant.entropy[0, 0] == pytest.approx(np.log(V), abs=1e-5)


def test_next_token_logps_score_each_token_given_the_past():
  hidden, unembedding, tokens, _ = inputs()
  got = next_token_logps(hidden, unembedding, tokens)
  np.testing.assert_array_equal(got[:, 0], 0)
  np.testing.assert_allclose(got[:, 1:], dense(hidden[:, :-1], unembedding, tokens[:, 1:]), atol=1e-5)


def test_every_field_of_next_token_scores_is_aligned_with_its_token():
  hidden, unembedding, tokens, _ = inputs()
  aligned = next_token_scores(hidden, unembedding, tokens, entropy=True)
  scores = token_scores(hidden[:, :-1], unembedding, tokens[:, 1:], entropy=True)
  for one, other in zip(aligned, scores, strict=True):
    np.testing.assert_array_equal(one[:, 0], 0)
    np.testing.assert_allclose(one[:, 1:], other, atol=1e-6)


def test_segment_sum_adds_within_rows_and_leaves_padding_out():
  values = jnp.array([[1.0, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32]])
  segment_ids = jnp.array([[1, 1, 2, 2, 2, 0], [0, 3, 3, 1, 1, 1]])
  np.testing.assert_array_equal(segment_sum(values, segment_ids, 3), [[3, 28, 0], [56, 0, 6]])


def test_segment_sum_ignores_what_is_not_finite_elsewhere():
  values = jnp.array([[1.0, jnp.nan, jnp.inf]])
  np.testing.assert_array_equal(segment_sum(values, jnp.array([[1, 0, 0]]), 1), [[1.0]])


def score_logits(logits, targets, **kwargs):
  """token_scores of given logits [B, T, V]: the unembedding is the identity."""
  logits = jnp.asarray(logits)
  eye = jnp.eye(logits.shape[-1], dtype=logits.dtype)
  return token_scores(logits, eye, jnp.asarray(targets, jnp.int32), entropy=True, **kwargs)


def test_golden_selective_log_softmax_and_entropy():
  section = golden.section("helpers")
  given, expected = section["inputs"], section["outputs"]
  with jax.enable_x64(True):
    plain = score_logits(given["logits"], given["index"])
    np.testing.assert_allclose(plain.logps, expected["selective_log_softmax"], atol=1e-6)
    np.testing.assert_allclose(plain.entropy, expected["entropy_from_logits"], atol=1e-6)

    cooled = score_logits(given["logits"], given["index"], temperature=given["temperature"])
    mask = np.array(given["row_mask"])
    at_temperature = f"T{given['temperature']}_row_mask"
    for name, values in (
      (f"selective_log_softmax_{at_temperature}", cooled.logps),
      (f"joint_{at_temperature}_logps", cooled.logps),
      (f"joint_{at_temperature}_entropy", cooled.entropy),
    ):
      np.testing.assert_allclose(mask * values, expected[name], atol=1e-6, err_msg=name)

    extreme = score_logits(given["logits_extreme"], given["index_extreme"])
    np.testing.assert_allclose(extreme.logps, expected["selective_log_softmax_extreme"], atol=1e-6)


def test_golden_top_k_log_softmax():
  section = golden.section("helpers")
  index = np.array(section["inputs"]["index_topk"])
  with jax.enable_x64(True):
    for k, expected in enumerate(np.moveaxis(section["outputs"]["selective_log_softmax_topk"], -1, 0)):
      got = score_logits(section["inputs"]["logits"], index[..., k]).logps
      np.testing.assert_allclose(got, expected, atol=1e-6)


def test_golden_grpo_logps_end_to_end():
  section = golden.section("grpo_logps_end_to_end")
  given = section["inputs"]
  kept = given["logits_to_keep"]
  targets = np.array(given["prompt_completion_ids"])[:, -kept:]
  mask = np.array(given["attention_mask"])[:, -kept:]
  logits = np.array(given["logits"], np.float32)[:, -kept - 1 : -1]
  for temperature, expected in section["outputs_by_temperature"].items():
    got = score_logits(logits, targets, temperature=float(temperature))
    np.testing.assert_allclose(got.logps * mask, expected["per_token_logps"], atol=1e-5)
    np.testing.assert_allclose(got.entropy * mask, np.array(expected["entropies"]) * mask, atol=1e-5)


def test_golden_log_probabilities_of_a_real_model():
  section = golden.section("dpo_end_to_end")
  given, expected = section["inputs"], section["outputs"]
  completion = jnp.array(given["completion_mask"])
  tokens = jnp.array(given["input_ids"], jnp.int32)
  for name, token_key, sums_key in (
    ("policy", "per_token_logps", "{}_logps"),
    ("ref", "ref_per_token_logps", "precomputed_ref_{}_logps"),
  ):
    logits = jnp.array(given[f"{name}_logits"])
    got = next_token_logps(logits, jnp.eye(logits.shape[-1]), tokens) * completion
    np.testing.assert_allclose(got[:, 1:], expected[token_key], atol=1e-5)
    sums = expected[sums_key.format("chosen")] + expected[sums_key.format("rejected")]
    np.testing.assert_allclose(segment_sum(got, completion, 1)[:, 0], sums, atol=1e-5)
