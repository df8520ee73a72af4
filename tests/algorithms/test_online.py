"""Algorithms that learn from their own completions: what they share, on the smoke configs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import rewards
from alignjax.algorithms import ALGORITHMS, online_preference, policy_update, ppo, rollout
from alignjax.algorithms.algorithm import Passes, Special
from alignjax.algorithms.online_rows import Outcome, Rollout
from alignjax.errors import InputError
from alignjax.evaluation import over_optimisation
from alignjax.evaluation.held_out import evaluate
from alignjax.model import critic, decoder
from alignjax.rewards import answer
from alignjax.runs import array_store
from alignjax.runs.checkpoint import load_metadata
from alignjax.runs.run import sample
from alignjax.system import sharding
from alignjax.system.preemption import Preemption
from alignjax.train import fit
from alignjax.training import metrics
from alignjax.training.step import make_passes, row_orders
from alignjax.types import Batch, TrainState
from tests import made, smoke

NAMES = ("ppo", "grpo", "rloo", "online_dpo")
MARKS = {"ppo": pytest.mark.slow, "online_dpo": pytest.mark.slow, "rloo": pytest.mark.long}
ONLINE = [name for name, module in ALGORITHMS.items() if module.online]


def hot(batch):
  """A rollout whose log-probs are of another temperature."""
  return batch.replace(rows=batch.rows.replace(logps=batch.rows.logps * 1.01))


def rows(workdir):
  return [row for row in metrics.read(workdir / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in NAMES])
def test_a_run_learns_from_its_completions_and_evaluates_as_it_did_at_its_end(name):
  workdir, run = smoke.finished(name)
  assert len(rows(workdir)) == smoke.STEPS
  assert any(row["grad_norm"] > 0 for row in rows(workdir))
  assert 0 < run.metrics["eval/rewards/regex"] < 1
  evaluated = evaluate(workdir)
  assert evaluated["rewards/regex"] == pytest.approx(run.metrics["eval/rewards/regex"], abs=1e-6)
  assert len(sample(run, ["What is 3 plus 4?"], max_new_tokens=4)[0][0].tokens) <= 4


# RLOO's is GRPO's with other advantages; online DPO measures no drift.
@pytest.mark.parametrize("name", ["ppo", "grpo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_the_first_update_of_an_iteration_is_of_the_distribution_that_sampled(name):
  for row in rows(smoke.finished(name)[0]):
    assert row[policy_update.OFF] == 0


def test_a_trainer_that_scores_another_distribution_stops_with_the_reason(tmp_path, monkeypatch):
  original = rollout.sample
  monkeypatch.setattr(rollout, "sample", lambda *args: hot(original(*args)))
  with pytest.raises(InputError, match=r"off the sampler's by more than 1e-03"):
    fit(smoke.config("grpo", run__steps=2, model__layers=1), tmp_path / "run")


@pytest.mark.slow
def test_what_a_reward_says_of_itself_is_logged_once(tmp_path):
  name = "tests.rewards.sandbox.hanging:short"
  config = smoke.config("grpo", run__steps=2)
  config = config.replace({"algorithm.rewards": f"{config.options.rewards}+{name}:0.1"})
  fit(config, tmp_path / "run")
  key = f"data/{name}/size"
  logged = [row[key] for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if key in row]
  assert logged == [3]


@pytest.mark.parametrize(
  ("top_k", "top_p"),
  [pytest.param(5, 1.0, marks=pytest.mark.long), pytest.param(0, 0.8, marks=pytest.mark.long), (7, 0.9)],
)
@pytest.mark.slow
def test_a_truncated_sampler_is_scored_as_such(top_k, top_p, tmp_path):
  config = smoke.config("grpo", run__steps=2, algorithm__top_k=top_k, algorithm__top_p=top_p)
  run = fit(config.replace({"algorithm.temperature": 0.7}), tmp_path / "run")
  assert run.metrics[policy_update.OFF] == 0


@pytest.mark.parametrize("name", ["ppo", "online_dpo"])
@pytest.mark.slow
def test_devices_do_not_change_an_iteration(name, tmp_path):
  with smoke.devices(1):
    fit(smoke.config(name, run__steps=2), tmp_path / "one")
  fit(smoke.config(name, run__steps=2), tmp_path / "eight")
  for one, eight in zip(rows(tmp_path / "one"), rows(tmp_path / "eight"), strict=True):
    assert eight["loss"] == pytest.approx(one["loss"], abs=1e-4)
    assert eight["objective/scores"] == pytest.approx(one["objective/scores"], abs=1e-6)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
@pytest.mark.slow
def test_microbatches_do_not_change_an_iteration(name, tmp_path):
  with smoke.devices(1):
    whole = fit(smoke.config(name, run__steps=2), tmp_path / "whole")
    parts = fit(smoke.config(name, run__steps=2, optimizer__microbatches=2), tmp_path / "parts")
  for key in ("loss", "grad_norm", "objective/scores"):
    assert parts.metrics[key] == pytest.approx(whole.metrics[key], abs=1e-5)


@pytest.mark.slow
def test_slots_that_take_the_next_prompt_give_the_same_iteration(tmp_path):
  expected = rows(smoke.finished("grpo")[0])[:2]
  fit(smoke.config("grpo", run__steps=2, algorithm__slots=16), tmp_path / "run")
  for row, other in zip(rows(tmp_path / "run"), expected, strict=True):
    assert row["objective/scores"] == other["objective/scores"]
    assert 0.5 < row["rollout/occupancy"] <= 1


# --- rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_completion_whose_reward_failed_counts_for_nothing_and_is_counted(tmp_path, monkeypatch, capsys):
  calls = []

  def moody(prompts, completions, token_ids, columns):
    calls.append(len(prompts))
    return [float("nan") if number % 2 else 1.0 for number in range(len(prompts))]

  monkeypatch.setattr(rewards, "make", lambda spec, **settings: {"regex": moody})
  monkeypatch.setattr(rewards, "weights", lambda spec: {"regex": 1.0})
  run = fit(smoke.config("ppo", run__steps=2), tmp_path / "run")
  assert run.metrics["rewards/failed"] == pytest.approx(0.5)
  assert run.metrics["objective/scores"] == pytest.approx(1.0)  # of those that were scored
  assert "not finite" in capsys.readouterr().out


SAYS_NOTHING = {
  "none": (None, r"no completion has a score \(0% failed, .* no reward applies\); look at algorithm\.rewards"),
  "huge": (1e39, r"no completion has a score \(100% failed"),
  "same": (1000.1, r"no completion that is learned from is better than another \(the mean score is 1000\.1\)"),
}


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    ("grpo", "none"),
    ("grpo", "same"),
    pytest.param("ppo", "huge", marks=pytest.mark.long),
    pytest.param("ppo", "same", marks=pytest.mark.long),
    pytest.param("online_dpo", "same", marks=pytest.mark.long),
    pytest.param("nash_md", "none", marks=pytest.mark.long),
  ],
)
@pytest.mark.slow
def test_rewards_that_never_say_anything_end_the_run(name, kind, tmp_path, monkeypatch, capsys):
  value, message = SAYS_NOTHING[kind]
  reward = lambda prompts, completions, token_ids, columns: [value] * len(prompts)
  monkeypatch.setattr(rewards, "make", lambda spec, **settings: {"regex": reward})
  monkeypatch.setattr(rewards, "weights", lambda spec: {"regex": 1.0})
  config = smoke.config(name, run__max_skipped=3, run__save_every=2)
  smoke.interrupt(config, tmp_path / "run", 3)  # the steps before count on
  opening = r"nothing to learn from in 3 steps in a row \(to step 3\)"
  with pytest.raises(InputError, match=f"{opening}: {message}") as caught:
    fit(config, tmp_path / "run")
  assert "\n" not in str(caught.value)
  assert str(caught.value).endswith("or raise run.max_skipped")
  last = rows(tmp_path / "run")[-1]
  assert last["step"] == 3
  assert last["completions/mean_length"] > 0
  assert last.get("policy/entropy", 1.0) > 0
  if kind == "huge":
    assert re.search(r"reward regex: .* too large.*returned 1e\+39; .*jsonl:\d+\)", capsys.readouterr().out)


@pytest.mark.slow
def test_what_was_learned_before_the_rewards_broke_is_kept_for_a_larger_max_skipped(tmp_path, monkeypatch):
  scored = [True]

  def moody(prompts, completions, token_ids, columns):
    return [len(text) if scored[0] else None for text in completions]

  monkeypatch.setattr(rewards, "make", lambda spec, **settings: {"regex": moody})
  monkeypatch.setattr(rewards, "weights", lambda spec: {"regex": 1.0})
  config = smoke.config("grpo", run__max_skipped=2, run__save_every=100, run__eval_every=0, run__steps=8)
  with monkeypatch.context() as patched:
    requested = Preemption.requested
    patched.setattr(Preemption, "requested", lambda self, step: scored.__setitem__(0, False) or requested(self, step))
    with pytest.raises(InputError, match=r"in 2 steps in a row \(to step 3\): no completion has a score"):
      fit(config, tmp_path)
  saved = load_metadata(tmp_path / "checkpoints")
  assert (saved["step"], saved["idle"], saved["learned"]) == (4, 3, True)  # the step that ran while 3 was looked at
  with pytest.raises(InputError, match=r"in 4 steps in a row \(to step 5\)"):  # nothing to keep: none is saved
    fit(config, tmp_path)
  assert load_metadata(tmp_path / "checkpoints")["step"] == 4
  assert fit(smoke.config("grpo", run__max_skipped=9, run__eval_every=0, run__steps=8), tmp_path).step == 8


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (dict(algorithm__rewards="symbolic", algorithm__reward_settings={}), r"symbolic needs the library math-verify"),
    (
      dict(algorithm__rewards="gsm8k", algorithm__reward_settings={"answer_column": "solution"}),
      r"data\.train: reward gsm8k needs the field 'solution' in the prompts' records; they have .*prompt",
    ),
  ],
)
def test_rewards_that_lack_something_are_refused_before_a_run_begins(overrides, message, tmp_path, monkeypatch):
  monkeypatch.setattr(answer.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=message):
    fit(smoke.config("ppo", **overrides), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_rewards_and_their_weights_are_read_from_one_spec():
  options = rollout.SamplingOptions(rewards="gsm8k:0.5+reward_model:2+testbed_gold:0")
  assert rollout.weights(options) == {"reward_model": 2.0, "gsm8k": 0.5, "testbed_gold": 0.0}
  assert list(rollout.host_rewards(options)) == ["gsm8k", "testbed_gold"]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(rewards="reward_model"), "name the run of a reward model"),
    (dict(rewards="gsm8k", reward_model="somewhere"), "name the run of a reward model"),
    (dict(rewards="reward_model:much"), "'much' is no number"),
    (dict(rewards="testbed_gold:0"), "nothing to learn from"),
    (dict(rewards="gsm8k", num_generations=0), "at least 1"),
    (dict(rewards="gsm8k", top_p=0.0), "must be more than 0 and at most 1"),
    (dict(rewards="gsm8k", ensemble="max"), "use one of mean, min, lower"),
  ],
)
def test_options_that_mean_nothing_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    rollout.check(rollout.SamplingOptions(**options))


def test_an_ensemble_is_pooled_as_its_option_says():
  heads = jnp.array([[1.0, 2.0, 6.0]])
  assert rollout.pooled(heads, "mean")[0] == 3
  assert rollout.pooled(heads, "min")[0] == 1
  assert rollout.pooled(heads, "lower")[0] == pytest.approx(3 - np.std([1, 2, 6]))
  assert rollout.pooled(heads, "lower", 2.0)[0] == pytest.approx(3 - 2 * np.std([1, 2, 6]))


@pytest.mark.slow
def test_a_run_prints_an_alarm_once_and_a_continued_one_does_not_repeat_it(tmp_path, monkeypatch, capsys):
  fires = lambda proxy: (over_optimisation.above("eval/completions/clipped_ratio", -1.0, "cut"),)
  monkeypatch.setattr(over_optimisation, "default_rules", fires)  # at the second evaluation, the first with a history
  config = smoke.config("grpo", run__steps=4, run__eval_every=1, run__save_every=3)
  smoke.interrupt(config, tmp_path / "run", 4)
  said = [line for line in capsys.readouterr().err.splitlines() if "alarm: cut" in line]
  means = "eval/completions/clipped_ratio is above -1; see docs/over_optimisation.md"
  assert said == [f"train 2/4  alarm: cut: {means}"]
  fit(config, tmp_path / "run")
  assert "alarm: cut" not in capsys.readouterr().err


# --- passes ----------------------------------------------------------------------------------------------------------


def count_rows(state, batch, hparams, held):
  """A train step that only sums the rows it is given."""
  x = batch.rows["x"]
  metrics = {"loss": x.sum(), "size": batch.totals["count"], "first": x[0]}
  metrics |= {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
  return state.replace(step=state.step + 1, params=state.params + x.sum()), metrics


def passed(passes, limit=0.0):
  zero = jnp.zeros((), jnp.int32)
  state = TrainState(zero, jnp.zeros(()), (), jax.random.key(0), zero, zero)
  update = make_passes(count_rows, passes, lambda rows: {"count": jnp.float32(len(rows["x"]))})
  batch = Batch({"x": jnp.arange(12.0)})
  return jax.jit(update)(state, batch, {"limit": jnp.float32(limit)}, None)


def test_an_epoch_takes_every_row_once_in_another_order():
  orders = np.asarray(row_orders(jax.random.key(0), Passes(epochs=3, minibatches=4), 12))
  assert orders.shape == (12, 3)
  for epoch in orders.reshape(3, 12):
    assert sorted(epoch) == list(range(12))
  assert (orders[:4] != orders[4:8]).any()


def test_passes_are_one_step_of_the_run_and_metrics_their_means():
  state, found = passed(Passes(epochs=2, minibatches=4, first=("first",)))
  assert state.step == 1
  assert state.params == 2 * 66
  assert found["loss"] == 66 / 4
  assert found["size"] == 3
  assert found["passes/steps"] == 8
  orders = row_orders(jax.random.fold_in(jax.random.key(0), 0), Passes(2, 4), 12)
  assert found["first"] == orders[0, 0]


def test_passes_end_once_a_metric_exceeds_its_limit():
  everything = passed(Passes(2, 4, stop=("loss", "limit")))[1]["passes/steps"]
  assert everything == 8  # a limit of 0 is none
  state, found = passed(Passes(2, 4, stop=("loss", "limit")), limit=0.5)
  assert found["passes/steps"] == 1
  assert state.params == found["loss"]


def scored(scores, weights):
  """The outcome of completions with these scores and weights [B]."""
  zeros, ones = jnp.zeros(len(scores)), jnp.ones(len(scores))
  known = dict.fromkeys(("failed", "lengths", "finished"), zeros)
  return Outcome(raw_scores=scores, scores=scores, weights=weights, prompted=ones, **known)


# --- PPO -------------------------------------------------------------------------------------------------------------


@functools.cache
def ppo_run():
  return smoke.finished("ppo")[1]


def test_a_critic_begins_as_the_reward_model_and_the_policy_never_reads_it(config):
  model = critic.attach(decoder.make(config), "own")
  params = jax.jit(model.init)(jax.random.key(0))
  judge = decoder.make(dataclasses.replace(config, head="scalar", score_heads=3)).init(jax.random.key(1))
  started = critic.start("own", params, judge)
  np.testing.assert_array_equal(started["value"]["embed"], judge["embed"])
  np.testing.assert_allclose(started["value"]["score"][:, 0], judge["score"].mean(axis=1), rtol=1e-6)
  tokens, ones = jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
  states = [model.forward(p, tokens, ones, positions)[0] for p in (params, started)]
  np.testing.assert_array_equal(*states)
  assert model.abstract().keys() - critic.policy_of(model).abstract().keys() == {"value"}


@pytest.mark.parametrize("kind", critic.KINDS)
def test_a_value_looks_at_no_later_token(kind, config):
  model = critic.attach(decoder.make(config), kind)
  params = jax.jit(model.init)(jax.random.key(0))
  params["value"]["score"] = jax.random.normal(jax.random.key(1), params["value"]["score"].shape)
  batch = {"segment_ids": jnp.ones((1, 6), jnp.int32), "positions": jnp.arange(6)[None]}

  def values(tokens):
    tokens = jnp.array([tokens])
    hidden = model.forward(params, tokens, batch["segment_ids"], batch["positions"])[0]
    return critic.values(model, params, batch | {"tokens": tokens}, hidden)[0]

  one, other = values([1, 2, 3, 4, 5, 6]), values([1, 2, 3, 7, 8, 9])
  np.testing.assert_allclose(one[:4], other[:4], atol=1e-5)  # of the state before the first token that differs
  assert abs(one[4] - other[4]) > 1e-4
  assert one[0] == 0


@pytest.mark.slow
def test_the_critic_alone_learns_during_its_warm_up(tmp_path):
  config = smoke.config("ppo", run__steps=2, algorithm__value_warmup=2, optimizer__weight_decay=0.1)
  run = fit(config, tmp_path / "run")
  begun = array_store.read_record(tmp_path / "run" / "reference")[1]  # the policy, before anything was learned
  trained = smoke.arrays(tmp_path / "run", 2)
  assert {name: trained[name] for name in begun} == begun
  assert (np.asarray(run.params["value"]["score"]) != 0).any()


@pytest.mark.parametrize(
  "overrides",
  [
    pytest.param(dict(lora__rank=2), marks=pytest.mark.long),
    pytest.param(dict(algorithm__critic="shared"), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_a_run_that_is_killed_during_a_critics_warm_up_continues_to_the_same_end(overrides, tmp_path):
  config = smoke.config("ppo", run__steps=4, run__save_every=1, algorithm__value_warmup=2, **overrides)
  fit(config, tmp_path / "whole")
  smoke.interrupt(config, tmp_path / "killed", step=2)
  fit(config, tmp_path / "killed")
  assert smoke.arrays(tmp_path / "killed", 4) == smoke.arrays(tmp_path / "whole", 4)


@pytest.mark.parametrize(("warm", "trains"), [(0.0, {"value"}), (1.0, {"value", "embed", "layers", "norm"})])
def test_a_shared_critic_trains_its_head_alone_during_the_warm_up(warm, trains, config):
  policy = critic.attach(decoder.make(config), "shared")
  params = jax.jit(policy.init)(jax.random.key(0))
  params["value"] = {"score": 1e-3 * jax.random.normal(jax.random.key(1), (config.embed, 1))}
  options = {"rewards": "gsm8k", "critic": "shared", "value_warmup": 5, "max_new_tokens": 2}
  mask = jnp.zeros((2, 4)).at[:, 2:].set(1.0)
  zeros, ones = jnp.zeros(2), jnp.ones(2)
  texts = {
    "tokens": jnp.ones((2, 4), jnp.int32),
    "segment_ids": jnp.ones((2, 4), jnp.int32),
    "positions": jnp.tile(jnp.arange(4), (2, 1)),
    "loss_mask": mask,
    "weights": jnp.ones((2, 1)),
  }
  known = dict.fromkeys(("raw_scores", "scores", "failed", "lengths", "finished"), zeros)
  learned = ppo.PpoRows(
    texts=texts,
    outcome=Outcome(weights=ones, prompted=ones, **known),
    values=0 * mask,
    **dict.fromkeys(("sampler_logps", "old_logps", "reference_logps"), -mask),
    **dict.fromkeys(("advantages", "returns"), mask),
    **dict.fromkeys(("kl", "paid", "told"), zeros),
  )
  batch = Batch(learned, policy_update.counts(learned) | {"kl_coef": jnp.float32(0), "warm": jnp.float32(warm)})
  loss = made.make(ppo.RECIPE, policy, **options).loss
  hparams = {name: jnp.float32(value) for name, value in made.hparams(ppo.RECIPE, **options).items()}
  grads = jax.jit(jax.grad(lambda p: loss(p, batch, hparams)[0]))(params)
  assert {name for name, tree in grads.items() if any(np.any(x) for x in jax.tree.leaves(tree))} == trains


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_critic_keeps_its_own_dtype_whatever_the_reward_model_is_held_in(dtype, config):
  own, other = (dataclasses.replace(config, param_dtype=name) for name in (dtype, "bfloat16"))
  params = critic.attach(decoder.make(own), "own").init(jax.random.key(0))
  source = decoder.make(dataclasses.replace(other, head="scalar")).init(jax.random.key(1))
  started = critic.start("own", params, source)["value"]
  assert {leaf.dtype.name for leaf in jax.tree.leaves(started)} == {dtype}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "grpo", "nash_md"])
def test_an_iteration_in_bfloat16_begins_at_a_ratio_of_one_or_stops(name, tmp_path, monkeypatch):
  config = smoke.config(
    name, run__steps=1, optimizer__warmup_steps=0, model__dtype="bfloat16", data__eval="", data__holdout=0.0
  )
  fit(config, tmp_path / "run")
  (row,) = rows(tmp_path / "run")
  assert row[policy_update.DRIFT] < 1e-3
  assert 0 < row[f"{policy_update.DIFFERENCE}/mean"] < row[policy_update.TOLERATED]
  original = rollout.sample
  monkeypatch.setattr(rollout, "sample", lambda *args, **kwargs: hot(original(*args, **kwargs)))
  with pytest.raises(InputError, match=r"the trainer and the sampler score a token .* nats apart"):
    fit(config, tmp_path / "hot")


@pytest.mark.parametrize("normalise", [False, True])
def test_statistics_of_scores_are_those_of_all_rows_so_far(normalise):
  rng = np.random.default_rng(0)
  parts, weights = rng.normal(3, 2, (4, 8)).astype(np.float32), (rng.random((4, 8)) < 0.8).astype(np.float32)
  statistics = {name: jnp.float32(value) for name, value in ppo.RUNNING.items()}
  for part, weight in zip(parts, weights, strict=True):
    outcome = scored(jnp.array(part), jnp.array(weight))
    shaped, statistics = ppo.shaped_scores(outcome, statistics, {"reward_clip": jnp.float32(0)}, normalise)
  seen = parts[weights > 0]
  assert statistics["score_mean"] == pytest.approx(seen.mean(), rel=1e-5)
  spread = seen.std(ddof=1)
  assert statistics["score_m2"] == pytest.approx(spread**2 * (len(seen) - 1), rel=1e-4)
  expected = (parts[-1] - seen.mean()) / spread if normalise else parts[-1]
  np.testing.assert_allclose(shaped, expected * weights[-1], atol=1e-4)


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (60.0, 1.2), (0.0, 0.8), (6.6, 1.1)])
def test_the_kl_coefficient_moves_by_at_most_a_fifth_of_the_horizon(kl, factor):
  hparams = {"kl_target": jnp.float32(6), "kl_horizon": jnp.float32(10)}
  assert ppo.kl_step(jnp.full(10, kl), jnp.ones(10), hparams) == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize(
  "overrides",
  [
    dict(algorithm__critic="shared"),
    pytest.param(dict(algorithm__kl_in="loss", algorithm__kl_estimator="k3"), marks=pytest.mark.long),
    dict(algorithm__kl_controller="adaptive", algorithm__normalise_rewards=True, algorithm__whiten_rewards=True),
    pytest.param(dict(lora__rank=2), marks=pytest.mark.long),
    dict(algorithm__missing_eos_penalty=1.0, algorithm__entropy_coef=0.01, algorithm__target_kl=1e-9),
  ],
)
@pytest.mark.slow
def test_options_of_ppo_train(overrides, tmp_path):
  run = fit(smoke.config("ppo", run__steps=2, **overrides), tmp_path / "run")
  assert np.isfinite(list(run.metrics.values())).all()
  assert run.metrics["grad_norm"] > 0
  if "algorithm__target_kl" in overrides:
    assert run.metrics["passes/steps"] < run.config.options.epochs * run.config.options.minibatches
    assert run.metrics["objective/scores"] < run.metrics["rewards/regex"]


OF_MANY = ("dr_grpo", "dapo", "gspo_token", "cispo", "sapo", "vespo", "gmpo")
GROUPS = [
  *(pytest.param(dict(algorithm__loss=loss), marks=pytest.mark.long) for loss in OF_MANY),
  dict(algorithm__loss="gspo"),
  dict(algorithm__loss="rloo", algorithm__advantages="rloo", algorithm__kl_in="reward", algorithm__kl_estimator="k1"),
  pytest.param(
    dict(algorithm__loss="ppo", algorithm__advantages="reinforce++", algorithm__kl_in="loss"), marks=pytest.mark.long
  ),
  pytest.param(
    dict(algorithm__advantages="gdpo", algorithm__rewards="regex+testbed_answer:0.5"), marks=pytest.mark.long
  ),
  dict(algorithm__only_varied=True, algorithm__overlong_buffer=4, algorithm__advantages="batch"),
  dict(algorithm__correction="token_truncate", algorithm__top_entropy=0.5, algorithm__stale_above=0.1),
  dict(algorithm__correction="sequence_mask", lora__rank=2),
]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", GROUPS, ids=lambda found: next(iter(found.values())))
def test_options_of_the_grpo_family_train(overrides, tmp_path):
  run = fit(smoke.config("grpo", run__steps=2, **overrides), tmp_path / "run")
  assert np.isfinite(list(run.metrics.values())).all()
  assert any(row["grad_norm"] > 0 for row in rows(tmp_path / "run"))
  assert run.metrics[policy_update.OFF] == 0


@pytest.mark.slow
def test_truncated_completions_are_not_learned_from_if_so_wished(tmp_path):
  run = fit(smoke.config("grpo", run__steps=2, algorithm__mask_truncated=True), tmp_path / "run")
  assert run.metrics["completions/clipped_ratio"] == 1
  assert all(row["grad_norm"] == 0 for row in rows(tmp_path / "run"))


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_a_pair_is_the_best_and_the_worst_of_a_prompt():
  tokens = jnp.arange(24).reshape(6, 4)
  weights = jnp.array([1.0, 1, 0, 1, 1, 1])
  texts = {
    "tokens": tokens,
    "segment_ids": jnp.ones((6, 4), jnp.int32),
    "positions": jnp.broadcast_to(jnp.arange(4), (6, 4)),
    "loss_mask": jnp.ones((6, 4)),
    "example_mask": jnp.ones((6, 1)),
    "record_ids": jnp.arange(6)[:, None] // 3,
    "weights": weights[:, None],
  }
  outcome = scored(jnp.array([0.0, 2.0, 9.0, 1.0, 1.0, 1.0]), weights)
  paired = lambda texts: online_preference.pair_up(Rollout(texts, jnp.zeros((6, 4)), *jnp.ones((2, 6))), outcome, 3)
  pairs = paired(texts).texts
  np.testing.assert_array_equal(pairs["tokens"][0], [*tokens[1], *tokens[0]])  # the third was not scored
  np.testing.assert_array_equal(pairs["tokens"][1], [*tokens[3], *tokens[5]])  # of equals the first, and another
  np.testing.assert_array_equal(pairs["segment_ids"][0], [1, 1, 1, 1, 2, 2, 2, 2])
  np.testing.assert_array_equal(pairs["weights"], [[1.0], [1.0]])
  assert paired(texts | {"tokens": jnp.zeros_like(tokens)}).texts["weights"].sum() == 0


@pytest.mark.slow
def test_xpo_draws_the_second_completion_from_the_reference(tmp_path):
  run = fit(smoke.config("online_dpo", run__steps=2, algorithm__second="reference"), tmp_path / "run")
  assert run.metrics["loss/bonus"] < 0


@pytest.mark.parametrize("stop_id", [-1, 5])
@pytest.mark.slow
def test_the_pad_is_never_sampled_unless_it_ends_completions(one_device, stop_id):
  module, options = ALGORITHMS["grpo"], {"rewards": "gsm8k", "max_new_tokens": 12, "num_generations": 4}
  model = ppo_run().model
  special = Special(stop_id, pad_id=5)
  hparams = {name: jnp.float32(value) for name, value in made.hparams(module, **options).items()}
  prompts = {
    "tokens": jnp.full((8, 6), 5, jnp.int32).at[:, 3:].set(7),
    "segment_ids": jnp.zeros((8, 6), jnp.int32).at[:, 3:].set(1),
    "loss_mask": jnp.zeros((8, 6)),
    "example_mask": jnp.ones((8, 1)),
  }
  with jax.set_mesh(one_device):
    plain = decoder.make(dataclasses.replace(model.config))
    params = plain.init(jax.random.key(0))
    params["embed"] = params["embed"].at[5].set(10 * params["norm"])  # else often by far the likeliest
    found = rollout.sample(
      plain, params, Batch(prompts), jax.random.key(0), hparams, special, made.split(module, options)[0]
    )
  sampled = np.asarray(found.rows.texts["tokens"])
  assert sampled.shape == (32, 18)
  assert (sampled[:, 6:] == 5).any() == (stop_id == 5)


def test_rows_that_do_not_divide_are_refused_before_anything_is_compiled(tmp_path):
  with pytest.raises(
    InputError, match=r"data\.rows=8 x algorithm\.num_generations=2 is not divisible by .*algorithm\.minibatches=5"
  ):
    fit(smoke.config("ppo", algorithm__minibatches=5), tmp_path / "run")


def test_local_rows_are_what_to_mesh_took(eight_devices):
  x = np.arange(32, dtype=np.float32).reshape(16, 2)
  np.testing.assert_array_equal(sharding.local_rows(sharding.to_mesh({"x": x}, eight_devices).rows["x"]), x)
