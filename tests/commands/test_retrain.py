"""Rounds against a reward model that is retrained between them: killed anywhere, they end as they would have."""

import json
from unittest import mock

import pytest
from etils import epath

from alignjax import cli
from alignjax.commands import best_of, reward_domain
from alignjax.commands import retrain as module
from alignjax.commands.best_of import Request
from alignjax.commands.retrain import Plan, retrain
from alignjax.data.source import open_source
from alignjax.errors import InputError
from alignjax.runs import scorer
from alignjax.runs.run import load
from alignjax.sampling import generate
from tests import smoke

# After a failed read Orbax leaves coroutines behind that nobody awaits.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# Of random words some have it and some have not.
LABELLER = scorer.settings("regex", reward_settings={"pattern": "in|on"})
REQUEST = Request(n=3, max_new_tokens=8)


@pytest.fixture(autouse=True)
def data_cache(monkeypatch, tmp_path_factory):
  monkeypatch.setenv("ALIGNJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
  with smoke.all_end():
    yield


def plan(labeller=LABELLER, earlier=0.5, **overrides):
  policy, reward = smoke.finished("sft")[0], smoke.finished("reward")[0]
  config = smoke.config(
    "rloo",
    run__init=str(policy),
    run__steps=2,
    run__save_every=1,
    run__eval_every=0,
    algorithm__rewards="reward_model+testbed_gold:0",
    algorithm__reward_settings={},
    algorithm__reward_model=str(reward),
  )
  prompts = str(smoke.DATA / "preference.jsonl")
  config = config.replace(smoke.dotted(overrides))
  return Plan(config, labeller, REQUEST, prompts, pairs_per_round=40, earlier=earlier, reward_steps=2)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


class Trained:
  """Stands for `fit`: a finished run of the same kind is the result; remembers what it was asked for."""

  def __init__(self):
    self.configs, self.dies_at = {}, ""

  def __call__(self, config, workdir, stage):
    if stage == self.dies_at:
      raise smoke.Killed
    self.configs[stage] = config
    made, run = smoke.finished("reward" if config.algorithm.name == "reward" else "sft")
    if not workdir.exists():
      smoke.copy(made, workdir)
    return run


@pytest.fixture
def trained(monkeypatch):
  stub = Trained()
  monkeypatch.setattr(module, "fit", stub)
  monkeypatch.setattr(module, "load_metadata", lambda path: {"reference": ""})
  return stub


@pytest.mark.long
def test_a_round_goes_on_from_the_last_policy_and_reward_model_with_the_first_reference(trained, tmp_path):
  asked = plan()
  rows = retrain(asked, tmp_path, 3)["rounds"]
  policies, rewards = ([trained.configs.get(f"{name} {k}") for k in (1, 2, 3)] for name in ("policy", "reward"))
  assert policies[0] == asked.config
  assert rewards[1].run.init == asked.config.options.reward_model
  assert rewards[2].run.init == str(tmp_path / "round-02" / "reward")
  assert policies[2].options.reward_model == str(tmp_path / "round-03" / "reward")
  assert policies[2].run.init == str(tmp_path / "round-02" / "policy")
  assert policies[2].run.reference == policies[1].run.reference == asked.config.run.init
  assert len({config.run.seed for config in policies}) == 3
  new = {k: lines(tmp_path / f"round-0{k}" / "pairs.jsonl") for k in (2, 3)}
  records = lines(tmp_path / "round-03" / "train.jsonl")
  assert records[-len(new[3]) :] == new[3]
  assert len(records) == len(new[3]) + round(0.5 * len(new[3]))
  earlier = [*lines(smoke.DATA / "preference.jsonl"), *new[2]]
  assert all(record in earlier for record in records[: -len(new[3])])
  assert not {one["number"] for one in new[2]} & {one["number"] for one in new[3]}
  assert rows[1]["labelled"]["pairs"] <= len(new[2])
  assert 0 <= rows[1]["labelled"]["accuracy"] <= 1
  assert len(module.show({"rounds": rows}).splitlines()) == 4


@pytest.mark.long
def test_rounds_that_were_killed_between_their_parts_end_as_they_would_have(trained, tmp_path):
  whole = retrain(plan(), tmp_path / "whole", 2)
  killed = tmp_path / "killed"
  go = lambda: retrain(plan(), killed, 2)
  for owner, name in ((best_of, "draw"), (module, "evaluate"), (module, "one_round")):
    with mock.patch.object(owner, name, mock.Mock(side_effect=smoke.Killed)), pytest.raises(smoke.Killed):
      go()
  for stage in ("reward 2", "policy 2"):
    trained.dies_at = stage
    with pytest.raises(smoke.Killed):
      go()
  trained.dies_at = ""
  assert go() == whole
  for name in ("pairs.jsonl", "train.jsonl", "round.json"):
    assert (killed / "round-02" / name).read_bytes() == (tmp_path / "whole" / "round-02" / name).read_bytes()
  with mock.patch.object(
    module, "one_round", mock.Mock(side_effect=AssertionError)
  ):  # complete rounds are read, not made
    assert go() == whole
  with pytest.raises(InputError, match=r"holds other rounds: earlier=0.5 there, 2.0 here"):
    retrain(plan(earlier=2.0), killed, 2)


def test_people_may_label_between_two_calls(trained, tmp_path, capsys):
  start, reward = smoke.finished("sft")[0], smoke.finished("reward")[0]
  overrides = (f"run.init={start}", "run.eval_every=0", "algorithm.rewards=reward_model+regex:0")
  flags = smoke.arguments("rloo", tmp_path / "rounds", *overrides, f"algorithm.reward_model={reward}")[1:]
  command = ["retrain", *flags, "--rounds", "2", "--pairs-per-round", "20", "--max-new-tokens", "8"]
  folder = tmp_path / "rounds" / "round-02"
  for _ in range(2):  # nobody has answered yet
    assert cli.main(command) == 0
    assert f"to {folder / 'pairs.jsonl'}" in capsys.readouterr().out
  asked = lines(folder / "unlabelled.jsonl")
  assert all(len(set(one["responses"])) == 2 for one in asked)
  summary = json.loads((folder / "unlabelled.json").read_text())
  assert (summary["records"], summary["cut_off"]) == (len(asked), 0)
  answers = [{"prompt": one["prompt"], "chosen": one["responses"][0], "rejected": one["responses"][1]} for one in asked]
  (folder / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
  assert cli.main(command) == 0
  assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["2", str(len(asked))]


def test_people_are_asked_about_completions_that_ended_alone(tmp_path):
  row = lambda number, responses, finished: {
    "prompt": "Why?", "number": number, "responses": responses, "finished": finished,
  }  # fmt: skip
  found = [
    row(0, ["a", "b c", "d"], [True, False, True]),
    row(1, ["a", "b c"], [True, False]),
    row(2, ["a", "a"], [True, True]),
    row(3, ["a b", "b c"], [False, False]),
  ]
  rows, reasons = module.comparable(found)
  assert rows == [{"prompt": "Why?", "number": 0, "responses": ["a", "d"]}]
  assert reasons == {"cut off": 2, "all equal": 1}
  policy = smoke.finished("sft")[1]
  source = open_source(str(smoke.DATA / "preference.jsonl"), str(tmp_path / "cache"))
  with (
    mock.patch.object(best_of, "sample_text", generate.sample_text),
    pytest.raises(InputError, match=r"4 cut off\); raise --max-new-tokens=4"),
  ):
    module.ask(policy, source, [0, 1, 2, 3], epath.Path(tmp_path / "unlabelled.jsonl"), Request(n=2, max_new_tokens=4))
  assert not (tmp_path / "unlabelled.jsonl").exists()


@pytest.mark.long
def test_rounds_that_were_killed_while_they_train_end_as_they_would_have(tmp_path, monkeypatch):
  fitted = reward_domain.reward_domain.fit
  monkeypatch.setattr(
    reward_domain.reward_domain, "fit", lambda train, held_out, share: fitted(train, held_out, 0.5)
  )  # of few pairs
  reward = smoke.copy(smoke.finished("reward")[0], tmp_path / "reward")
  reward_domain.write(reward)
  asked = plan(algorithm__reward_model=str(reward), algorithm__domain=str(reward / "domain"))
  whole = retrain(asked, tmp_path / "whole", 2)
  assert 0 <= whole["rounds"][1]["policy"]["eval/domain/outside"] <= 1
  killed = tmp_path / "killed"
  references = {load(tmp_path / f"whole/round-0{k}/policy").metadata["reference"] for k in (1, 2)}
  assert len(references) == 1
  retrain(asked, killed, 1)
  smoke.interrupted_by(lambda: retrain(asked, killed, 2), 1)  # in the reward model
  with (
    mock.patch.object(reward_domain.reward_domain, "measure", mock.Mock(side_effect=smoke.Killed)),
    pytest.raises(smoke.Killed),
  ):
    retrain(asked, killed, 2)
  smoke.interrupted_by(lambda: retrain(asked, killed, 2), 1)  # in the policy
  assert retrain(asked, killed, 2) == whole
  for run in ("round-02/reward", "round-02/policy"):
    assert smoke.arrays(killed / run, 2) == smoke.arrays(tmp_path / "whole" / run, 2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda p: p._replace(config=smoke.config("rloo")), "with a reward model of pairs"),
    (lambda p: p._replace(config=smoke.config("dpo")), "with a reward model of pairs"),
    (lambda p: p._replace(config=p.config.replace({"run.init": ""})), r"run\.init is empty"),
    (lambda p: p._replace(request=Request(n=1)), r"--n=1: must be at least 2"),
    (lambda p: p._replace(reward_steps=0), r"--reward-steps=0: must be at least 1"),
  ],
)
def test_plans_that_mean_nothing_are_refused(change, message, tmp_path):
  with pytest.raises(InputError, match=message):
    retrain(change(plan()), tmp_path, 2)
  assert not (tmp_path / "plan.json").exists()
