"""Log-probabilities of a truncated distribution, in chunks, against the whole matrix of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.logps import token_logps, token_scores
from alignjax.losses.support import Support, mask_logits
from tests.losses.test_logps import B, T, inputs

RULES = [
  Support(),
  Support(excluded=7),
  Support(top_k=5),
  Support(top_p=0.9),
  Support(excluded=7, top_k=5, top_p=0.9),
  Support(excluded=7, top_k=0, top_p=1.0),
]


def inside(logits, support, targets):
  """Which tokens a sampler could have chosen, or did choose; token by token."""
  found = np.zeros(logits.shape, bool)
  for place in np.ndindex(logits.shape[:-1]):
    row = np.float64(logits[place])
    order = [int(token) for token in np.argsort(-row, kind="stable") if token != support.excluded]
    order = order[: support.top_k or None]
    weights = np.exp(row[order] - row[order].max())
    shares = weights / weights.sum()
    before = np.cumsum(shares) - shares
    kept = [token for token, b in zip(order, before, strict=True) if b < (support.top_p or 1.0)] or order[:1]
    found[place][[*kept, targets[place]]] = True
  return found


@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("support", RULES, ids=str)
def test_values_and_gradients_equal_the_dense_computation(support, chunk):
  with jax.enable_x64(True):
    hidden, unembedding, targets, cotangent = inputs(np.float64)
    logits = lambda h, u: jnp.einsum("btd,vd->btv", h, u, precision="highest") / 0.7
    # Half of the targets are the likeliest tokens; others lie outside of the support, and one is the excluded token.
    best = jnp.argmax(logits(hidden, unembedding), axis=-1)
    targets = jnp.where(jnp.arange(T) % 2, targets, best).at[0, 1].set(7)
    there = inside(np.asarray(logits(hidden, unembedding)), support, np.asarray(targets))

    def dense(h, u):
      logps = jax.nn.log_softmax(jnp.where(there, logits(h, u), -jnp.inf))
      return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]

    got, vjp = jax.vjp(lambda h, u: token_logps(h, u, targets, 0.7, chunk, support=support), hidden, unembedding)
    expected, dense_vjp = jax.vjp(dense, hidden, unembedding)
    for one, other in zip((got, *vjp(cotangent)), (expected, *dense_vjp(cotangent)), strict=True):
      assert np.isfinite(one).all()
      np.testing.assert_allclose(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("support", RULES, ids=str)
def test_entropy_is_that_of_the_support(support):
  hidden, unembedding, _, _ = inputs()
  targets = jnp.argmax(hidden @ unembedding.T, axis=-1)
  logits = np.float64(hidden @ unembedding.T)
  weights = np.exp(logits - logits.max(-1, keepdims=True)) * inside(logits, support, np.asarray(targets))
  p = weights / weights.sum(-1, keepdims=True)
  scores = token_scores(hidden, unembedding, targets, chunk=4, entropy=True, log_sum_sq_probs=True, support=support)
  np.testing.assert_allclose(scores.entropy, -np.sum(p * np.log(np.maximum(p, 1e-300)), axis=-1), atol=1e-5)
  np.testing.assert_allclose(scores.log_sum_sq_probs, np.log((p**2).sum(-1)), atol=1e-5)


def test_a_target_that_a_drifted_policy_would_no_longer_choose_stays_finite():
  logits = jnp.array([[[100.0, 0.0, -100.0]]])
  for target in range(3):
    masked = mask_logits(logits, Support(excluded=0, top_k=1), jnp.array([[target]]))
    assert np.isfinite(masked[0, 0, target])
    assert np.isfinite(masked[0, 0, 1])
    assert np.isfinite(masked).sum() == (1 if target == 1 else 2)


def test_a_rule_without_parts_compiles_nothing():
  scores = lambda **rule: jax.make_jaxpr(lambda h, u, y: token_scores(h, u, y, **rule))(*inputs()[:3])
  assert str(scores()) == str(scores(support=Support()))
  assert "sort" not in str(scores(support=Support(excluded=1)))
  assert "sort" in str(scores(support=Support(top_k=3)))


def test_the_rule_is_traced():
  hidden, unembedding, targets, _ = inputs()
  traced = []

  @jax.jit
  def run(support):
    traced.append(support)
    return token_logps(hidden, unembedding, targets, support=support)

  one, other = run(Support(7, 5, 0.9)), run(Support(3, 0, 1.0))
  assert len(traced) == 1
  assert one.shape == (B, T)
  assert not np.allclose(one, other)
