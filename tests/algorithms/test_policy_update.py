"""Old log-probs, corrections and the check that trainer and sampler agree, in each dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import grpo, nash_md, policy_update, ppo, rollout
from alignjax.algorithms.algorithm import defaults_of
from alignjax.algorithms.online_rows import Learned, Outcome, Rollout
from alignjax.errors import InputError
from alignjax.losses import policy, token_weight
from alignjax.losses.logps import TokenScores
from alignjax.model import ModelConfig, decoder
from alignjax.system.microbatch import map_over_microbatches
from alignjax.types import Batch
from tests import made

N, ROWS = 8, 32
TRUNCATIONS = ({}, *(pytest.param(rule, marks=pytest.mark.slow) for rule in ({"top_k": 5}, {"top_p": 0.8})))
SPECIAL = rollout.Special(-1, 0)
HPARAMS = {"temperature": jnp.float32(1.0)}


def options(**changes):
  sizes = {"num_generations": 8, "max_new_tokens": N, "minibatches": 2}
  return grpo.GrpoOptions(**(sizes | changes))


def make(dtype):
  config = ModelConfig(vocab=97, layers=2, embed=32, heads=2, kv_heads=1, head_dim=16, mlp=64, dtype=dtype)
  model = decoder.make(config)
  return model, jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, jax.jit(model.init)(jax.random.key(0)))


def forgetful(model):
  """A model whose cached forward pass finds zeros where the tokens before were."""

  def forward(params, tokens, segment_ids, positions, cache=None):
    if cache is not None and tokens.shape[1] == 1:
      cache = jax.tree.map(lambda x: 0 * x if jnp.issubdtype(x.dtype, jnp.floating) else x, cache)
    return model.forward(params, tokens, segment_ids, positions, cache)

  return model._replace(forward=forward)


@functools.cache
def settled(dtype, broken=False, top_k=0, top_p=1.0, correction="none"):
  """(a batch as `prepare` gives it to the loss, the trainer's scores of its first half as the loss has them)."""
  o = options(top_k=top_k, top_p=top_p, correction=correction, old_logps="trainer")
  model, params = make(dtype)
  rng = np.random.default_rng(0)
  prompts = {
    "tokens": jnp.asarray(rng.integers(1, 97, (4, 8)), jnp.int32),
    "segment_ids": jnp.ones((4, 8), jnp.int32),
    "loss_mask": jnp.zeros((4, 8)),
    "example_mask": jnp.ones((4, 1)),
    "weights": jnp.ones((4, 1)),
  }
  model_config, bounds = model.config, HPARAMS | defaults_of(policy_update.Bounds)
  sampler = forgetful(model) if broken else model

  @jax.jit
  def run(params):
    sampled = rollout.sample(sampler, params, Batch(prompts), jax.random.key(1), HPARAMS, SPECIAL, o).rows
    score = lambda texts: rollout.completion_scores(model, params, texts, HPARAMS, SPECIAL, o, entropy=True)[0]
    own = map_over_microbatches(score, sampled.texts, policy_update.parts_of(ROWS, 1, 2))
    return sampled, policy_update.settle(sampled, own, model_config, bounds, o)

  sampled, found = run(params)
  whole = learned(sampled.texts, sampled.logps, found.old_logps, correction=found.correction)
  half = jax.tree.map(lambda x: x[: ROWS // 2], whole)
  half = Batch(half, found.totals | policy_update.counts(half))

  score = lambda params: rollout.completion_scores(model, params, half.rows.texts, HPARAMS, SPECIAL, o, entropy=True)[0]
  scores = jax.jit(score)(params)
  return half, scores


def learned(texts, sampled, old=None, **more):
  """Rows that a policy learns from, of completions whose log-probs [B, T] these are, and which score 0."""
  zeros, ones = jnp.zeros(len(sampled)), jnp.ones(len(sampled))
  known = dict.fromkeys(("raw_scores", "scores", "failed", "lengths", "finished"), zeros)
  outcome = Outcome(weights=ones, prompted=ones, **known)
  old = sampled if old is None else old
  return Learned(texts=texts, outcome=outcome, told=ones, sampler_logps=sampled, old_logps=old, **more)


def settle(texts, sampled, scores, dtype, hparams, o):
  """What becomes of log-probs [B, T] that sampled, where the trainer's scores are these."""
  zeros = jnp.zeros(len(sampled))
  return policy_update.settle(Rollout(texts, sampled, zeros, zeros), scores, make(dtype)[0].config, hparams, o)


def finished(dtype, batch, scores, **changes):
  """The metrics of the first update of an iteration, checked."""
  found = policy_update.metrics(batch) | policy_update.sampler_metrics(scores, batch)
  o = options(old_logps="trainer", **changes)
  return policy_update.finish(jax.tree.map(float, found), policy_update.tolerated(dtype, o, o))


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trainer_and_sampler_agree_within_what_is_tolerated(dtype, truncation):
  found = finished(dtype, *settled(dtype, **truncation), **truncation)
  assert found[policy_update.DRIFT] < 1e-4  # of the ratio that the losses see, in either dtype
  assert 0 < found[f"{policy_update.DIFFERENCE}/mean"] <= found[f"{policy_update.DIFFERENCE}/max"]
  least, mean, most = (found[f"{policy_update.WEIGHT}/{name}"] for name in ("min", "mean", "max"))
  assert least <= mean <= most
  if dtype == "bfloat16":
    assert found[f"{policy_update.DIFFERENCE}/mean"] < found[policy_update.TOLERATED] / 3
    assert found[policy_update.TOLERATED] <= policy_update.NATS * (1 + 1e-5)  # a mean, in float32


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_cache_stops_the_run(dtype, truncation):
  with pytest.raises(InputError, match=r"before the first update of an iteration, .*sampler.*cache") as error:
    finished(dtype, *settled(dtype, broken=True, **truncation), **truncation)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_forward_pass_that_is_not_the_same_twice_stops_the_run(dtype):
  batch, scores = settled(dtype)
  noise = 0.1 * jax.random.normal(jax.random.key(0), scores.logps.shape)
  with pytest.raises(InputError, match=r"before the first update of an iteration"):
    finished(dtype, batch, scores._replace(logps=scores.logps + noise))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sampler_of_another_temperature_stops_the_run(dtype):
  batch, scores = settled(dtype)
  again = settle(batch.rows.texts, batch.rows.sampler_logps * 1.01, scores, dtype, {}, options())
  again = batch.updated(totals=again.totals)
  with pytest.raises(InputError, match=r"before the first update of an iteration"):
    finished(dtype, again, scores)


@pytest.mark.parametrize("loss", ["gspo", "luspo", "rloo", "ppo"])
def test_nothing_is_clipped_in_bfloat16_before_anything_was_learned(loss):
  batch, scores = settled("bfloat16")
  mask = batch.rows.texts["loss_mask"]
  advantages = jnp.where(jnp.arange(len(scores.logps)) % 2, 1.0, -1.0)
  ratio = policy.LOSSES[loss].ratio
  tokens = policy.make_tokens(scores.logps, batch.rows.old_logps, advantages, mask, ratio=ratio)
  assert float(policy.LOSSES[loss].loss(tokens).clipped.sum()) == 0
  off = policy_update.is_off(scores.logps - batch.rows.sampler_logps) * mask
  assert float(off.sum() / mask.sum()) > 0.05  # why the trainer scores anew


@pytest.mark.parametrize(
  ("dtype", "changes", "expected"),
  [
    ("float32", {}, False),
    ("float64", {}, False),
    ("bfloat16", {}, True),
    ("bfloat16", {"old_logps": "sampler"}, True),  # to be compared
    ("float32", {"old_logps": "trainer"}, True),
    ("float32", {"correction": "token_mask"}, True),
  ],
)
def test_the_trainer_scores_anew_where_floats_are_narrow_or_a_correction_asks(dtype, changes, expected):
  assert policy_update.rescores(dtype, options(**changes)) == expected


def test_the_samplers_log_probs_can_be_kept_as_the_old_ones():
  batch, scores = settled("bfloat16")
  sampled = batch.rows.sampler_logps
  after = settle(batch.rows.texts, sampled, scores, "bfloat16", {}, options(old_logps="sampler"))
  np.testing.assert_array_equal(after.old_logps, sampled)


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_mask"])
def test_corrections_are_from_the_samplers_log_probs_to_the_trainers(correction):
  rng = np.random.default_rng(0)
  mask = jnp.asarray(rng.random((4, 6)) < 0.8, jnp.float32)
  sampled, own = (jnp.asarray(-rng.random((4, 6)), jnp.float32) * mask for _ in range(2))
  hparams = {"correction_low": 0.8, "correction_high": 1.2}
  scores = TokenScores(own, own, -own, own)
  found = settle({"loss_mask": mask}, sampled, scores, "float32", hparams, options(correction=correction))
  level, bound = correction.split("_")
  expected = token_weight.sampling_correction(own, sampled, mask, level=level, bound=bound, low=0.8, high=1.2)
  np.testing.assert_array_equal(found.correction, expected)
  np.testing.assert_array_equal(found.old_logps, own)
  assert float(found.totals[f"{policy_update.WEIGHT}/max"]) == pytest.approx(float(expected[mask > 0].max()), rel=1e-6)
  assert float(found.totals[f"{policy_update.DIFFERENCE}/max"]) == pytest.approx(
    float(jnp.abs(own - sampled).max()), rel=1e-6
  )


@pytest.mark.parametrize("module", [ppo, grpo])
def test_corrections_are_of_every_policy_gradient(module):
  assert made.hparams(module, correction="token_truncate")["correction_high"] == 3.0
  assert "correction_high" not in made.hparams(module)
  with pytest.raises(InputError, match=r"algorithm\.correction='tis'"):
    made.hparams(module, correction="tis")
  with pytest.raises(InputError, match=r"algorithm\.old_logps='both'"):
    made.hparams(module, old_logps="both")
  with pytest.raises(InputError, match=r"algorithm\.old_logps=sampler with algorithm\.correction=token_mask"):
    made.hparams(module, correction="token_mask", old_logps="sampler")


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_policys_loss_is_times_the_correction(name):
  rng = np.random.default_rng(1)
  logps = jnp.asarray(-rng.random((2, 5)), jnp.float32)
  texts = {"loss_mask": jnp.ones((2, 5)), "weights": jnp.ones((2, 1))}
  rows = learned(texts, logps, advantages=jnp.ones((2, 5)))
  scores = TokenScores(logps, logps, logps, logps)
  loss = lambda rows: policy_update.policy_loss(
    policy.LOSSES[name], scores, Batch(rows, policy_update.counts(rows)), made.hparams(grpo.RECIPE, name), options()
  )[0]
  halved = rows.replace(correction=jnp.full((2, 5), 0.5))
  assert float(loss(halved)) == pytest.approx(float(loss(rows)) / 2, rel=1e-6)


def test_stale_completions_are_those_that_the_policy_has_left_since_they_were_sampled():
  logps = jnp.full((1, 4), -1.0)
  texts = {"loss_mask": jnp.ones((1, 4)), "weights": jnp.ones((1, 1))}
  rows = learned(texts, logps + 0.5, logps, advantages=-jnp.ones((1, 4)))
  batch = Batch(rows, policy_update.counts(rows))
  scores = TokenScores(logps, logps, logps, logps)
  hparams = made.hparams(grpo.RECIPE) | {"stale_above": 0.3}
  assert float(policy_update.policy_loss(policy.LOSSES["grpo"], scores, batch, hparams, options())[0]) == 0


def test_the_agreement_of_a_batch_without_tokens_is_a_number():
  zeros = jnp.zeros((2, 3))
  scores = TokenScores(zeros, zeros, zeros, zeros)
  found = settle({"loss_mask": zeros}, zeros, scores, "bfloat16", {}, options())
  assert all(np.isfinite(float(value)) for value in found.totals.values())


def test_nash_md_compares_its_policy_with_the_sampler_alone():
  assert "correction" not in made.defaults(nash_md)
  assert "old_logps" not in made.defaults(nash_md)
