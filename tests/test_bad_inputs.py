"""Bad inputs by the hundred: each costs one line that names the place, a status that is not 0, and nothing written."""

import random

import pytest

from tests.bad_inputs import calls, config, flags, records, runs
from tests.bad_inputs.harness import answer

SEED = 0
FAST = 400  # cases of the fast suite: some of every kind


def kinds(seed, count):
  """The cases that a seed draws, a list for each kind; `count` of the kinds that have thousands."""
  found = (
    config.values(seed, count),
    config.mappings(seed, count // 2),
    config.shapes(),
    config.overrides(),
    config.files(),
    records.broken(seed, count),
    records.lines(seed),
    records.files(),
    flags.values(seed, count),
    flags.missing(),
    flags.paths(seed, count),
    flags.contradictions(),
    runs.configs(),
    runs.checkpoints(),
    runs.tokenizers(),
    runs.models(),
    calls.calls(),
  )
  return [list(kind) for kind in found]


def some(seed, count):
  """About `count` cases, as many of one kind as of another where there are."""
  draw = random.Random(seed)
  each = kinds(seed, count)
  least = count // len(each)
  taken = [draw.sample(kind, min(least, len(kind))) for kind in each]
  rest = [case for kind, own in zip(each, taken, strict=True) for case in kind if case not in own]
  cases = [case for own in taken for case in own]
  return cases + draw.sample(rest, max(0, min(len(rest), count - len(cases))))


def refused(case, folder, capsys):
  if found := answer(case, folder, capsys):
    pytest.fail(f"{case.name}: {found}", pytrace=False)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
  """Indices of data stay in a folder of the tests."""
  monkeypatch.setenv("ALIGNJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("case", some(SEED, FAST), ids=lambda case: case.name)
def test_bad_input_is_refused_in_one_line(case, tmp_path, capsys):
  refused(case, tmp_path, capsys)


@pytest.mark.long
@pytest.mark.parametrize("case", [case for kind in kinds(SEED + 1, 120) for case in kind], ids=lambda case: case.name)
def test_a_thousand_others(case, tmp_path, capsys):
  refused(case, tmp_path, capsys)
