"""The interface of a reward, and the scores of a batch.

A reward is `(prompts, completions, token_ids, columns) -> [float or None, ...]`, with an entry for each completion of a
batch: a function, a coroutine function or an object with such a `__call__`. None means that it does not apply. An entry
may also be an exception, as `asyncio.gather(..., return_exceptions=True)` returns them: that completion failed.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from alignjax.errors import InputError

Prompt = str | Sequence[Mapping[str, Any]]  # text, or messages
Columns = Mapping[str, list]
Entry = float | None | Exception
KINDS = ("raised", "timed out", "wrong length", "not a number", "not finite", "too large")
LARGEST = 1e15  # absolute value of a reward: sums of squares of such numbers are still finite in float32


class Reward(Protocol):
  """Scores a batch of N completions.

  It may have an attribute `needs`, the columns that it requires, and `facts`, numbers by name about the machine or
  itself, which a run logs once as data/NAME/FACT.
  """

  def __call__(
    self, prompts: list[Prompt], completions: list[str], token_ids: list[list[int]], columns: Columns
  ) -> Sequence[Entry] | Awaitable[Sequence[Entry]]:
    """Returns one entry for each completion.

    Args:
      prompts: texts or lists of messages.
      completions: texts, without the prompt and without special tokens.
      token_ids: the sampled tokens of each, with the stop token.
      columns: the other fields of the prompts' records, such as "answer", by name: one entry for each completion, None
        if the record lacks the field.
    """


Declared = TypeVar("Declared", bound=Callable[..., Any])


def declaring(reward: Declared, needs: Collection[str] = (), facts: Mapping[str, float] | None = None) -> Declared:
  """Returns a function that is a reward, with the attributes `needs` and `facts` of `Reward`, which it sets on it."""
  vars(reward).update(needs=needs, facts=facts or {})
  return reward


class Failure(NamedTuple):
  """A completion that a reward could not score.

  Attributes:
    reward: its name.
    index: of the completion in the batch, from 0.
    prompt: the user's last message in it.
    kind: one of KINDS.
    cause: a description.
  """

  reward: str
  index: Any  # int; a tuple has a method of this name
  prompt: str
  kind: str
  cause: str


@dataclass(frozen=True)
class Scores:
  """The values of R rewards for N completions.

  Attributes:
    names: of the rewards, in order.
    values: float64 [N, R]; NaN where a reward does not apply, or failed.
    failures: by reward, then by completion.
    retried: by reward, the error for the whole batch after which it was called for one completion at a time.
    seconds: the time that each reward took.
  """

  names: tuple[str, ...]
  values: np.ndarray
  failures: tuple[Failure, ...] = ()
  retried: Mapping[str, str] = field(default_factory=dict)
  seconds: Mapping[str, float] = field(default_factory=dict)

  @property
  def failed(self) -> np.ndarray:
    """Where a reward failed, bool [N, R]."""
    failed = np.zeros(self.values.shape, bool)
    for failure in self.failures:
      failed[failure.index, self.names.index(failure.reward)] = True
    return failed

  def total(self, weights: Mapping[str, float]) -> np.ndarray:
    """Sums each completion's rewards by weights, to float64 [N]; a reward of weight 0 is left out.

    A reward that does not apply adds nothing. The sum is NaN if none applies, or if one has failed: it is then unknown.

    Args:
      weights: by name; every reward must have one.
    """
    used = [i for i, name in enumerate(self.names) if weights[name]]
    values = self.values[:, used] * [weights[self.names[i]] for i in used]
    unknown = np.isnan(values).all(axis=1) | self.failed[:, used].any(axis=1)
    return np.where(unknown, np.nan, np.nansum(values, axis=1))

  def metrics(self) -> dict[str, float]:
    """Returns mean, standard deviation, and the shares that have no reward and that failed, by "rewards/NAME/...".

    Mean and deviation are over the completions that have a reward, NaN without any.
    """
    metrics: dict[str, float] = {}
    for name, values, failed in zip(self.names, self.values.T, self.failed.T, strict=True):
      known = values[~np.isnan(values)]
      mean = float("nan")
      std = float("nan")
      if len(known):
        mean = float(known.mean())
        std = float(known.std())
      metrics |= {
        f"rewards/{name}/mean": mean,
        f"rewards/{name}/std": std,
        f"rewards/{name}/none": 1 - len(known) / max(1, len(values)),
        f"rewards/{name}/failed": float(failed.sum() / max(1, len(failed))),
      }
    return metrics


def question(prompt: Prompt) -> str:
  """Returns the user's last message in a prompt, of text or messages; "" if a list has none."""
  if isinstance(prompt, str):
    return prompt
  return next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")


def column(columns: Columns, name: str) -> list:
  """Returns the entries of a column.

  Raises:
    LookupError: there is no column of this name.
  """
  if name not in columns:
    raise LookupError(f"no column {name!r}; the records have {', '.join(sorted(columns)) or 'no other fields'}")
  return columns[name]


def told(error: BaseException) -> str:
  """Returns an exception as one line of at most 400 characters: its class and its text."""
  try:
    text = str(error)
  except BaseException as raised:  # by the exception's own __str__
    text = f"its text raises {type(raised).__name__}"
  return ": ".join(filter(None, (type(error).__name__, " ".join(text.split()))))[:400]


def require(rewards: Mapping[str, Reward], columns: Collection[str]) -> None:
  """Raises InputError unless the records have the columns that the rewards need; for before a run.

  Args:
    rewards: by name; one without the attribute `needs` needs nothing.
    columns: names of the fields of the prompts' records.
  """
  for name, reward in rewards.items():
    missing = [need for need in getattr(reward, "needs", ()) if need not in columns]
    if missing:
      raise InputError(
        f"reward {name} needs the field '{missing[0]}' in the prompts' records; they have "
        f"{', '.join(sorted(columns)) or 'none besides the prompt'}"
      )
