"""Who answers: the interface of a judge."""

from collections.abc import Sequence
from typing import Any, Protocol

from alignjax.feedback.judge.rubric import Question
from alignjax.feedback.judge.verdict import Answer


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
