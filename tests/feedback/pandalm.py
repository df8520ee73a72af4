"""The pairs of PandaLM: two responses each, and the verdicts of three people."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from alignjax.feedback.comparison import Comparison

VERDICTS = {0: "tie", 1: "first", 2: "second"}


@functools.cache
def rows() -> list[dict]:
  """The 600 rows; six of their responses are JSON's true or false, in place of these words."""
  folder = os.environ.get("ALIGNJAX_DATA")
  if not folder:
    pytest.skip("ALIGNJAX_DATA names no folder of real data")
  return json.loads((Path(folder) / "pandalm" / "testset-v1.json").read_text())


def labels() -> np.ndarray:
  """What the three people said, int [600, 3]: 0 a tie, 1 the first response, 2 the second."""
  return np.array([[row[f"annotator{k}"] for k in (1, 2, 3)] for row in rows()])


def comparisons() -> list[Comparison]:
  """The 1,800 verdicts as comparisons."""
  found = []
  for row in rows():
    prompt = "\n\n".join(filter(None, (row["instruction"], row["input"])))
    completions = tuple(str(row[name]) for name in ("response1", "response2"))
    for k in (1, 2, 3):
      verdict = VERDICTS[row[f"annotator{k}"]]
      one = Comparison(
        prompt=[{"role": "user", "content": prompt}],
        completions=completions,
        verdict=verdict,
        annotator=str(k),
        id=str(row["idx"]),
      )
      found.append(one)
  return found
