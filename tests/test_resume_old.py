"""Run directories of an earlier version go on: tests/runs_006a525, and what else such a version stored."""

import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from alignjax.algorithms.algorithm import Algorithm
from alignjax.commands import rounds, sweep
from alignjax.commands.iterate import Plan
from alignjax.errors import InputError
from alignjax.runs import defaults
from alignjax.runs.build import make_algorithm
from alignjax.runs.checkpoint import Checkpointer
from alignjax.runs.run import beside_params, load
from alignjax.runs.scorer import recorded, settings
from alignjax.runs.workdir import as_begun, read_config, replaced
from alignjax.system.fingerprint import fingerprint, table
from alignjax.train import fit
from alignjax.training import earlier, metrics
from alignjax.training.optim import OptimizerConfig, make_optimizer, widened
from alignjax.training.step import create_state
from tests import smoke

RUNS = Path(__file__).parent / "runs_006a525"
TINY = {
  "model__layers": 1,
  "model__embed": 4,
  "model__mlp": 8,
  "model__heads": 1,
  "model__kv_heads": 1,
  "model__head_dim": 4,
  "data__holdout": 0.0,
  "run__steps": 4,
  "run__eval_every": 0,
}
RENAMED = {"rewards/testbed_answer/judged": "rewards/testbed_answer/scored"}  # metrics, since that version
OWN = {
  "dpo": {"optimizer__name": "lion"},
  "ppo": {"data__eval": "", "algorithm__value_warmup": 3, "algorithm__epochs": 2},
}


def config(name, **overrides):
  """Of the command that made a run, as its README has it."""
  return smoke.config(name, **(TINY | OWN[name] | overrides))


def copy(name, to, **changes):
  """A copy of a run, whose record says something else: section__key=value."""
  workdir = smoke.copy(RUNS / name, to)
  record = json.loads((workdir / "config.json").read_text())
  assert "sha256" not in record
  for key, value in changes.items():
    section, field = key.split("__")
    record["config"][section][field] = value
  (workdir / "config.json").write_text(json.dumps(record))
  return workdir


def by_step(workdir):
  found = {}
  for row in metrics.read(workdir / "metrics.jsonl"):
    found.setdefault(row["step"], {}).update(row)
  return found


def continued(name, workdir):
  """Trains a copy to its end; the (step, state as it was restored, fingerprints of that) it went on from."""
  seen = []
  restore = Checkpointer.restore

  def spy(*args):
    found = restore(*args)
    state = found.state
    prints = fingerprint({"params": state.params, "opt_state": state.opt_state, "running": state.running})
    seen.append((found.step, jax.device_get((state.step, state.opt_state, state.running)), prints))
    return found

  with mock.patch.object(Checkpointer, "restore", spy), smoke.devices(1):
    run = fit(config(name), workdir)
  assert run.step == 4
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "4"]
  return seen[0]


def assert_goes_on(workdir, name, new=(), mended=()):
  """The metrics up to the checkpoint are those that were there; of the steps behind it, those of the old version.

  Args:
    workdir: of the copy that went on.
    name: of the run.
    new: metrics that the old version had not.
    mended: (step, metric), where it had another number, by a fault.
  """
  before, now = by_step(RUNS / name), by_step(workdir)
  for step in (3, 4):
    before[step] = {RENAMED.get(key, key): value for key, value in before[step].items()}
  assert now.keys() == before.keys() == {0, 1, 2, 3, 4}
  assert all(now[step] == before[step] for step in (0, 1, 2))
  for step in (3, 4):
    old = {key.replace("/judged", "/scored"): value for key, value in before[step].items()}  # the name of then
    assert now[step].keys() == old.keys() | set(new)
    shared = {key: value for key, value in old.items() if (step, key) not in mended}
    assert {key: now[step][key] for key in shared} == pytest.approx(shared, rel=2e-3, abs=2e-5)


def assert_kept(prints, name, *items):
  """Every array of these items is bit for bit as it was saved."""
  saved = {
    path: row["fingerprint"] for path, row in smoke.arrays(RUNS / name, 2).items() if path.split("/")[0] in items
  }
  assert saved
  assert saved.items() <= prints.items()


