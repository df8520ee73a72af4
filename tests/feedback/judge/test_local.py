"""A run as a judge: its log-probabilities are those of the model, whatever is asked beside."""

import jax
import numpy as np
import pytest

from alignjax.errors import InputError
from alignjax.feedback.judge import rubric
from alignjax.feedback.judge.judge import Settings
from alignjax.feedback.judge.local import LocalJudge
from alignjax.feedback.judge.rubric import Question
from alignjax.losses.logps import next_token_logps
from alignjax.runs.run import load
from tests import smoke

SHORT = rubric.parse("name: s\nversion: 1\nform: pairwise\ntemplate: \"{{ completions | join('|') }}\"\n", "s.yaml")
REASONED = rubric.parse(
  "name: r\nversion: 1\nform: pairwise\nreasoning: true\ntemplate: \"{{ completions | join('|') }}\"\n", "r.yaml"
)
USER = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def run():
  return load(smoke.finished("sft")[0])


def asked(of, *pairs):
  return [Question(of, USER, pair) for pair in pairs]


def test_a_labels_log_probability_is_that_of_the_answer(run):
  judge = LocalJudge(run, "run", Settings(batch_size=8))
  questions = asked(SHORT, ("a", "b"), ("b", "a"), ("a", "b"))
  answers = judge.ask(questions)
  assert answers[0] == answers[2]
  assert answers[0] != answers[1]
  prompt = run.tokenizer.render(SHORT.messages(questions[1]), add_generation_prompt=True)
  for label, logp in answers[1].logps.items():
    said = [*run.tokenizer.encode(label), run.tokenizer.stop_id]
    tokens = np.array([[*prompt, *said]])
    with jax.set_mesh(run.mesh):
      hidden, _ = run.model.forward(run.params, np.repeat(tokens, 8, 0), np.ones((8, tokens.size), int), np.repeat(
        np.arange(tokens.size)[None], 8, 0))  # fmt: skip
      logps = next_token_logps(hidden, run.model.unembedding(run.params), np.repeat(tokens, 8, 0))
    assert logp == pytest.approx(float(logps[0, len(prompt) :].sum()), abs=1e-3)


def test_an_answer_depends_on_its_question_alone(run):
  judge = LocalJudge(run, "run", Settings(max_tokens=4, temperature=1.0, batch_size=8))
  for of in (SHORT, REASONED):
    many = judge.ask(asked(of, ("a", "b"), ("a longer one", "b"), ("c", "d")))
    (one,) = judge.ask(asked(of, ("c", "d")))
    assert one.text == many[2].text
    assert one.logps == pytest.approx(many[2].logps, abs=1e-3)
  assert one.text.split("\n")[-1].startswith("Verdict: ")


def test_a_reward_model_is_no_judge():
  with pytest.raises(InputError, match="a reward model scores and does not write"):
    LocalJudge(load(smoke.finished("reward")[0]), "reward")
