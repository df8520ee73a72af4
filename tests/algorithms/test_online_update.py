"""From rewards to what an online algorithm learns from: weights, shaping, groups, the KL; without a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import (
  grpo,
  nash_md,
  online_preference,
  policy_update,
  ppo,
  process_reward,
  reward,
  rollout,
  sft,
)
from alignjax.algorithms.algorithm import ENDLESS
from alignjax.algorithms.online_rows import HostRewards, Outcome, Rollout
from alignjax.errors import InputError
from alignjax.losses.logps import TokenScores
from alignjax.losses.policy import LOSSES
from alignjax.model import critic
from alignjax.types import Batch, Trees
from tests import made

G, WIDTH = 4, 6  # completions of a prompt, columns of a row; two of them the prompt's
LENGTHS = np.array([1, 2, 4, 3])
OPTIONS = {
  "rewards": "regex+format:0.5",
  "reward_settings": {"pattern": "a"},
  "num_generations": G,
  "max_new_tokens": 4,
}
SHAPED = {"missing_eos_penalty": 0.5, "overlong_buffer": 2, "kl_in": "reward", "failed": True}


@pytest.fixture(autouse=True)
def no_forward_pass(monkeypatch):
  """A policy's log-probabilities are its params [B, T], its values 0, its entropy 1."""

  def scores(model, params, batch, hp, special, o, **also):
    ones = jnp.ones_like(params)
    return TokenScores(params, ones, ones, ones), None

  for module in (grpo, ppo):
    monkeypatch.setattr(module, "completion_scores", scores)
  monkeypatch.setattr(critic, "values", lambda model, params, texts, hidden: jnp.zeros_like(texts["loss_mask"]))
  monkeypatch.setattr(critic, "policy_of", lambda model: model)
  monkeypatch.setattr(rollout, "weights", lambda o: {"regex": 1.0, "format": 0.5})


def rows(rewards, weights=1.0, failed=None):
  """Labelled completions of len(rewards) / G prompts: `rewards` [B, 2] of both functions, `weights` of each row."""
  B = len(rewards)
  columns, lengths = np.arange(WIDTH), np.resize(LENGTHS, B)
  mask = ((columns >= 2) & (columns < 2 + lengths[:, None])).astype(np.float32)
  rng = np.random.default_rng(0)
  noise = np.resize(rng.normal(-1, 0.3, (G, WIDTH)), (B, WIDTH))
  texts = {
    "tokens": jnp.ones((B, WIDTH), jnp.int32),
    "segment_ids": jnp.ones((B, WIDTH), jnp.int32),
    "positions": jnp.zeros((B, WIDTH), jnp.int32),
    "loss_mask": jnp.asarray(mask),
    "example_mask": jnp.ones((B, 1)),
    "weights": jnp.broadcast_to(jnp.asarray(weights, jnp.float32), B)[:, None],
    "record_ids": jnp.arange(B)[:, None] // G,
  }
  failed = np.zeros(B) if failed is None else failed
  return Rollout(
    texts,
    logps=jnp.asarray(noise * mask, jnp.float32),
    lengths=jnp.asarray(lengths, jnp.float32),
    finished=jnp.asarray(lengths < 4, jnp.float32),
    host=HostRewards(jnp.asarray(rewards, jnp.float32), jnp.asarray(failed, jnp.float32)),
  )


def scored(scores):
  """The outcome of completions with these scores [B]."""
  return Outcome(scores, scores, *jnp.ones((5, len(scores))))


def iteration(name, rollout, loss="", old=None, **settings):
  """(the prepared batch, the loss as a function of log-probabilities [B, T], its metrics) with options and hparams."""
  module = {"grpo": grpo, "ppo": ppo}[name]
  model = type("Model", (), {"config": type("Config", (), {"dtype": "float32"})})
  options = OPTIONS | {key: value for key, value in settings.items() if key in made.defaults(module)}
  hparams = made.hparams(module, loss, **options)
  hparams |= {key: value for key, value in settings.items() if key in hparams}
  hparams = {key: jnp.float32(value) for key, value in hparams.items()}
  algorithm = made.make(module, model, loss, **options)
  reference = rollout.logps - 0.3 * rollout.texts["loss_mask"] * jnp.arange(WIDTH)
  trees = Trees({"reference": reference}, rollout.logps, hparams)
  running = {key: jnp.float32(value) for key, value in algorithm.running.items()}
  batch = algorithm.prepare(trees, Batch(rollout, running=running), jax.random.key(0))
  batch = batch.updated(totals=algorithm.counts(batch.rows))
  return batch, lambda logps: algorithm.loss(logps, batch, hparams), algorithm


