"""Bad inputs by the hundred: each costs one line that names the place, a status that is not 0, and nothing written."""

import pytest

from tests.bad_inputs import calls, config, flags, records, runs
from tests.bad_inputs.harness import answer

SEED = 0


def cases(seed, count):
  """What a seed draws; `count` decides how many of the kinds that have thousands."""
  yield from config.values(seed, count)
  yield from config.mappings(seed, count // 2)
  yield from config.shapes()
  yield from config.overrides()
  yield from config.files()
  yield from records.broken(seed, count)
  yield from records.lines(seed)
  yield from records.files()
  yield from flags.values(seed, count)
  yield from flags.missing()
  yield from flags.paths(seed, count)
  yield from flags.contradictions()
  yield from runs.configs()
  yield from runs.checkpoints()
  yield from runs.tokenizers()
  yield from runs.models()
  yield from calls.calls()


@pytest.mark.parametrize("case", cases(SEED, 60), ids=lambda case: case.name)
def test_bad_input_is_refused_in_one_line(case, tmp_path, capsys):
  if found := answer(case, tmp_path, capsys):
    pytest.fail(f"{case.name}: {found}", pytrace=False)
