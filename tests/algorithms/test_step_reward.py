"""Process rewards: where the steps of a completion end, what their scores come to, and runs that are paid by them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import ALGORITHMS, ppo, rollout, step_reward
from alignjax.algorithms.algorithm import Special
from alignjax.algorithms.online_rows import Outcome, Rollout
from alignjax.commands import best_of
from alignjax.data.tokenizer import load_tokenizer
from alignjax.data.transform import step_ends
from alignjax.errors import InputError
from alignjax.evaluation.held_out import evaluate
from alignjax.model import critic, decoder
from alignjax.runs.run import load
from alignjax.runs.scorer import make_scorer, settings
from alignjax.train import fit
from alignjax.types import Batch, Trees
from tests import made, smoke

STOP, NL, DOT_NL, A, B = 2, 10, 11, 20, 21
ENDS = ((NL,), (DOT_NL,), (A, B))
# name -> completion, and the places in it where a step ends
ROWS = {
  "several steps": ([5, 6, NL, 7, DOT_NL, 8, STOP], [2, 4, 5]),
  "the last step has its separator": ([5, NL, 6, 7, NL, STOP], [1, 4]),
  "no separator": ([5, 6, 7, STOP], [2]),
  "unfinished": ([5, NL, 6, 7], [1, 3]),
  "unfinished behind a separator": ([5, 6, 7, NL], [3]),
  "separators in a row, and in front": ([NL, NL, 5, NL, NL, 6, STOP], [3, 5]),
  "a separator of two ids": ([5, A, B, A, 6, STOP], [2, 4]),
  "the stop alone": ([STOP], [0]),
  "separators alone": ([NL, NL, STOP], [2]),
  "absent": ([], []),
}
WIDTH, PROMPT = 12, [9, NL, 9, A]  # the prompt's separators end nothing


def batch():
  tokens, mask = np.zeros((2, len(ROWS), WIDTH), np.int32)
  for row, (ids, _) in enumerate(ROWS.values()):
    tokens[row, : len(PROMPT) + len(ids)] = PROMPT + ids
    mask[row, len(PROMPT) : len(PROMPT) + len(ids)] = 1
  return jnp.array(tokens), jnp.array(mask, jnp.float32)


def test_a_step_ends_at_its_separator_and_the_last_with_the_text():
  found = np.asarray(step_reward.ends(*batch(), STOP, ENDS))
  for row, (name, (_, places)) in zip(found, ROWS.items(), strict=True):
    assert [column - len(PROMPT) for column in np.flatnonzero(row)] == places, name


@pytest.mark.parametrize("kind", step_reward.KINDS[1:])
def test_steps_come_to_what_numpy_says(kind):
  logits = np.random.default_rng(0).normal(0, 2, (len(ROWS), WIDTH)).astype(np.float32)
  found = step_reward.together(jnp.array(logits), step_reward.ends(*batch(), STOP, ENDS), kind)
  number = dict(min=np.min, product=np.prod, mean=np.mean, last=lambda p: p[-1], each=np.sum)[kind]
  for value, row, (_, places) in zip(found, logits, ROWS.values(), strict=True):
    right = [1 / (1 + np.exp(-row[len(PROMPT) + place])) for place in places]
    assert value == pytest.approx(number(right) if right else 0.0, rel=1e-5)


def test_ids_that_end_a_step_are_those_whose_text_does():
  tokenizer = load_tokenizer(smoke.DATA / "tokenizer.model")
  assert step_ends(tokenizer, "\n") == ((tokenizer.encode("\n")[0],), (tokenizer.processor.piece_to_id("<0x0A>"),))
  found = [ids[0] for ids in step_ends(tokenizer, "e")]
  assert len(found) > 5
  assert all(tokenizer.decode([i]).endswith("e") == (i in found) for i in range(tokenizer.vocab_size))
  assert tuple(tokenizer.encode("\n\n")) in step_ends(tokenizer, "\n\n")  # of two ids


def test_ppo_pays_each_step_at_its_end_and_the_rest_at_the_last_token(config, monkeypatch):
  model = critic.attach(decoder.make(config), "own")
  params = jax.jit(model.init)(jax.random.key(0))
  options = {"rewards": "regex", "reward_settings": {"pattern": "a"}, "kl_in": "loss"}
  hparams = made.hparams(ALGORITHMS["ppo"], **options) | {"lam": 1.0}
  mask = jnp.zeros((2, 8)).at[:, 3:7].set(1)
  steps = jnp.zeros((2, 8)).at[:, 4].set(0.25).at[0, 6].set(0.5)
  judged = Outcome(*jnp.ones((7, 2)), step_scores=steps).replace(scores=jnp.array([1.0, 0.25]))
  monkeypatch.setattr(rollout, "score", lambda *args: judged)
  texts = {
    "tokens": jnp.ones((2, 8), jnp.int32),
    "segment_ids": jnp.ones((2, 8), jnp.int32),
    "positions": jnp.broadcast_to(jnp.arange(8), (2, 8)),
    "loss_mask": mask,
  }
  batch = Batch(Rollout(texts, jnp.zeros((2, 8)), *jnp.ones((2, 2))))
  trees = Trees({"reference": params}, params, {k: jnp.float32(v) for k, v in hparams.items()})
  running = {name: jnp.float32(value) for name, value in ppo.RUNNING.items()}
  algorithm = made.make(ppo.RECIPE, model, **options, max_new_tokens=4)
  found = jax.jit(algorithm.prepare)(trees, batch.updated(running=running), jax.random.key(0)).rows
  # Undiscounted: what is yet to be paid. The first row's last token gets its step and the 0.25 that no step has.
  np.testing.assert_allclose(found.returns[:, 3:7], [[1, 1, 0.75, 0.75], [0.25, 0.25, 0, 0]], atol=1e-5)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process(tmp_path_factory):
  """The run of a process reward model whose steps end with an "e", which random words have often."""
  folder = tmp_path_factory.mktemp("process")
  workdir, data = folder / "run", folder / "stepwise.jsonl"
  records = [json.loads(line) for line in (smoke.DATA / "stepwise.jsonl").read_text().splitlines()]
  for record in records:  # a step that holds the separator would be cut there in use
    record["completions"] = [step.replace("e", "a") for step in record["completions"]]
  data.write_text("".join(json.dumps(record) + "\n" for record in records))
  own = dict(data__train=str(data), data__step_separator="e", data__holdout=0.0)
  config = smoke.config("process_reward", run__steps=2, **own)
  fit(config, workdir)
  return workdir


def paid(name, source, kind, **overrides):
  settings = {"rewards": "reward_model", "reward_settings": {}, "reward_model": str(source), "step_reward": kind}
  settings = {f"algorithm__{key}": value for key, value in settings.items()}
  return smoke.config(name, run__steps=2, **settings, **overrides)


@pytest.mark.parametrize("kind", ["each", pytest.param("product", marks=pytest.mark.long)])
@pytest.mark.long
def test_ppo_learns_from_a_process_reward_model_that_may_be_gone_once_it_has_begun(kind, process, tmp_path):
  source = smoke.copy(process, tmp_path / "process")
  run = fit(paid("ppo", source, kind), tmp_path / "run")
  assert run.metrics["completions/steps"] > 1
  assert 0 < run.metrics["rewards/reward_model"] < run.metrics["completions/steps"]
  assert run.metrics["grad_norm"] > 0
  shutil.rmtree(source)
  again = evaluate(tmp_path / "run")
  for key in ("rewards/reward_model", "completions/steps"):
    assert again[key] == pytest.approx(run.metrics[f"eval/{key}"], abs=1e-6)


@pytest.mark.long
def test_microbatches_do_not_change_what_steps_are_paid(process, tmp_path):
  with smoke.devices(1):
    whole = fit(paid("ppo", process, "each"), tmp_path / "whole")
    parts = fit(paid("ppo", process, "each", optimizer__microbatches=2), tmp_path / "parts")
  for key in ("loss", "grad_norm", "objective/scores"):
    assert parts.metrics[key] == pytest.approx(whole.metrics[key], abs=1e-5)


@pytest.mark.parametrize("name", ["grpo", "online_dpo", "nash_md"])
def test_what_compares_completions_takes_one_number_of_them(name, process, tmp_path):
  with pytest.raises(InputError, match=r"step_reward=each: .*use one of min, product, mean, last"):
    fit(paid(name, process, "each"), tmp_path / "refused")


SLOW = [pytest.param(name, marks=pytest.mark.long) for name in ("grpo", "nash_md")]


@pytest.mark.parametrize("name", ["online_dpo", *SLOW])
@pytest.mark.long
def test_completions_are_compared_by_their_least_step(name, process, tmp_path):
  assert fit(paid(name, process, "min"), tmp_path / "run").metrics["completions/steps"] > 1


def test_a_reward_model_of_another_kind_than_asked_for_is_refused(process, tmp_path):
  with pytest.raises(InputError, match=r"scores no steps; name a run of algorithm\.name=process_reward"):
    fit(paid("ppo", smoke.finished("reward")[0], "min"), tmp_path / "run")
  with pytest.raises(InputError, match=r"is a process reward model; set algorithm\.step_reward"):
    fit(paid("ppo", process, ""), tmp_path / "run")
  with pytest.raises(InputError, match=r"normalise_rewards: is of one score a completion"):
    fit(paid("ppo", process, "each", algorithm__normalise_rewards=True), tmp_path / "run")
  with pytest.raises(InputError, match="use one of , min, product"):
    rollout.check(rollout.SamplingOptions(rewards="gsm8k", step_reward="max"))


@pytest.mark.long
def test_completions_outside_of_a_run_are_scored_by_the_same_steps(process):
  run, request = load(smoke.finished("sft")[0]), best_of.Request(n=3, max_new_tokens=8)
  drawn = best_of.draw(run, best_of.open_source(smoke.DATA / "preference.jsonl"), [0, 1], request)
  scorer = lambda kind: make_scorer(settings(str(process), step_reward=kind), run.tokenizer, run.mesh)
  found = {kind: scorer(kind).score(drawn).scores for kind in ("min", "product", "last")}
  judge = load(process)
  special = Special(run.tokenizer.stop_id, run.tokenizer.pad_id, step_ends(run.tokenizer, "e"))
  for index, one in enumerate(drawn):
    ids = np.array([[*one.prompt_ids, *one.completion.tokens]])
    mask = np.arange(ids.shape[1])[None] >= len(one.prompt_ids)
    text = {"tokens": ids, "segment_ids": np.ones_like(ids), "positions": np.arange(ids.shape[1])[None]}
    with jax.set_mesh(judge.mesh):
      tiled = {name: jnp.repeat(jnp.array(x), 8, axis=0) for name, x in text.items()}
      logits = np.asarray(step_reward.scores(judge.model, judge.params, tiled))[0]
    places = np.flatnonzero(step_reward.ends(jnp.array(ids), jnp.array(mask), special.stop_id, special.step_ends))
    right = 1 / (1 + np.exp(-logits[places]))
    expected = {"min": right.min(), "product": right.prod(), "last": right[-1]}
    for kind, value in expected.items():
      assert found[kind][index] == pytest.approx(value, abs=1e-5)
  with pytest.raises(InputError, match="is a process reward model"):
    scorer("")
  with pytest.raises(InputError, match="a choice among completions needs one number"):
    scorer("each")