def learn(name, batch, loss="", **settings):
  """(loss, its gradient by the log-probabilities [B, T]) at a policy that has moved a little."""
  prepared, of_logps, _ = iteration(name, batch, loss, **settings)
  logps = prepared.rows.old_logps * 1.01
  value, gradient = jax.value_and_grad(lambda x: of_logps(x)[0])(logps)
  return float(value), np.asarray(gradient)


RNG = np.random.default_rng(1)
TWO = RNG.normal(size=(2 * G, 2))  # rewards of two prompts' completions
same = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_a_weight_is_how_often_a_record_counts_whatever_the_loss(loss):
  paid = dict(kl_in="loss", kl_coef=0.5, entropy_coef=0.1)
  once, gradient = learn("grpo", rows(TWO, np.repeat([1.0, 3.0], G)), loss, **paid)
  copies = np.concatenate([TWO[:G], *[TWO[G:]] * 3])
  as_often, of_copies = learn("grpo", rows(copies), loss, **paid)
  same(once, as_often)
  same(gradient[:G], of_copies[:G])
  same(gradient[G:], 3 * of_copies[G : 2 * G])
  assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("name", ["ppo", *grpo.ADVANTAGES])
def test_weights_have_no_unit_and_a_weight_of_0_is_no_record(name):
  algorithm, settings = ("ppo", dict(whiten_rewards=True, normalise_rewards=True)) if name == "ppo" else ("grpo", {})
  settings |= {"advantages": name} if name != "ppo" else {}
  value, gradient = learn(algorithm, rows(TWO), **settings)
  for unit in (0.01, 30.0):
    other, of_other = learn(algorithm, rows(TWO, unit), **settings)
    same(other, value)
    same(of_other, gradient, atol=1e-5)
  alone, of_alone = learn(algorithm, rows(TWO[:G]), **settings)
  other, of_other = learn(algorithm, rows(TWO, np.repeat([2.0, 0.0], G)), **settings)
  same(other, alone)
  same(of_other[:G], of_alone, atol=1e-5)
  np.testing.assert_array_equal(of_other[G:], 0)


def test_the_kl_controller_and_the_statistics_of_scores_know_no_unit_of_weights():
  hparams = {"kl_target": jnp.float32(6), "kl_horizon": jnp.float32(10), "reward_clip": jnp.float32(0)}
  statistics = {name: jnp.float32(value) for name, value in ppo.RUNNING.items()}

  def found(unit):
    weights, kl = unit * jnp.ones(8), jnp.arange(8.0)
    outcome = scored(jnp.arange(8.0)).replace(weights=weights)
    return ppo.kl_step(kl, weights, hparams), ppo.shaped_scores(outcome, statistics, hparams, normalise=True)[0]

  for unit in (0.01, 0.5):
    for one, other in zip(found(unit), found(1.0), strict=True):
      same(one, other)


def test_small_weights_are_no_small_loss_offline():
  weights = jnp.full((2, 2), 0.1)
  batch = {
    "weights": weights,
    "loss_mask": jnp.ones((2, 3)),
    "segment_ids": jnp.ones((2, 3), jnp.int32),
    "record_ids": jnp.zeros((2, 2), jnp.int32),
  }
  model = type("Model", (), {"config": type("Config", (), {"score_heads": 1})})
  for module, count, total in (
    (sft, "num_tokens", 0.6),
    (process_reward, "num_steps", 0.6),
    (reward, "num_examples", 0.4),
  ):
    assert made.make(module, model).prepare(Trees(), Batch(batch), None).totals[count] == pytest.approx(total)


# --- shaping and groups ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPED)
@pytest.mark.parametrize("advantages", grpo.ADVANTAGES)
def test_what_shapes_a_score_shapes_every_advantage(advantages, shape):
  failed = np.arange(2 * G) == 1
  plain = iteration("grpo", rows(TWO), advantages=advantages)[0].rows.advantages
  settings = {} if shape == "failed" else {shape: SHAPED[shape]}
  batch = rows(TWO, failed=failed if shape == "failed" else None)
  found = iteration("grpo", batch, advantages=advantages, kl_coef=0.1, **settings)[0].rows.advantages
  assert np.isfinite(found).all()
  assert np.abs(found - plain).max() > 0.01
  if shape == "failed":
    np.testing.assert_array_equal(found[1], 0)
  if shape in ("missing_eos_penalty", "overlong_buffer"):  # the third of a group is cut off
    assert found[2].max() < plain[2].max()


@pytest.mark.parametrize("loss", LOSSES)
def test_groups_of_one_reward_leave_every_mean_as_if_they_had_not_been_drawn(loss):
  """Also where a penalty tells their completions apart: the rewards say whether there is something to learn."""
  equal = np.tile([[0.5, 2.0]], (G, 1))
  settings = dict(kl_in="loss", kl_coef=0.3, missing_eos_penalty=1.0, advantages="batch", entropy_coef=0.1)
  value, gradient = learn("grpo", rows(np.concatenate([TWO[:G], equal])), loss, only_varied=True, **settings)
  alone, of_alone = learn("grpo", rows(TWO[:G]), loss, **settings)
  same(value, alone)
  same(gradient[:G], of_alone)
  np.testing.assert_array_equal(gradient[G:], 0)


