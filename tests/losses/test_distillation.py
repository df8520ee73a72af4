"""The chunked divergence of student and teacher against TRL's numbers and the whole matrices of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.distillation import jsd
from alignjax.losses.logps import token_scores
from tests import golden

B, T, V, D, D_TEACHER = 3, 11, 37, 8, 5
BETAS = (0.0, 0.1, 0.5, 1.0)


def setting(case):
  """beta and temperature, which in these sections the case's name alone tells: beta0.5_T0.9."""
  parts = case.split("_")
  assert parts[0].startswith("beta"), case
  temperature = [part[1:] for part in parts[1:] if part.startswith("T")]
  return {"beta": float(parts[0].removeprefix("beta")), "temperature": float(temperature[0]) if temperature else 1.0}


def divide(case, mask):
  """(weights [B, T], count) of the sum that is the case's loss: labels and their number, but for what its name says."""
  whole = "no_labels" in case
  count = (
    1 if case.endswith("_sum") else next((int(x[5:]) for x in case.split("_") if x.startswith("items")), mask.sum())
  )
  return np.ones_like(mask) if whole else mask, count


@pytest.mark.parametrize("case", golden.cases("gkd_jsd", lambda config: True))
def test_golden_jsd(case):
  section = golden.section("gkd_jsd")
  found, inputs = section["cases"][case], section["inputs"]
  mask = np.float64(np.array(inputs["labels"]) != -100)
  weights, count = divide(case, mask)
  with jax.enable_x64(True):
    student, teacher = (jnp.asarray(inputs[f"{who}_logits"], jnp.float64) for who in ("student", "teacher"))
    identity = jnp.eye(student.shape[-1])
    values = lambda x: jsd(x, identity, teacher, identity, **setting(case), chunk=3).jsd
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(values(x) * weights) / count)(student)
  assert float(value) == pytest.approx(found["loss_batchmean"] if isinstance(found, dict) else found, rel=1e-6)
  if isinstance(found, dict):
    np.testing.assert_allclose(gradient, found["grad_student_logits"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", golden.cases("distillation_chunked_divergence", lambda config: True))
def test_golden_divergence_of_hidden_states(case):
  section = golden.section("distillation_chunked_divergence")
  found, inputs = section["cases"][case], section["inputs"]
  array = lambda name: jnp.asarray(inputs[name], jnp.float32)
  mask = array("completion_mask")
  arguments = [array(f"{who}_{what}") for who in ("student", "teacher") for what in ("hidden", "lm_head")]
  got = jsd(*arguments, **setting(case), chunk=3)
  assert mask.sum() == found["num_valid"]
  assert float((got.jsd * mask).sum() / mask.sum()) == pytest.approx(found["loss"], rel=1e-5)
  assert float((got.entropy * mask).sum()) == pytest.approx(found["student_entropy_sum"], rel=1e-5)


# --- against all logits at once --------------------------------------------------------------------------------------


def inputs(dtype=np.float64, scale=1.0, vocab=(V, V)):
  """Student's and teacher's hidden states and unembeddings, and a cotangent [B, T]."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return (
    (normal(B, T, D), scale * normal(vocab[0], D), normal(B, T, D_TEACHER), scale * normal(vocab[1], D_TEACHER)),
    normal(B, T),
  )


def dense(student, student_unembedding, teacher, teacher_unembedding, beta, temperature):
  """The divergence by its definition."""
  s = jax.nn.softmax(student @ student_unembedding.T / temperature)
  t = jax.nn.softmax(teacher @ teacher_unembedding.T / temperature)
  kl = lambda p, q: jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1)
  if beta in (0, 1):
    return kl(s, t) if beta else kl(t, s)
  m = beta * t + (1 - beta) * s
  return beta * kl(t, m) + (1 - beta) * kl(s, m)


def value_and_grads(f, arrays, cotangent):
  """Values [B, T] and gradients to the student's states and unembedding."""
  values, vjp = jax.vjp(lambda h, u: f(h, u, *arrays[2:]), *arrays[:2])
  return values, *vjp(cotangent)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("chunk", "temperature"), [(None, 1.0), (4, 0.7)])
def test_values_and_gradients_equal_the_dense_computation(beta, chunk, temperature):
  with jax.enable_x64(True):
    arrays, cotangent = inputs()
    setting = {"beta": beta, "temperature": temperature}
    got = value_and_grads(lambda *x: jsd(*x, **setting, chunk=chunk).jsd, arrays, cotangent)
    expected = value_and_grads(lambda *x: dense(*x, **setting), arrays, cotangent)
    for one, other in zip(got, expected, strict=True):
      np.testing.assert_allclose(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits_stay_finite(beta):
  arrays, cotangent = inputs(np.float32, scale=1e4)
  got = value_and_grads(lambda *x: jsd(*x, beta=beta, chunk=4).jsd, arrays, cotangent)
  assert all(np.isfinite(x).all() for x in got)
  assert (got[0] >= -1e-6).all()


def test_no_divergence_and_no_gradient_where_student_is_teacher():
  (student, unembedding, _, _), cotangent = inputs(np.float32)
  same = (student, unembedding, student, unembedding)
  for beta in BETAS:
    got = value_and_grads(lambda *x, beta=beta: jsd(*x, beta=beta).jsd, same, cotangent)
    for x in got:
      np.testing.assert_allclose(x, 0, atol=1e-5)
  assert jsd(*same).agreement.all()


def test_beta_is_traced_and_the_teacher_has_no_gradient():
  arrays, _ = inputs(np.float32)
  values = jax.jit(lambda beta: jsd(*arrays, beta=beta).jsd)
  for beta in BETAS:
    np.testing.assert_allclose(values(beta), jsd(*arrays, beta=beta).jsd, rtol=1e-6, atol=1e-6)
  total = lambda h, u: jsd(*arrays[:2], h, u).jsd.sum()
  assert not any(x.any() for x in jax.grad(total, argnums=(0, 1))(*arrays[2:]))


def test_entropy_is_that_of_the_student_and_rows_that_one_vocabulary_lacks_are_left_out():
  (student, wide, teacher, unembedding), _ = inputs(np.float32, vocab=(V + 3, V))
  got = jsd(student, wide, teacher, unembedding, temperature=0.7)
  cut = jsd(student, wide[:V], teacher, unembedding, temperature=0.7)
  np.testing.assert_array_equal(got.jsd, cut.jsd)
  targets = jnp.zeros((B, T), jnp.int32)
  expected = token_scores(student, wide[:V], targets, temperature=0.7, entropy=True).entropy
  np.testing.assert_allclose(got.entropy, expected, rtol=1e-5, atol=1e-5)
