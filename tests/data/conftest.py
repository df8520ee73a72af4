"""A small world on disk: pairs of several lengths and a tokenizer trained on them, with a cache of its own."""

import json
import os

import numpy as np
import pytest

from alignjax.data import read_texts, train_tokenizer

WORDS = [
  "red",
  "green",
  "blue",
  "cat",
  "dog",
  "house",
  "runs",
  "sings",
  "under",
  "over",
  "the",
  "a",
  "quick",
  "river",
  "two",
]


def sentence(rng, words):
  return " ".join(rng.choice(WORDS, words))


def write(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return str(path)


def make_pairs(n, seed=0):
  rng = np.random.default_rng(seed)
  return [
    {
      "prompt": f"{k}: {sentence(rng, rng.integers(2, 8))}",
      "chosen": sentence(rng, rng.integers(1, 12)),
      "rejected": sentence(rng, rng.integers(1, 12)) + " no",
      "margin": k / 10,
      "weight": 1 + k % 3,
    }
    for k in range(n)
  ]


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cache")
  before = os.environ.get("ALIGNJAX_CACHE")
  os.environ["ALIGNJAX_CACHE"] = str(folder)
  yield folder
  if before is None:
    del os.environ["ALIGNJAX_CACHE"]
  else:
    os.environ["ALIGNJAX_CACHE"] = before


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
  """The path of 61 pairs."""
  return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", make_pairs(61))


@pytest.fixture(scope="session")
def tokenizer(pairs, tmp_path_factory):
  return train_tokenizer(read_texts(pairs), tmp_path_factory.mktemp("tokenizer") / "tiny.model", 360)


@pytest.fixture(scope="session")
def real_data():
  folder = os.environ.get("ALIGNJAX_DATA")
  if not folder:
    pytest.skip("ALIGNJAX_DATA names no folder of real data")
  return folder