def test_whether_a_group_varies_is_asked_of_its_rewards_and_not_of_the_kl():
  equal = np.tile([[0.5, 2.0]], (G, 1))
  batch, of_logps, algorithm = iteration(
    "grpo", rows(np.concatenate([TWO[:G], equal])), only_varied=True, kl_in="reward"
  )
  np.testing.assert_array_equal(batch.rows.texts["weights"][:, 0], np.repeat([1.0, 0.0], G))
  found = algorithm.finish(jax.tree.map(float, of_logps(batch.rows.old_logps)[1]))
  assert found["frac_reward_zero_std"] == 0.5
  assert float(batch.totals[algorithm.count]) == 2 * G  # by which an evaluation weighs its batches
  assert found["rewards/regex"] == pytest.approx((TWO[:G, 0].sum() + 0.5 * G) / (2 * G))
  assert found["objective/scores"] == pytest.approx(
    float(batch.rows.outcome.scores.mean()), rel=1e-5
  )  # of all that were scored


@pytest.mark.parametrize("advantages", grpo.ADVANTAGES)
def test_completions_of_one_reward_are_not_pushed_at_all(advantages):
  """Of a size at which float32 rounds the mean of a group."""
  equal = np.tile([[1000.1, 7.7]], (G, 1))
  batch, _, _ = iteration("grpo", rows(np.concatenate([equal, TWO[:G]])), advantages=advantages)
  np.testing.assert_array_equal(batch.rows.advantages[:G], 0)
  assert np.abs(batch.rows.advantages[G:]).max() > 1e-3  # "batch" divides by the spread between the groups


def test_equal_scores_are_exactly_0_when_normalised_by_what_came_before():
  statistics = {name: jnp.float32(value) for name, value in ppo.RUNNING.items()}
  for _ in range(3):
    outcome = scored(jnp.full(7, 1000.1))
    shaped, statistics = ppo.shaped_scores(outcome, statistics, {"reward_clip": jnp.float32(0)}, normalise=True)
    np.testing.assert_array_equal(shaped, 0)
  assert statistics["score_m2"] == 0


def test_tokens_that_gmpo_leaves_out_leave_its_ratio_and_its_mean():
  batch = iteration("grpo", rows(TWO[:G]), "gmpo")[0]
  rows_of, texts = batch.rows, batch.rows.texts
  kept = texts["loss_mask"].at[2, 3].set(0).at[3, 2].set(0)
  hparams = {name: jnp.float32(x) for name, x in made.hparams(grpo, "gmpo").items()}

  def learn(logps, batch):
    scores = TokenScores(logps, logps, logps, logps)
    return policy_update.policy_loss(LOSSES["gmpo"], scores, batch, hparams, grpo.GrpoOptions(**OPTIONS))[0]

  logps = 1.01 * rows_of.old_logps
  found = jax.value_and_grad(learn)(logps, batch.replace(rows=rows_of.replace(kept=kept)))
  less = rows_of.replace(texts=texts | {"loss_mask": kept})
  expected = jax.value_and_grad(learn)(logps, batch.replace(rows=less))
  same(found[0], expected[0])
  same(found[1], expected[1])


# --- the KL ----------------------------------------------------------------------------------------------------------


def by_hand(losses, mask, how):
  """One number of per-token losses, as each loss of the family makes it."""
  per_row, lengths = (losses * mask).sum(1), mask.sum(1)
  return {
    "token_mean": per_row.sum() / lengths.sum(),
    "sequence_mean": (per_row / lengths).mean(),
    "sequence_sum": per_row.mean(),
    "constant": per_row.sum() / (len(mask) * OPTIONS["max_new_tokens"]),
  }[how]


@pytest.mark.parametrize("estimator", ["k3", ""])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_kl_in_the_loss_is_aggregated_as_the_loss_it_is_added_to(loss, estimator):
  settings = dict(kl_in="loss", kl_estimator=estimator)
  equal = rows(np.ones((G, 2)))  # no advantages: the KL is all that is left
  value, gradient = learn("grpo", equal, loss, kl_coef=1.0, **settings)
  old, mask = np.asarray(equal.logps), np.asarray(equal.texts["loss_mask"])
  logps, reference = 1.01 * old, old - 0.3 * mask * np.arange(WIDTH)
  rho = np.exp(logps - old) if estimator == "" else 1.0
  k3 = np.exp(reference - logps) - 1 + logps - reference
  slope = rho * (logps - reference) if estimator == "" else 1 - np.exp(reference - logps)
  same(value, by_hand(rho * k3, mask, LOSSES[loss].aggregation), rtol=1e-3)
  one = lambda row, column: np.eye(G)[row][:, None] * np.eye(WIDTH)[column] * slope
  for row, column in ((0, 2), (2, 5)):
    same(gradient[row, column], by_hand(one(row, column), mask, LOSSES[loss].aggregation), rtol=1e-3)


