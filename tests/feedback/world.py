"""Pairs of the testbed that judges are asked about."""

import functools
import tempfile

from alignjax.data.source import open_source
from alignjax.environments import testbed
from alignjax.feedback.judge import rubric
from alignjax.feedback.judge.pairwise import read_items

RUBRIC = rubric.load("helpful-harmless-honest")


@functools.cache
def items(count):
  """Held-out pairs of the testbed, with the features that a judge may be moved by."""
  with tempfile.TemporaryDirectory() as folder:
    nothing = dict(sft=1, preference=1, evaluation=1, prompts=1)
    path = testbed.write(folder, seed=3, judged=count, **nothing)["judged"]
    return read_items(open_source(path, f"{folder}/cache"), RUBRIC)