@pytest.mark.slow
def test_a_run_with_another_default_goes_on_as_it_began(tmp_path, capsys):
  workdir = copy("dpo", tmp_path / "dpo")
  step, (counter, _, _), prints = continued("dpo", workdir)
  assert step == counter == 2
  assert_kept(prints, "dpo", "params", "opt_state")
  assert_goes_on(workdir, "dpo")
  assert "optimizer.b2=0.999: the default when this run began; it is 0.99 now\n" in capsys.readouterr().out
  # The record is one of this version now, and the same command is still that of this run.
  record = json.loads((workdir / "config.json").read_text())
  assert (record["config"]["optimizer"]["b2"], record["defaults"]) == (0.999, 1)
  again, notes = as_begun(epath.Path(workdir), config("dpo"))
  assert (again.optimizer.b2, len(notes)) == (0.999, 1)
  assert as_begun(epath.Path(workdir), config("dpo", optimizer__b2=0.999)) == (again, [])
  with pytest.raises(InputError, match=r"holds another run: optimizer\.b2=0\.999 there, 0\.9 here"):
    as_begun(epath.Path(workdir), config("dpo", optimizer__b2=0.9))


@pytest.mark.slow
def test_a_ppo_run_that_warms_its_critic_goes_on(tmp_path, capsys):
  workdir = copy("ppo", tmp_path / "ppo")
  step, (counter, opt_state, running), prints = continued("ppo", workdir)
  assert step == counter == 2
  assert_kept(prints, "ppo", "params", "running")
  assert running["score_squares"] == running["score_count"] > 0
  saved = {path: row["fingerprint"] for path, row in smoke.arrays(RUNS / "ppo", 2).items()}
  for moment in ("mu", "nu"):
    now = prints[f"opt_state/1/first/inner_state/{moment}/value/score"]
    assert now == saved[f"opt_state/1/{moment}/value/score"]
  parts = opt_state[1]
  assert parts.first.inner_state.count == 2 * 2 * 2  # steps, epochs, minibatches
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(parts.rest))
  # In step 4 the policy takes its first updates. The old version corrected their bias by a count that had run ahead, so
  # they were too large: means over the passes of that step differ, and all that is known before them is as it was.
  mended = [(4, key) for key in ("grad_norm", "loss", "loss/policy")]
  assert_goes_on(workdir, "ppo", new=("policy/drift",), mended=mended)
  said = capsys.readouterr().out
  assert "lacks the running statistic score_squares, which is new: it begins with what score_count has\n" in said
  assert (
    "state of value is kept apart from that of the rest now; that of the rest begins anew when its training does\n"
    in said
  )


def test_an_old_run_can_be_used(tmp_path):
  workdir = copy("ppo", tmp_path / "ppo", data__tokenizer=str(smoke.DATA / "tokenizer.model"))
  with smoke.devices(1):
    run = load(workdir)
    algorithm = make_algorithm(run.config, run.model, run.tokenizer, epath.Path(workdir))
    with pytest.warns(UserWarning, match="lacks the running statistic score_squares, which is new: it begins with"):
      _, running = beside_params(epath.Path(workdir), run, algorithm)
  assert running.keys() == algorithm.running.keys()
  assert running["score_squares"] == running["score_count"]


@pytest.mark.parametrize(
  ("place", "estimator", "why"),
  [
    ("loss", "k1", "as a loss its gradient is 0 on average"),
    ("reward", "k3", "in the reward the policy's gradient is then not that of the KL"),
  ],
)
def test_what_is_refused_now_says_what_to_do(tmp_path, place, estimator, why):
  workdir = epath.Path(copy("ppo", tmp_path / "ppo", algorithm__kl_in=place, algorithm__kl_estimator=estimator))
  with pytest.raises(
    InputError, match=f"what this run began with is refused now: .*{why}.*another --workdir"
  ) as raised:
    as_begun(workdir, config("ppo", algorithm__kl_in=place))
  assert "\n" not in str(raised.value)
  assert read_config(workdir).options.kl_estimator == ""  # to sample from, or to begin with
  with pytest.raises(InputError, match="holds another run"):
    as_begun(workdir, config("ppo", algorithm__kl_in=place, algorithm__whiten_rewards=True))
  (said,) = replaced(workdir)  # which an evaluation, that pays the KL, warns of
  assert said.startswith(f"{workdir / 'config.json'}: algorithm.kl_estimator={estimator} with algorithm.kl_in={place}")
  assert said.endswith(f"; here it is {'rho_k3' if place == 'loss' else 'k1'}")


def test_what_never_was_an_estimator_is_not_passed_over(tmp_path):
  workdir = epath.Path(copy("ppo", tmp_path / "ppo", algorithm__kl_estimator="k33"))
  with pytest.raises(InputError, match=r"config\.json: .*kl_estimator='k33'.*; correct it there"):
    read_config(workdir)


def test_a_default_that_means_the_same_is_not_spoken_of(tmp_path):
  workdir = epath.Path(copy("ppo", tmp_path / "ppo"))
  began, notes = as_begun(workdir, config("ppo"))
  assert (began.options.kl_estimator, notes) == ("k1", [])