def test_ppo_pays_the_kl_in_its_loss_by_default_as_one_that_has_a_gradient():
  settings = dict(kl_in="loss", gamma=1.0)
  batch = rows(TWO)
  (_, without), (_, paid) = (learn("ppo", batch, kl_coef=coef, **settings) for coef in (0.0, 1.0))
  old, mask = np.asarray(batch.logps), np.asarray(batch.texts["loss_mask"])
  logps, reference = 1.01 * old, old - 0.3 * mask * np.arange(WIDTH)
  same(paid - without, mask * np.exp(logps - old) * (logps - reference) / mask.sum(), rtol=1e-3)


@pytest.mark.parametrize("module", [ppo, grpo])
@pytest.mark.parametrize(
  ("place", "estimator", "message"),
  [
    ("loss", "k1", r"its gradient is 0 on average.*use rho_k3 or k2 or rho_k1 or k3, .*kl_in=reward"),
    ("reward", "k2", r"not that of the KL; use k1, .*kl_in=loss"),
    ("reward", "k3", r"not that of the KL; use k1, .*kl_in=loss"),
    ("reward", "rho_k1", r"no ratio to correct by; use k1"),
    ("reward", "rho_k3", r"no ratio to correct by; use k1"),
    ("loss", "k4", r"use one of k1, k2, k3, rho_k1, rho_k3"),
  ],
)
def test_an_estimator_that_means_nothing_where_it_is_paid_is_refused(module, place, estimator, message):
  with pytest.raises(InputError, match=message) as caught:
    made.hparams(module, kl_in=place, kl_estimator=estimator)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", [ppo, grpo])
def test_the_estimator_is_by_default_that_of_the_place(module):
  of = lambda place, name: policy_update.kl_estimator(name, place)
  default = made.defaults(module)["kl_estimator"]
  assert (of("reward", default), of("loss", default)) == ("k1", "rho_k3")
  assert [of("loss", name) for name in ("k2", "k3", "rho_k1")] == ["k2", "k3", "rho_k1"]


# --- no signal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_where_nothing_was_judged_no_mean_reads_0(name):
  batch, of_logps, algorithm = iteration(name, rows(np.full((2 * G, 2), np.nan)))
  value, metrics = of_logps(batch.rows.old_logps)
  assert value == 0
  assert metrics[policy_update.SIGNAL] == 0
  found = algorithm.finish(jax.tree.map(float, metrics))
  assert found["completions/mean_length"] == LENGTHS.mean()
  assert found["completions/clipped_ratio"] == 0.25
  assert not {"policy/entropy", "objective/scores", "objective/kl", "val/ratio", "rewards/regex"} & found.keys()


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_rewards_tell_something_where_they_differ(name):
  signal = lambda rewards: float(iteration(name, rows(rewards))[1](jnp.zeros((2 * G, WIDTH)))[1][policy_update.SIGNAL])
  assert signal(np.full((2 * G, 2), 1000.1)) == 0
  assert signal(TWO) > 0


def test_pairs_and_games_tell_something_where_scores_differ():
  rollout = rows(TWO).replace(from_other=jnp.zeros(2 * G))
  pairs = lambda scores: online_preference.pair_up(rollout, scored(scores), G).told
  games = lambda scores: nash_md.play(rollout, scored(scores), G)[-1]
  for told in (pairs, games):
    assert told(jnp.ones(2 * G)).sum() == 0
    assert told(jnp.arange(2.0 * G)).sum() > 0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_a_reward_model_that_gives_no_number_to_learn_from_has_failed(value, monkeypatch):
  monkeypatch.setattr(rollout, "weights", lambda o: {rollout.IN_GRAPH: 1.0})
  heads = jnp.ones((G, 1, 1)).at[1].set(value)
  monkeypatch.setattr(rollout, "last_states", lambda *args: (heads, heads))
  hparams = {name: jnp.float32(x) for name, x in made.hparams(grpo).items()}
  trees = Trees({rollout.IN_GRAPH: None}, None, hparams)
  found = rollout.score({rollout.IN_GRAPH: None}, trees, rows(TWO[:G]), ENDLESS, rollout.SamplingOptions())
  np.testing.assert_array_equal(found.failed, [0, 1, 0, 0])
  np.testing.assert_array_equal(found.weights, [1, 0, 1, 1])
  np.testing.assert_array_equal(found.scores, [1, 0, 1, 1])
  assert rows(TWO[:G]).counting(found.weights).texts["loss_mask"][1].sum() == 0
