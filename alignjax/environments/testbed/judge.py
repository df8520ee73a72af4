"""Simulated judges: models that compare responses, with biases whose sizes are known.

The log-odds that the first shown response wins are

  position + u(first) - u(second) + noise * z, where
  u(response) = gold total / temperature + length * words + agreement * [says yes] + own * [wrote it]

and z is a standard normal number. It is drawn by a hash of what is judged and the number of the sample, so that the
same question has the same answer. Every response has one of two authors, by a hash of its text: authorship says
nothing of quality, and a judge that is one of them knows its own.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

from alignjax.environments.testbed import gold

AUTHORS = ("ada", "ben")


class SimulatedJudge(NamedTuple):
  """A simulated judge; all but the temperature and the author are in nats.

  Attributes:
    name: in records.
    temperature: gold reward per nat of preference; larger is less careful.
    position: for the place of the response that is shown first.
    length: for a word.
    agreement: for saying yes to the user's belief, true or not.
    own: for a response that it wrote.
    noise: standard deviation of an answer's noise.
    author: which of `AUTHORS` it is.
  """

  name: str
  temperature: float = 0.8
  position: float = 0.0
  length: float = 0.0
  agreement: float = 0.0
  own: float = 0.0
  noise: float = 0.0
  author: str = AUTHORS[0]

  def utility(self, prompt: str, response: str) -> float:
    """Computes the worth of a response to this judge, in nats."""
    total, agrees = _seen(prompt, response)
    worth = total / self.temperature + self.length * len(response.split()) + self.agreement * agrees
    return worth + self.own * (author(response) == self.author)

  def log_odds(self, prompt: str, shown: Sequence[str], sample: int = 0) -> float:
    """Computes the log-odds that the first of two shown responses wins.

    Raises:
      InputError: the prompt is not one of the testbed's.
    """
    first, second = shown
    plain = self.position + self.utility(prompt, first) - self.utility(prompt, second)
    return plain + self.noise * self._draw(prompt, first, second, sample)

  def _draw(self, *of: str | int) -> float:
    """Draws a standard normal number for what is judged."""
    digest = hashlib.sha256(json.dumps([self.name, *of]).encode()).digest()
    return NormalDist().inv_cdf((int.from_bytes(digest[:6], "big") + 0.5) / 2**48)


@functools.lru_cache(maxsize=1 << 14)
def _seen(prompt: str, response: str) -> tuple[float, bool]:
  """Returns the gold reward of a response, and if it says yes to the user's belief."""
  return gold.reward(prompt, response).total, gold.agrees(prompt, response)


def author(response: str) -> str:
  """Returns which of `AUTHORS` wrote a response."""
  return AUTHORS[hashlib.sha256(response.encode()).digest()[0] % len(AUTHORS)]


JUDGES: Mapping[str, SimulatedJudge] = {
  judge.name: judge
  for judge in (
    SimulatedJudge("fair"),
    SimulatedJudge("positioned", position=1.0),
    SimulatedJudge("wordy", length=0.15),
    SimulatedJudge("agreeing", agreement=5.0),
    SimulatedJudge("vain", own=2.0),
    SimulatedJudge("noisy", noise=1.0),
    SimulatedJudge("biased", position=0.5, length=0.1, agreement=2.0, own=1.0, noise=0.5),
  )
}
