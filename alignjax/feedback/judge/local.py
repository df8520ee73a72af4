"""A run, or a folder of Hugging Face weights, as a judge: read by the log-probabilities of the labels.

The log-probability of a label is that of its tokens and of the end of the turn: that the whole answer is this label.
So no label is a part of another ("1" of "10"). A rubric with reasons is answered in two steps: the reasons are sampled
up to their end or to "Verdict:", and the labels are scored behind that. Nothing has to be parsed.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from alignjax.errors import InputError
from alignjax.evaluation.kl import completion_logps
from alignjax.feedback.judge.judge import DEFAULT, Settings
from alignjax.feedback.judge.rubric import MARK, Question
from alignjax.feedback.judge.verdict import Answer
from alignjax.runs.run import Run, check_writes
from alignjax.sampling.generate import check_length, sample_text
from alignjax.system.fingerprint import digest, table


class LocalJudge:
  """A loaded run as a judge.

  Args:
    run: of a policy.
    name: in records.
    settings: max_tokens, temperature and seed are those of the reasons, if the rubric asks for some.

  Raises:
    InputError: the run is a reward model's.
  """

  def __init__(self, run: Run, name: str, settings: Settings = DEFAULT):
    check_writes(run)
    self.name = name
    self._run = run
    self._settings = settings

  @functools.cached_property
  def identity(self) -> dict[str, Any]:
    """What the answers depend on: the weights, the tokenizer and the options of reasons."""
    return {
      "params": digest(table({"params": self._run.params})),
      "tokenizer": self._run.tokenizer.fingerprint,
      "reasons": [self._settings.max_tokens, self._settings.temperature, self._settings.seed],
    }

  def ask(self, questions: Sequence[Question]) -> list[Answer]:
    """Answers each question; equal ones are asked once, unless the rubric asks for reasons, which are sampled.

    Raises:
      InputError: a question has too many tokens.
    """
    if not questions:
      return []
    keys = [self._key(question) for question in questions]
    distinct = dict(zip(keys, questions, strict=True))
    with jax.set_mesh(self._run.mesh):
      answers = dict(zip(distinct, self._answers(list(distinct.values()), list(distinct)), strict=True))
    return [answers[key] for key in keys]

  def _key(self, question: Question) -> str:
    sample = question.sample if question.rubric.reasoning else 0
    content = [question.rubric.messages(question), question.rubric.labels, sample]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

  def _answers(self, questions: list[Question], keys: list[str]) -> list[Answer]:
    """Answers different questions, whose keys are given."""
    tokenizer = self._run.tokenizer
    asked = [one.rubric.messages(one) for one in questions]
    prompts = [tokenizer.render(messages, add_generation_prompt=True) for messages in asked]
    for question, prompt in zip(questions, prompts, strict=True):
      name = f"judge {self.name}: the question about {question.prompt[-1]['content'][:60]!r}"
      room = self._settings.max_tokens * question.rubric.reasoning + max(map(len, question.rubric.labels)) + 8
      check_length(self._run.model, len(prompt) + room, min(self._settings.batch_size, len(questions)), 0, name)
    before = self._reasons(questions, prompts, keys)
    contexts = []
    labels = []
    for question, prompt, text in zip(questions, prompts, before, strict=True):
      for label in question.rubric.labels:
        context, ids = self._label_ids(prompt, text, label)
        contexts.append(context)
        labels.append([*ids, tokenizer.stop_id])
    scores = completion_logps(self._run.model, self._run.params, contexts, labels, batch_size=self._settings.batch_size)
    answers = []
    start = 0
    for question, text in zip(questions, before, strict=True):
      logps = {}
      for number, label in enumerate(question.rubric.labels, start):
        logps[label] = float(np.sum(scores[number], dtype=np.float64))
      start += len(question.rubric.labels)
      likeliest = max(logps, key=logps.__getitem__)
      answers.append(Answer(f"{text} {likeliest}".strip(), logps))
    return answers

  def _reasons(self, questions: list[Question], prompts: list[list[int]], keys: list[str]) -> list[str]:
    """Samples what stands before each verdict: the reasons and "Verdict:"; "" for rubrics without."""
    before = [""] * len(questions)
    places = [place for place, question in enumerate(questions) if question.rubric.reasoning]
    if not places:
      return before
    completions = sample_text(
      self._run.model,
      self._run.params,
      self._run.tokenizer,
      [prompts[place] for place in places],
      key=jax.random.key(self._settings.seed),
      prompt_ids=[int(keys[place][:7], 16) for place in places],  # of the content: not of the place in a file
      max_new_tokens=self._settings.max_tokens,
      temperature=self._settings.temperature,
      batch_size=self._settings.batch_size,
    )
    for place, completion in zip(places, completions, strict=True):
      reasons = completion.text.partition(MARK)[0].rstrip()
      before[place] = f"{reasons}\n{MARK}"
    return before

  def _label_ids(self, prompt: list[int], text: str, label: str) -> tuple[list[int], list[int]]:
    """Returns the ids before a label, and those of the label.

    Raises:
      InputError: the tokenizer joins the label with what is before.
    """
    encode = self._run.tokenizer.encode
    if not text:
      return prompt, encode(label)
    before = encode(text)
    both = encode(f"{text} {label}")
    if both[: len(before)] != before:
      raise InputError(f"judge {self.name}: its tokenizer joins {MARK!r} with the label {label!r}; use another label")
    return [*prompt, *before], both[len(before) :]
