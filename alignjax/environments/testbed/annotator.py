"""Simulated annotators: Bradley-Terry choices on the gold reward, with the errors and biases of people.

P(a preferred) = flip + (1 - 2 flip) sigmoid(u(a) - u(b)), where
u(response) = gold total / temperature + length_bias * words + sycophancy_bias * [says yes].

A population is a tuple of annotators; each pair goes to one of them, drawn by share. Because all of this is
known, so are the best possible predictor of the labels (`preference_probability`) and its
accuracy (`bayes_accuracy`).
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from alignjax.environments.testbed import gold
from alignjax.errors import InputError


class Annotator(NamedTuple):
  """A simulated person who compares responses.

  Attributes:
    id: named in each record.
    share: share of the pairs, relative to the others of the population.
    temperature: gold reward per nat of preference; larger is less careful.
    flip: probability that the choice is flipped; 0.5 is a spammer, who chooses at random.
    length_bias: nats per word.
    sycophancy_bias: nats for saying yes to the user's belief, true or not.
  """

  id: str
  share: float = 1.0
  temperature: float = 0.8
  flip: float = 0.0
  length_bias: float = 0.0
  sycophancy_bias: float = 0.0


Population = tuple[Annotator, ...]


def noisier(population: Population, flip: float) -> Population:
  """Returns the same annotators, with choices that are flipped once more with probability `flip`."""
  return tuple(a._replace(flip=a.flip + flip - 2 * a.flip * flip) for a in population)


def spammed(population: Population, share: float) -> Population:
  """Returns the same annotators, and two spammers who get `share` of all pairs."""
  total = sum(a.share for a in population)
  spam = total * share / (1 - share)
  return (*population, *(Annotator(f"spam{i}", share=spam / 2, flip=0.5) for i in (1, 2)))


_CAREFUL = tuple(Annotator(f"a{i:02d}") for i in range(1, 8))
_DEFAULT = (
  *_CAREFUL,
  Annotator("a08", temperature=1.6, flip=0.05),  # in a hurry
  Annotator("a09", length_bias=0.05),  # mistakes length for effort
  Annotator("a10", sycophancy_bias=5.0),  # prefers agreement
  Annotator("a11", flip=0.5),  # a spammer
)
POPULATIONS: Mapping[str, Population] = {
  "default": _DEFAULT,
  "careful": _CAREFUL,
  "noisy": noisier(_DEFAULT, 0.2),  # one label in five flipped
  "length_biased": tuple(a._replace(length_bias=0.15) for a in _CAREFUL),
  "sycophantic": tuple(a._replace(sycophancy_bias=10.0) for a in _CAREFUL),
  "spammed": spammed(_DEFAULT, 0.3),
}


def find(population: str | Population) -> Population:
  """Returns a population by name, or the given annotators as a population.

  Raises:
    InputError: no population has this name.
  """
  if not isinstance(population, str):
    return tuple(population)
  if population not in POPULATIONS:
    raise InputError(f"population {population!r} is unknown; choose from {', '.join(POPULATIONS)}")
  return POPULATIONS[population]


class _Seen(NamedTuple):
  """The features of a response that an annotator's utility depends on."""

  gold: float
  words: int
  agrees: bool


def _see(prompt: str, response: str) -> _Seen:
  total = gold.reward(prompt, response).total
  return _Seen(total, len(response.split()), gold.agrees(prompt, response))


def utility(annotator: Annotator, prompt: str, response: str) -> float:
  """Computes the utility of a response to an annotator, in nats of preference."""
  return _utility(annotator, _see(prompt, response))


def _utility(annotator: Annotator, seen: _Seen) -> float:
  biases = annotator.length_bias * seen.words + annotator.sycophancy_bias * seen.agrees
  return seen.gold / annotator.temperature + biases


def _probability(annotator: Annotator, a: _Seen, b: _Seen) -> float:
  """P(a preferred) by one annotator."""
  logit = _utility(annotator, a) - _utility(annotator, b)
  sigmoid = 0.5 + 0.5 * math.tanh(logit / 2)  # without overflow at any size
  return annotator.flip + (1 - 2 * annotator.flip) * sigmoid


def preference_probability(population: str | Population, prompt: str, response_a: str, response_b: str) -> float:
  """P(a is preferred to b) over the annotators of the population: the Bayes predictor."""
  a = _see(prompt, response_a)
  b = _see(prompt, response_b)
  annotators = find(population)
  weighted = sum(who.share * _probability(who, a, b) for who in annotators)
  return weighted / sum(who.share for who in annotators)


def bayes_accuracy(records: Iterable[Mapping], population: str | Population = "default") -> float:
  """Computes the expected accuracy of the best possible predictor of the labels, exactly for these texts.

  No reward model can do better in expectation. The records' own labels have no influence.

  Raises:
    InputError: there are no records, or the population is unknown.
  """
  best = []
  for record in records:
    probability = preference_probability(population, record["prompt"], record["chosen"], record["rejected"])
    best.append(max(probability, 1 - probability))
  if not best:
    raise InputError("bayes_accuracy needs at least one preference record, got none")
  return float(np.mean(best))


class Choice(NamedTuple):
  """An annotator's answer to one pair."""

  annotator: str
  chosen: str
  rejected: str


def choose(rng: np.random.Generator, population: Population, prompt: str, response_a: str, response_b: str) -> Choice:
  """Gives a pair to an annotator drawn by share, and returns the choice."""
  shares = np.array([who.share for who in population])
  who = population[rng.choice(len(population), p=shares / shares.sum())]
  p = _probability(who, _see(prompt, response_a), _see(prompt, response_b))
  if rng.random() < p:
    return Choice(who.id, chosen=response_a, rejected=response_b)
  return Choice(who.id, chosen=response_b, rejected=response_a)
