"""The best of n as records to train on, and rounds of it: killed anywhere, they end as they would have."""

import json
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from alignjax import cli
from alignjax.commands import best_of as module
from alignjax.commands import iterate as rounds_of
from alignjax.commands.best_of import Request, best_of, choose
from alignjax.commands.iterate import Plan, iterate
from alignjax.commands.rounds import prompts_of
from alignjax.data.format import parse
from alignjax.errors import InputError
from alignjax.evaluation import interval
from alignjax.runs.run import load
from alignjax.runs.scorer import make_scorer, rollout, settings
from alignjax.sampling import generate
from alignjax.train import fit
from tests import smoke

# After a failed read Orbax leaves coroutines behind that nobody awaits.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PROMPTS = smoke.DATA / "preference.jsonl"
HELD_OUT = smoke.DATA / "eval_prompts.jsonl"
REGEX = settings("regex+testbed_gold:0", reward_settings={"pattern": "in|on"})
REQUEST = Request(n=3, max_new_tokens=8)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch, tmp_path_factory):
  """Several parts of few prompts; indices in a folder of the tests."""
  monkeypatch.setattr(module, "PART", 8)
  monkeypatch.setenv("ALIGNJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
  with smoke.all_end():
    yield


def policy():
  return load(smoke.finished("sft")[0])


def scorer(run, o=REGEX):
  return make_scorer(o, run.tokenizer, run.mesh)


def sampled(out):
  return [json.loads(line) for part in sorted(out.with_suffix(".parts").glob("*.jsonl")) for line in part.open()]


# --- best of n -------------------------------------------------------------------------------------------------------


def row(scores, texts=None, number=0, finished=None):
  texts = texts or [f"text {k}" for k in range(len(scores))]
  ends = finished or [True] * len(scores)
  return {"prompt": "Why?", "completions": texts, "scores": scores, "number": number, "finished": ends}


def test_the_best_is_kept_and_of_equals_the_first():
  records, left_out = choose([row([1.0, 3.0, 3.0]), row([None, None, 0.5]), row([None] * 3)], pairs=False)
  assert [record["completion"] for record in records] == ["text 1", "text 2"]
  assert left_out == {"no score": 1, "cut off": 0}
  assert parse(records[0], "sft").completions[0][0]["content"] == "text 1"


def test_a_chosen_completion_keeps_the_tools_of_its_prompt():
  tools = [{"name": "f"}]
  (record,), _ = choose([row([1.0, 0.0]) | {"tools": tools}], pairs=True)
  assert parse(record, "preference").tools == tuple(tools)


def test_a_pair_is_the_best_and_the_worst_that_were_judged_and_differ():
  rows = [
    row([1.0, None, 0.0]),
    row([1.0, 1.0]),
    row([2.0, 1.0], ["same", "same"]),
    row([None, 1.0]),
    row([None, None]),
  ]
  records, left_out = choose(rows, pairs=True)
  assert [(record["chosen"], record["rejected"]) for record in records] == [("text 0", "text 2")]
  assert left_out == {"no score": 1, "one score": 1, "cut off": 0, "all equal": 2}
  assert len(parse(records[0], "preference").completions) == 2


def test_a_completion_that_was_cut_off_is_in_no_record():
  """A record's completion ends with the stop token: the model would learn to stop in the middle of a sentence."""
  rows = [
    row([3.0, 2.0, 1.0, 0.0], finished=[False, True, True, False]),
    row([3.0, 2.0], finished=[False, False]),
    row([3.0, 2.0], finished=[True, False]),
    row([None, 2.0], finished=[True, False]),
  ]
  best, left_out = choose(rows, pairs=False)
  assert [record["completion"] for record in best] == ["text 1", "text 0"]
  assert left_out == {"no score": 0, "cut off": 2}
  pairs, left_out = choose(rows, pairs=True)
  assert [(record["chosen"], record["rejected"]) for record in pairs] == [("text 1", "text 2")]
  assert left_out == {"no score": 0, "one score": 1, "cut off": 2, "all equal": 0}
  assert module.cut_off(rows) == 6


def test_where_every_completion_was_cut_off_the_remedy_is_named(tmp_path):
  run = policy()
  with (
    mock.patch.object(module, "sample_text", generate.sample_text),
    pytest.raises(InputError, match=r"out\.jsonl: no prompt has a record \(2 cut off\); raise --max-new-tokens=2"),
  ):
    best_of(run, PROMPTS, scorer(run), tmp_path / "out.jsonl", Request(n=2, max_new_tokens=2), numbers=range(2))
  assert not (tmp_path / "out.jsonl").exists()


def test_the_scores_of_all_samples_have_an_interval_over_prompts(tmp_path):
  run = policy()
  found = best_of(run, PROMPTS, scorer(run), tmp_path / "out.jsonl", REQUEST, numbers=range(6))["scores_of_all"]
  rows = sampled(tmp_path / "out.jsonl")
  scores, prompts = zip(*((s, one["number"]) for one in rows for s in one["scores"]), strict=True)
  assert found["interval"] == interval.mean(scores, prompts).interval
  assert (found["count"], found["prompts"]) == (18, 6)
  one = best_of(run, PROMPTS, scorer(run), tmp_path / "one.jsonl", REQUEST, numbers=[3])["scores_of_all"]
  assert one["interval"] is None
  assert one["count"] == 3


@pytest.mark.parametrize("pairs", [False, True])
def test_samples_that_were_interrupted_go_on_and_none_is_drawn_twice(pairs, tmp_path):
  run = policy()
  whole = best_of(run, PROMPTS, scorer(run), tmp_path / "whole.jsonl", REQUEST, pairs=pairs, numbers=range(20))
  drawn, asked = module.draw, []

  def dying(policy, source, numbers, request):
    asked.append(list(numbers))
    if len(asked) == 2:
      raise smoke.Killed
    return drawn(policy, source, numbers, request)

  out = tmp_path / "killed.jsonl"
  with mock.patch.object(module, "draw", dying):
    with pytest.raises(smoke.Killed):
      best_of(run, PROMPTS, scorer(run), out, REQUEST, pairs=pairs, numbers=range(20))
    assert not out.exists()
    assert best_of(run, PROMPTS, scorer(run), out, REQUEST, pairs=pairs, numbers=range(20)) == whole
  assert asked == [list(range(8)), list(range(8, 16)), list(range(8, 16)), list(range(16, 20))]
  assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
  assert whole["prompts"] == 20 == whole["records"] + sum(whole["left_out"].values())
  assert whole["kl_bound"] == pytest.approx(np.log(3) - 2 / 3)


def test_a_completion_belongs_to_its_prompts_number_whatever_else_is_asked(tmp_path):
  run = policy()
  for name, numbers in {"some": [5, 17, 3], "all": range(20)}.items():
    best_of(run, PROMPTS, scorer(run), tmp_path / f"{name}.jsonl", REQUEST, numbers=numbers)
  everything = {one["number"]: one for one in sampled(tmp_path / "all.jsonl")}
  for one in sampled(tmp_path / "some.jsonl"):
    assert one == everything[one["number"]]


def test_parts_of_another_request_are_refused(tmp_path):
  run = policy()
  best_of(run, PROMPTS, scorer(run), tmp_path / "out.jsonl", REQUEST, numbers=range(4))
  for other, numbers, name in ((REQUEST._replace(seed=1), range(4), "request"), (REQUEST, range(5), "numbers")):
    with pytest.raises(InputError, match=f"samples of another {name}"):
      best_of(run, PROMPTS, scorer(run), tmp_path / "out.jsonl", other, numbers=numbers)


def always(run):
  """A scorer to whom all are equal."""
  return scorer(run, settings("regex", reward_settings={"pattern": "^"}))


def test_a_reward_that_failed_is_none_and_its_completion_is_left_out(tmp_path, capsys):
  run = policy()

  def moody(prompts, completions, token_ids, columns):
    return [float("nan") if number > 2 and number % 3 else float(number) for number in range(len(prompts))]

  with (
    mock.patch.object(rollout, "host_rewards", return_value={"regex": moody}),
    mock.patch.object(rollout, "weights", return_value={"regex": 1.0}),
  ):
    judged = scorer(run)
  found = best_of(run, PROMPTS, judged, tmp_path / "out.jsonl", REQUEST, pairs=True, numbers=range(4))
  assert found["failed_rewards"] == 6
  assert (found["records"], found["left_out"]["one score"]) == (1, 3)
  assert "not finite" in capsys.readouterr().out
  with pytest.raises(InputError, match=r"no prompt has a record \(1 all equal\); check the rewards"):
    best_of(run, PROMPTS, always(run), tmp_path / "none.jsonl", REQUEST, pairs=True, numbers=[0])


def test_a_reward_model_scores_what_its_own_run_scores(tmp_path):
  run, (judge, _) = policy(), smoke.finished("reward")
  found = scorer(run, settings(str(judge)))
  assert found.identity["rewards"] == "reward_model"
  drawn = module.draw(run, module.open_source(PROMPTS), [0, 1], REQUEST)
  worth = found.score(drawn)
  np.testing.assert_array_equal(worth.scores, worth.each["reward_model"])
  alone = np.concatenate([found.score([one]).scores for one in drawn])
  np.testing.assert_allclose(worth.scores, alone, atol=1e-5)
  with pytest.raises(InputError, match="is a policy and no reward model"):
    scorer(run, settings(str(smoke.finished("sft")[0])))


# --- rounds ----------------------------------------------------------------------------------------------------------


def plan(algorithm="preference", **changes):
  start = str(smoke.finished("sft")[0])
  overrides = {"algorithm__name": algorithm} if algorithm != "preference" else {}
  config = smoke.config(
    "iterative_dpo", run__init=start, run__steps=2, run__save_every=1, run__eval_every=0, data__holdout=0.0, **overrides
  )
  defaults = dict(prompts=str(PROMPTS), prompts_per_round=20, eval_prompts=str(HELD_OUT), request=REQUEST)
  return Plan(config, REGEX, **(defaults | changes))


@pytest.mark.long
def test_rounds_that_were_killed_end_as_they_would_have(tmp_path):
  whole = iterate(plan(), tmp_path / "whole", 2)
  assert [row["round"] for row in whole["rounds"]] == [0, 1, 2]
  killed = tmp_path / "killed"
  drawn, calls = module.draw, []

  def dying(*args):
    calls.append(args)
    if len(calls) == 2:
      raise smoke.Killed
    return drawn(*args)

  with mock.patch.object(module, "draw", dying), pytest.raises(smoke.Killed):  # while a round samples
    iterate(plan(), killed, 2)
  for step in (1, 2):  # while it trains, and when it has
    smoke.interrupted_by(lambda: iterate(plan(), killed, 2), step)
  with mock.patch.object(rounds_of, "evaluate", mock.Mock(side_effect=smoke.Killed)), pytest.raises(smoke.Killed):
    iterate(plan(), killed, 2)
  found = iterate(plan(), killed, 2)
  assert found == whole
  for number in ("round-01", "round-02"):
    assert (killed / number / "records.jsonl").read_bytes() == (
      tmp_path / "whole" / number / "records.jsonl"
    ).read_bytes()
    assert smoke.arrays(killed / number / "run", 2) == smoke.arrays(tmp_path / "whole" / number / "run", 2)
  assert len(rounds_of.show(whole).splitlines()) == 4
  with mock.patch.object(
    rounds_of, "one_round", mock.Mock(side_effect=AssertionError)
  ):  # complete rounds are read, not made
    assert iterate(plan(), killed, 2) == whole
  with pytest.raises(InputError, match="holds other rounds: reference"):
    iterate(plan(reference="first"), killed, 2)


@pytest.mark.parametrize(("reference", "first"), [("last", False), pytest.param("first", True, marks=pytest.mark.long)])
@pytest.mark.long
def test_a_round_begins_with_the_last_ones_policy_and_has_the_reference_that_was_asked_for(reference, first, tmp_path):
  asked = plan(reference=reference, eval_prompts="")
  iterate(asked, tmp_path, 2)
  run = load(tmp_path / "round-02" / "run")
  assert run.config.run.init == str(tmp_path / "round-01" / "run")
  same = run.metadata["reference"] == load(tmp_path / "round-01" / "run").metadata["reference"]
  assert same == first
  losses = smoke.losses(tmp_path / "round-02" / "run")
  assert (abs(losses[0] - np.log(2)) < 1e-6) == (not first)


def one_prompt():
  path = Path(tempfile.mkdtemp()) / "one.jsonl"
  path.write_text('{"prompt": "Why?"}\n')
  return path


JUDGED = ("--reward", "regex", "--reward-settings", '{"pattern": "in|on"}', "--max-new-tokens", "8", "--n", "3")


@pytest.mark.long
def test_rounds_of_sft_are_raft(tmp_path, capsys):
  start = smoke.finished("sft")[0]
  overrides = ("algorithm.name=sft", "run.steps=2", "run.eval_every=0", "data.holdout=0", f"run.init={start}")
  flags = smoke.arguments("iterative_dpo", tmp_path, *overrides)[1:]
  assert cli.main(["iterate", *flags, *JUDGED, "--rounds", "1", "--prompts-per-round", "20"]) == 0
  assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["1", "20"]
  records = [json.loads(line) for line in (tmp_path / "round-01" / "records.jsonl").open()]
  assert {"prompt", "completion"} <= records[0].keys()
  row = json.loads((tmp_path / "summary.json").read_text())["rounds"][0]
  assert row["generated"]["records"] == len(records) == 20
  assert row["trained"]["loss"] > 0


def test_the_best_of_n_is_had_from_the_command_line(tmp_path, capsys):
  flags = ("best-of", "--workdir", str(smoke.finished("sft")[0]), "--prompts", str(HELD_OUT), *JUDGED)
  assert cli.main([*flags, "--out", str(tmp_path / "best.jsonl")]) == 0
  assert "12 records of 12 prompts (none left out)" in capsys.readouterr().out
  assert len((tmp_path / "best.jsonl").read_text().splitlines()) == 12
  with pytest.raises(InputError, match=r"give it the ending \.jsonl"):
    cli.main([*flags, "--out", str(tmp_path / "best.json")])


def test_rounds_take_the_next_prompts_of_one_order():
  first, second, third = (prompts_of(0, 20, 50, number) for number in (1, 2, 3))
  assert len({*first, *second}) == 40
  assert len(third) == 20
  assert third[10:] == first[:10]
  assert sorted(prompts_of(0, 0, 50, 2)) == list(range(50))


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    (lambda: plan("reward"), "rounds are of sft, preference or unpaired"),
    (lambda: plan("grpo"), "rounds are of sft, preference or unpaired"),
    (lambda: plan()._replace(config=smoke.config("iterative_dpo")), "run.init is empty"),
    (lambda: plan(reference="none"), "use one of last, first"),
    (lambda: plan(eval_prompts=str(one_prompt())), r"--eval-prompts=.*one\.jsonl: holds one prompt"),
  ],
)
def test_plans_that_mean_nothing_are_refused(asked, message, tmp_path):
  with pytest.raises(InputError, match=message):
    iterate(asked(), tmp_path, 1)
  assert not (tmp_path / "plan.json").exists()


def test_a_reference_that_nothing_reads_is_refused(tmp_path):
  start = str(smoke.finished("sft")[0])
  with pytest.raises(InputError, match=r"run\.reference=.*: the loss has no frozen reference"):
    fit(smoke.config("dpo", algorithm__loss="simpo", run__reference=start), tmp_path)
