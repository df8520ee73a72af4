"""A run directory gives back the model that was trained, scores it as training did, and samples the same each time."""

import json

import pytest

from alignjax.errors import InputError
from alignjax.evaluation.held_out import evaluate
from alignjax.runs.build import make_model
from alignjax.runs.run import load, sample
from alignjax.runs.workdir import read_config
from alignjax.system.fingerprint import fingerprint
from alignjax.train import fit
from tests import smoke

PROMPTS = ["What is 12 + 5?", "Who has the red ball?"]


@pytest.fixture(scope="module")
def sft():
  """The SFT run, loaded."""
  return load(smoke.finished("sft")[0])


@pytest.mark.parametrize("name", ["dpo", *(pytest.param(name, marks=pytest.mark.long) for name in ("sft", "reward"))])
def test_loaded_run_is_the_trained_one(name):
  workdir, trained = smoke.finished(name)
  run = load(workdir)
  assert (run.step, run.config, run.model.config) == (trained.step, trained.config, trained.model.config)
  assert fingerprint(run.params) == fingerprint(trained.params)
  assert run.metadata["tokenizer"] == run.tokenizer.fingerprint


def test_an_older_checkpoint_can_be_loaded(sft):
  older = load(smoke.finished("sft")[0], step=4)
  assert older.step == 4
  assert fingerprint(older.params) != fingerprint(sft.params)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_evaluation_is_that_of_the_last_step(name):
  workdir, trained = smoke.finished(name)
  numbers = evaluate(workdir)
  assert numbers["step"] == smoke.STEPS
  last = {key: value for key, value in trained.metrics.items() if key.startswith("eval/")}
  assert {key: numbers[key.removeprefix("eval/")] for key in last} == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize("name", [pytest.param("sft", marks=pytest.mark.slow), "reward"])
@pytest.mark.slow
def test_evaluation_takes_runs_of_fewer_rows_than_devices(name, tmp_path):
  mesh = {"mesh__fsdp": 2, "mesh__sequence": 4}
  trained = fit(smoke.config(name, **mesh, data__rows=2, run__steps=2, model__layers=1), tmp_path)
  ours, theirs = {"sft": ("loss", "loss"), "reward": ("heldout_accuracy", "rewards/accuracies")}[name]
  assert evaluate(tmp_path)[ours] == pytest.approx(trained.metrics[f"eval/{theirs}"], rel=1e-5)


def test_evaluation_of_a_reward_model_is_its_accuracy_and_calibration():
  workdir, trained = smoke.finished("reward")
  numbers = evaluate(workdir)
  assert numbers["heldout_accuracy"] == pytest.approx(trained.metrics["eval/rewards/accuracies"], abs=1e-6)
  assert {"heldout_interval", "ece", "brier", "reliability"} <= set(numbers)
  assert numbers["pairs"] == numbers["examples"]


def test_evaluation_takes_other_records():
  other = smoke.DATA / "eval_preference.jsonl"
  numbers = evaluate(smoke.finished("reward")[0], str(other))
  assert 0 < numbers["examples"] <= len(other.read_text().splitlines())
  assert numbers["examples"] != evaluate(smoke.finished("reward")[0])["examples"]


def test_sample_is_a_function_of_seed_prompt_and_number(sft):
  draw = lambda prompts, **options: [
    [list(completion.tokens) for completion in drawn] for drawn in sample(sft, prompts, max_new_tokens=8, **options)
  ]
  both = draw(PROMPTS, num=2)
  assert [len(drawn) for drawn in both] == [2, 2]
  assert draw(PROMPTS[:1], num=2) == both[:1]
  assert draw(PROMPTS, num=1) == [drawn[:1] for drawn in both]
  assert draw(PROMPTS, num=2, seed=1) != both
  assert draw(PROMPTS, temperature=0) == draw(PROMPTS, temperature=0, seed=1)


def test_sample_takes_messages(sft):
  dialogue = [{"role": "user", "content": PROMPTS[0]}]
  (text,), (messages,) = sample(sft, [PROMPTS[0]], max_new_tokens=4), sample(sft, [dialogue], max_new_tokens=4)
  assert text[0].text == messages[0].text


def test_reward_model_is_not_sampled_from():
  with pytest.raises(InputError, match="a reward model scores and does not write"):
    sample(smoke.finished("reward")[1], PROMPTS)


def test_tokenizer_that_has_changed_is_refused(tmp_path):
  workdir = smoke.copy(smoke.finished("sft")[0], tmp_path / "run")
  changed = tmp_path / "tokenizer.model"
  changed.write_bytes((smoke.DATA / "tokenizer.model").read_bytes() + b"\x72\x00")  # an empty unknown field
  record = json.loads((workdir / "config.json").read_text())
  del record["sha256"]  # as whoever changes it does
  record["config"]["data"]["tokenizer"] = str(changed)
  (workdir / "config.json").write_text(json.dumps(record))
  with pytest.raises(InputError, match="is not the tokenizer that the checkpoint was trained with"):
    load(workdir)


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("{", r"is damaged \(Expecting property name"),
    ("[]", r"is damaged \(not a JSON object\)"),
    ("{}", r"not the config of a run"),
    ('{"config": []}', r"config: a list; give a mapping of sections"),
    ('{"config": {"run": {"stps": 1}}}', r"algorithm\.name=''.*; correct it there, or name another run"),
  ],
)
def test_config_that_can_not_be_read_is_named(tmp_path, text, said):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(InputError, match=rf"config\.json: {said}"):
    read_config(tmp_path)


def test_shared_prompts_are_refused_with_windows(sft):
  windows = {"model__window": 8, "model__pattern": "sf"}
  with pytest.raises(InputError, match=r"data\.share_prompts=True: is not supported with sliding-window attention"):
    make_model(smoke.config("dpo", data__share_prompts=True, **windows), sft.tokenizer)


def test_vocabulary_is_the_tokenizers_or_larger(sft):
  size = sft.tokenizer.vocab_size
  assert make_model(smoke.config("sft"), sft.tokenizer).config.vocab == size
  assert make_model(smoke.config("sft", model__vocab=size + 8), sft.tokenizer).config.vocab == size + 8
  with pytest.raises(InputError, match=r"model\.vocab=\d+, but"):
    make_model(smoke.config("sft", model__vocab=size - 1), sft.tokenizer)


@pytest.mark.parametrize(
  ("prompts", "message"),
  [
    ("What is 12 + 5?", r"prompts is a str; it must be a list of texts"),
    (b"What is 12 + 5?", r"prompts is a bytes"),
    (5, r"prompts is a int"),
    ({"role": "user", "content": "Why?"}, r"prompts is a dict"),
    ([{"role": "user", "content": "Why?"}], r"prompts\[0\] is a message"),
    (["Why?", None], r"prompts\[1\]"),
    (["Why?", 5], r"prompts\[1\]"),
    (["Why?", []], r"prompts\[1\] has no messages"),
    ([[{"role": "user"}]], r"prompts\[0\]\[0\]\.content"),
    ([[{"role": "robot", "content": "a"}]], r"prompts\[0\]\[0\]\.role"),
    ([["Why?"]], r"prompts\[0\]\[0\]"),
  ],
)
def test_prompts_that_are_no_list_of_prompts_are_refused(sft, prompts, message):
  """A text alone was once taken for as many prompts as it has characters."""
  with pytest.raises(InputError, match=message):
    sample(sft, prompts, max_new_tokens=2)
