import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.errors import InputError
from alignjax.evaluation import kl
from alignjax.model import ModelConfig, decoder
from alignjax.sampling.generate import make_generate

MODEL = decoder.make(ModelConfig(vocab=12, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16))


def params(seed):
  drawn = jax.jit(MODEL.init)(jax.random.key(seed))
  return drawn | {"embed": 10 * drawn["embed"]}


def sample(weights, count, new):
  rows = np.arange(count, dtype=np.int32)
  prompts = np.tile(np.array([[4, 5]], np.int32), (count, 1))
  samples = make_generate(MODEL, new)(
    weights, prompts, np.full(count, 2, np.int32), key=jax.random.key(0),
    prompt_ids=np.zeros_like(rows), sample_ids=rows, stop_id=3, pad_id=None,
  )  # fmt: skip
  samples = jax.device_get(samples)
  return [samples.tokens[r, :n].tolist() for r, n in enumerate(samples.lengths)], samples


def test_kl_of_a_policy_from_itself_is_zero():
  logps = [np.array([-1.0, -2.0]), np.array([-0.5])]
  measured = kl.sequence_kl(logps, logps)
  assert measured.kl.value == measured.stderr == measured.per_token == 0


def test_kl_is_the_mean_of_summed_differences():
  policy, reference = [[-1.0, -1.0], [-2.0]], [[-2.0, -1.5], [-1.5]]
  measured = kl.sequence_kl(policy, reference)
  assert measured.kl.value == pytest.approx((1.5 - 0.5) / 2)
  assert measured.stderr == pytest.approx(np.std([1.5, -0.5], ddof=1) / np.sqrt(2))
  assert measured.per_token == pytest.approx(0.5 / 1.5)


def test_kl_of_samples_agrees_with_the_exact_sum():
  policy, reference = params(0), params(1)
  tokens = jnp.array([[4, 5]])

  def next_token(weights):
    hidden, _ = MODEL.forward(weights, tokens, jnp.ones_like(tokens), jnp.arange(2)[None])
    return np.asarray(jax.nn.log_softmax(hidden[0, -1] @ MODEL.unembedding(weights).T), np.float64)

  p, q = next_token(policy), next_token(reference)
  exact = np.sum(np.exp(p) * (p - q))
  completions, _ = sample(policy, 2000, 1)
  prompts = [[4, 5]] * len(completions)
  scored = [
    kl.completion_logps(MODEL, weights, prompts, completions, batch_size=500) for weights in (policy, reference)
  ]
  measured = kl.sequence_kl(*scored)
  assert abs(measured.kl.value - exact) < 4 * measured.stderr
  assert measured.stderr < 0.1 * exact


def test_completion_logps_are_those_that_sampled():
  completions, samples = sample(params(0), 6, 9)
  scored = kl.completion_logps(MODEL, params(0), [[4, 5]] * 6, completions, batch_size=4)
  for row, logps in enumerate(scored):
    np.testing.assert_allclose(logps, samples.logps[row, : len(completions[row])], atol=1e-4)


def test_completions_that_do_not_pair_up_are_refused():
  with pytest.raises(ValueError, match="same completions"):
    kl.sequence_kl([[-1.0, -2.0]], [[-1.0]])


def test_an_empty_completion_is_named():
  with pytest.raises(InputError, match="completion 1"):
    kl.completion_logps(MODEL, {}, [[4], [4]], [[5], []])