def test_a_new_run_has_the_defaults_of_today():
  stored = smoke.config("dpo", optimizer__name="lion", optimizer__b2=0.999).to_dict()
  now = smoke.config("dpo", optimizer__name="lion")
  assert defaults.kept(stored, defaults.GENERATION, now) == (now, [])
  assert defaults.kept(stored, 1, now)[0].optimizer.b2 == 0.999


def test_moments_of_bfloat16_go_on_in_float32(tmp_path):
  algorithm = Algorithm(lambda *_: {}, lambda *_: (0.0, {}), "num_tokens")
  params = {"w": jnp.arange(6, dtype=jnp.bfloat16)}
  state = create_state(params, make_optimizer(OptimizerConfig()), jax.random.key(0))
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) + 1 if x.dtype == jnp.float32 else x + 3, state.opt_state)
  old = Checkpointer(tmp_path, save_every=1)
  old.save(1, state.replace(opt_state=narrow), {}, metadata={}, force=True)
  old.close()
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  run = Checkpointer(tmp_path, save_every=1)
  with pytest.raises(InputError, match=r"its opt_state/1/mu/w is bfloat16\[6\] and not float32\[6\]"):
    run.restore(like, {})
  found = run.restore(like, {}, lambda saved: earlier.form(saved, state=like, algorithm=algorithm))
  run.close()
  assert table(found.state.opt_state) == table(widened_floats(narrow))
  assert table(found.state.params) == table(params)
  said = "2 arrays, such as opt_state/1/mu/w, were saved in bfloat16, and go on in float32 with the same values"
  assert found.notes == (said,)


def widened_floats(tree):
  return jax.tree.map(lambda x: widened(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def test_a_part_whose_training_had_begun_keeps_its_moments():
  config, first = OptimizerConfig(), ("value",)
  params = {"value": jnp.ones(2), "embed": jnp.ones(3)}
  whole, parted = (make_optimizer(config, names) for names in ((), first))
  _, state = whole.update(params, whole.init(params), params)
  wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parted.init(params))
  _, expected = parted.update(params, parted.init(params), params)
  assert table(earlier.divide(state, wanted, begun=True)) == table(expected)
  anew = earlier.divide(state, wanted, begun=False)
  assert table(anew[1].first) == table(expected[1].first)
  assert table(anew[1].rest) == table(parted.init(params)[1].rest)


def test_rounds_and_sweeps_go_on_as_they_began(tmp_path, capsys):
  lion = smoke.config("dpo", optimizer__name="lion")
  began = lion.replace({"optimizer.b2": 0.999})
  plan = Plan(lion, settings("regex"))
  record = plan._asdict() | {"config": began.to_dict(), "request": plan.request._asdict()}
  record["rewards"] = recorded(plan.rewards)
  (tmp_path / "plan.json").write_text(json.dumps(record))
  assert rounds.claim(epath.Path(tmp_path), plan).config == began
  # Of a sweep, the members were the whole of the file.
  swept = epath.Path(tmp_path / "sweep")
  swept.mkdir()
  (swept / "members.json").write_text(json.dumps([{"overrides": {}, "config": began.to_dict()}]))
  capsys.readouterr()
  for said in ("optimizer.b2=0.999: the default when this run began; it is 0.99 now\n",) * 2:
    assert sweep._claim(swept, [sweep.Member({}, lion)])[0].config == began
    assert capsys.readouterr().out == said
  with pytest.raises(InputError, match="holds another sweep"):
    sweep._claim(swept, [sweep.Member({}, lion)] * 2)


def test_rounds_and_sweeps_that_began_with_what_is_refused_now_are_named(tmp_path):
  now = config("ppo")
  plan, stored = Plan(now, settings("regex")), now.to_dict()
  stored["algorithm"]["kl_estimator"] = "k3"
  record = plan._asdict() | {"config": stored, "request": plan.request._asdict()}
  record["rewards"] = recorded(plan.rewards)
  (tmp_path / "plan.json").write_text(json.dumps(record))
  (tmp_path / "members.json").write_text(json.dumps([{"overrides": {}, "config": stored}]))
  for name, claim in (
    ("plan", lambda: rounds.claim(epath.Path(tmp_path), plan)),
    ("members", lambda: sweep._claim(epath.Path(tmp_path), [sweep.Member({}, now)])),
  ):
    with pytest.raises(InputError, match=rf"{name}\.json: algorithm\.kl_estimator=k3 .*; choose another --workdir"):
      claim()
