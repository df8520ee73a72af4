"""Annotators of the built-in world who take length for quality, as a population and as a reward that labels pairs."""

import hashlib

import numpy as np

from alignjax.environments.testbed import POPULATIONS, annotator
from alignjax.rewards.protocol import question

LENGTH_BIAS = 0.17  # nats a word; a filler sentence of six costs half a nat of gold, up to three of them, and wins 1.0
POPULATION = tuple(a._replace(length_bias=LENGTH_BIAS) for a in POPULATIONS["careful"])  # all of one mind


def label(prompts, completions, token_ids, columns):
  """Utilities with Gumbel noise: the larger of two is the one that an annotator would choose, as often.

  The noise belongs to the two texts, so that a pair has the same label whenever it is asked for.

  Source: Yellott 1977 (Bradley-Terry choices are those of the largest utility with Gumbel noise)
  """
  pairs = zip(map(question, prompts), completions, strict=True)
  return [annotator.utility(POPULATION[0], prompt, text) + noise(prompt, text) for prompt, text in pairs]


def noise(prompt: str, text: str) -> float:
  """A standard Gumbel number that belongs to two texts."""
  digest = hashlib.sha256(f"{prompt}\0{text}".encode()).digest()
  return np.random.default_rng(int.from_bytes(digest[:8])).gumbel()
