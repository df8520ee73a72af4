"""Who answers: the interface of a judge, and how it is asked."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from alignjax.feedback.judge.rubric import Question
from alignjax.feedback.judge.verdict import Answer
from alignjax.system import ranges
from alignjax.system.ranges import Count, NonNegative, Positive, Seed, Several, Whole


class Settings(NamedTuple):
  """How judges are asked; each kind of judge reads what it has a use for.

  Attributes:
    seed: of the sampler; an endpoint adds the number of the sample.
    temperature: of the sampler.
    max_tokens: of an answer with reasons.
    batch_size: answers of a run that are scored together.
    concurrency: calls of an endpoint at one time.
    per_minute: calls of an endpoint in a minute; 0: no limit.
    retries: repeats of a call that fails.
    timeout: seconds that a call may take.
    logprobs: True asks an endpoint for log-probabilities, which not every one gives.
  """

  seed: Seed = 0
  temperature: NonNegative = 0.0
  max_tokens: Several = 512
  batch_size: Count = 32
  concurrency: Count = 8
  per_minute: Whole = 0
  retries: Whole = 5
  timeout: Positive = 60.0
  logprobs: bool = True

  def check(self) -> None:
    """Raises InputError if a value is out of range."""
    ranges.check_record("", self)


DEFAULT = Settings()


class Judge(Protocol):
  """A model or a rule that answers questions.

  Attributes:
    name: in records.
    identity: JSON: everything that the answers depend on except the questions.
  """

  @property
  def name(self) -> str: ...
  @property
  def identity(self) -> dict[str, Any]: ...

  def ask(self, questions: Sequence[Question]) -> list[Answer]:
    """Answers each question; an answer depends on its question alone, not on the others.

    Raises:
      InputError: no question can be answered, as by an endpoint that refuses the key.
    """
